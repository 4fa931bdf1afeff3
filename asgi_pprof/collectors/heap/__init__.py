"""heap and allocs: live and past allocations by stack, sampled or traced; and MemStats."""

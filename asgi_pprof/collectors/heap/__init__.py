"""heap and allocs: live and past allocations by stack, sampled or traced; and MemStats."""

from asgi_pprof.collectors.heap.collector import HeapCollector as HeapCollector

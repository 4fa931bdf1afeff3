"""stall: what kept an event loop from running, and for how long."""

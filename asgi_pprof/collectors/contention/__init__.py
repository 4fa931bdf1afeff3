"""block and mutex: waits for locks, queues and threads, and who caused them."""

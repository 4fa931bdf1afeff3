"""block and mutex: waits for locks, queues and threads, and the releases that end them."""

"""What CPython and asyncio keep of a running program, read from outside. Imports no collector."""

"""The native samplers under load that never rests: `python -m tests.soak --help`."""

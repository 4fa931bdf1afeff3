"""
What asgi_pprof costs and how true its CPU profile is: `python -m tests.bench`.

Every number that the documentation quotes comes from here.
"""

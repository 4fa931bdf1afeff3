"""
Measures what asgi_pprof costs and how accurate its profiles are: `python -m tests.bench`.

Figures in the documentation come from here.
"""

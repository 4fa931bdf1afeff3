"""
Go's /debug/pprof for FastAPI, Starlette and any ASGI service.

    app.add_middleware(PprofMiddleware)

Importing this package changes nothing: no thread, no patch, no hook.
"""

from asgi_pprof.app import PprofApp
from asgi_pprof.collectors.custom import CustomProfile as Profile
from asgi_pprof.labels import labels
from asgi_pprof.middleware import PprofMiddleware
from asgi_pprof.recorders import set_block_profile_rate, set_mutex_profile_fraction, start
from asgi_pprof.version import VERSION

__version__ = VERSION

__all__ = [
    "PprofApp",
    "PprofMiddleware",
    "Profile",
    "labels",
    "set_block_profile_rate",
    "set_mutex_profile_fraction",
    "start",
]

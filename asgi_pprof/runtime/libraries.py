"""
Modules that may be missing and that requests need, loaded with this package; else None.

No request may import anything. A child that is forked while another thread imports a
module waits for that module's lock for ever. If its waiting thread has got the number of
the thread that held it, it takes the half of the module that is there.

Some builds of Python have no ctypes, Windows has no resource, and anyio's backend,
which anyio loads at its first use, is private.
"""

from __future__ import annotations

from typing import Any

try:
    import ctypes as ctypes
except ImportError:
    ctypes = None  # type: ignore[assignment]

try:
    import resource as resource
except ImportError:
    resource = None  # type: ignore[assignment]

anyio_backend: Any
try:
    import anyio._backends._asyncio as anyio_backend
except ImportError:
    anyio_backend = None

anyio_streams: Any
try:
    import anyio.streams.memory as anyio_streams
except ImportError:
    anyio_streams = None

"""The Python side of the C core: its module, and the stacks and labels behind its numbers."""

from asgi_pprof.native.core import native as native

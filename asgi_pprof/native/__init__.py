"""The Python side of the C core: its module, the stacks and the labels that it numbers."""

from asgi_pprof.native.core import native as native

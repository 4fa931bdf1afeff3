"""
The frames of suspended greenlets, in which async SQLAlchemy runs synchronous code.

SQLAlchemy's coroutine `greenlet_spawn` runs a function in a greenlet. What the function
awaits it hands to the coroutine, which awaits it. So the function's frames belong
between the two, and no coroutine refers to them: the greenlet does.

greenlet is read only if the application has loaded it. Older versions of it make frames
safe to read only as `gr_frame` is read, until the greenlet goes on. A greenlet of
another thread may go on whenever that thread gets the GIL, so all frames are found in
one call of C functions.

Source: sqlalchemy/util/concurrency.py, greenlet_spawn; greenlet, docs/api.rst, gr_frame.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from contextlib import suppress
from types import CodeType, FrameType

from asgi_pprof.runtime import type_info
from asgi_pprof.runtime.frames import (
    MAX_DEPTH,
    Generator,
    RawStack,
    generator_local,
    no_collections,
)


def runs_greenlet(code: CodeType) -> bool:
    """Return whether a coroutine with this code has a greenlet, for `greenlet_frames`."""
    return code.co_name == "greenlet_spawn"


def greenlet_frames(coroutine: Generator) -> RawStack:
    """
    Return the frames of the greenlet in which a coroutine runs a function, leaf first.

    () if the greenlet runs or has ended. Of more than `MAX_DEPTH` frames the innermost
    `MAX_DEPTH` + 1.
    """
    greenlet = generator_local(coroutine, "context")
    kind = getattr(sys.modules.get("greenlet"), "greenlet", None)
    if not type_info.is_subclass(type(greenlet), type_info.addresses(kind)):
        return ()
    steps = itertools.chain(("gr_frame",), itertools.repeat("f_back", MAX_DEPTH))
    found: deque[object] = deque()
    with no_collections(), suppress(AttributeError):  # of None, which follows the last frame
        found.extend(itertools.accumulate(steps, getattr, initial=greenlet))
    frames = (each for each in found if isinstance(each, FrameType))
    return tuple((frame.f_code, frame.f_lasti) for frame in frames)

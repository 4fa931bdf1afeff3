"""
The threads that `threading` knows, each with what it says of itself.

A class of the application's may say it wrongly or not at all, which must not
hide the other threads.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from asgi_pprof.labels import clip, unreadable


class KnownThread(NamedTuple):
    """
    A thread.

    Args:
        ident: The number by which Python knows it.
        native_id: The system's, None if it is not known.
        name: Its name, clipped as a label is; "" for none.
        daemon: Whether the interpreter ends without waiting for it, "true" or "false".
        thread: The object itself.
    """

    ident: int
    native_id: int | None
    name: str
    daemon: str
    thread: threading.Thread


def known_threads() -> dict[int, KnownThread]:
    """Return the threads that have been started, by `ident`."""
    return {each.ident: each for thread in threading.enumerate() if (each := _known(thread))}


def _known(thread: threading.Thread) -> KnownThread | None:
    ident = threading.Thread.ident.fget(thread)  # type: ignore[attr-defined]
    if ident is None:
        return None
    native_id = threading.Thread.native_id.fget(thread)  # type: ignore[attr-defined]
    try:
        name = clip(str(thread.name))
    except Exception as error:
        name = unreadable(error)
    daemon = threading.Thread.daemon.fget(thread)  # type: ignore[attr-defined]
    return KnownThread(ident, native_id, name, str(daemon).lower(), thread)

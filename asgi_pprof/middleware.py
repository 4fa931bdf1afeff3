"""
PprofMiddleware answers requests for profiles, and forwards all others to the application.

A forwarded HTTP request costs one substring test on its path and its labels (an
object and two contextvar calls); websocket and lifespan scopes cost nothing.
"""

from __future__ import annotations

from sys import getrefcount

from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_pprof.app import PprofApp
from asgi_pprof.collectors.heap.sampler import DEFAULT_RATE
from asgi_pprof.collectors.stall.watch import DEFAULT_THRESHOLD_MS
from asgi_pprof.labels import current
from asgi_pprof.paths import Target, locate
from asgi_pprof.recorders import HeapEngine
from asgi_pprof.request_labels import RequestLabels


def _references_to_a_local() -> int:
    local = object()
    return getrefcount(local)


_UNSHARED = _references_to_a_local()  # differs from one CPython to another


class PprofMiddleware:
    """
    Serve Go's /debug/pprof/ from an ASGI application.

        app.add_middleware(PprofMiddleware)

    By default only direct requests from this machine are answered.

    Args:
        app: The application.
        prefix: The path of the profiles, below the root path.
        heap: "tracemalloc" to trace every allocation from now on (slow: see
            docs/profiles.md), None to sample them.
        memory_profile_rate: Mean bytes from one sample to the next, as Go's
            MemProfileRate; 1 samples every allocation, 0 none.
        track_tasks: Whether to record who creates tasks, through the loop's task
            factory, and since when tasks wait: about 1 us a task.
        block_profile_rate: Record waits for locks, queues and threads, on average
            one for every so many nanoseconds of waiting, as Go's
            SetBlockProfileRate; 0 leaves the rate alone.
        mutex_profile_fraction: Record one in so many releases of locks that
            others waited for, as Go's SetMutexProfileFraction; 0 leaves the
            fraction alone.
        wrap_lock_classes: Whether to replace `threading.Lock` and `RLock`, while a
            rate is set, by classes that record waits for them too:
            docs/profiles.md says what that changes.
        stall_threshold_ms: Record what blocked an event loop for at least so many
            milliseconds; 0 to watch no loop.

    Raises:
        ValueError: `prefix` is no absolute path, `heap` is unknown, or a rate or
            the threshold is negative.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        prefix: str = "/debug/pprof",
        heap: HeapEngine | None = None,
        memory_profile_rate: int = DEFAULT_RATE,
        track_tasks: bool = True,
        block_profile_rate: int = 0,
        mutex_profile_fraction: int = 0,
        wrap_lock_classes: bool = False,
        stall_threshold_ms: float = DEFAULT_THRESHOLD_MS,
    ) -> None:
        if not prefix.startswith("/") or prefix.endswith("/") or "//" in prefix:
            raise ValueError(f'prefix is a path such as "/debug/pprof", not {prefix!r}')
        self.app = app
        self._prefix = prefix
        # A substring of the paths to look at. "" is in every path: without a startup, or
        # after a shutdown, the next request enables the recorders, for its loop too.
        self._looked_for = ""
        self._pprof = PprofApp(
            heap=heap,
            memory_profile_rate=memory_profile_rate,
            track_tasks=track_tasks,
            block_profile_rate=block_profile_rate,
            mutex_profile_fraction=mutex_profile_fraction,
            wrap_lock_classes=wrap_lock_classes,
            stall_threshold_ms=stall_threshold_ms,
            prefix=prefix,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind in ("http", "websocket"):
            if self._looked_for in scope["path"] and (target := self._locate(scope)) is not None:
                await self._pprof.answer(target, scope, receive, send)
                return
            request = RequestLabels(scope, current.get())
            token = current.set(request)
            try:
                await self.app(scope, receive, send)
            finally:
                try:
                    current.reset(token)
                except ValueError:
                    pass  # the loop ends and closes it in another context: nothing to put back
                # A task or a sample has outlived the request, which is rare.
                if getrefcount(request) > _UNSHARED:
                    request.finish()
        elif kind == "lifespan":
            self._pprof.open()  # a server that forks has made this object in its parent
            self._looked_for = self._prefix
            try:
                await self.app(scope, receive, send)
            finally:
                # The application has shut down, or does not support lifespan and gets
                # requests nevertheless.
                self._pprof.close()
                self._looked_for = ""
        else:
            await self.app(scope, receive, send)

    def _locate(self, scope: Scope) -> Target | None:
        if self._looked_for != self._prefix:
            self._pprof.open()
            self._looked_for = self._prefix
        return locate(scope, self._prefix) if scope["type"] == "http" else None

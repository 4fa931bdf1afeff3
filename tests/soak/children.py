"""
Child processes that profile themselves, and some that end during a profile.

A child is forked while its parent takes profiles. The child must be able to take
its own profiles at once, and must end with code 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable

from asgi_pprof.collectors.cpu import native_engine as cpu_native
from asgi_pprof.native.core import native
from asgi_pprof.recorders import heap_sampler
from tests.soak import work
from tests.soak.checks import Checker

_LOOK_S = 0.02
_LOOKS = 3000

ENDINGS = {
    # How a process ends while it takes profiles, and its exit code.
    "return": 0,
    "exit": 3,
    "os_exit": 4,
    "exception": 1,
    "interrupt": -signal.SIGINT,
    "terminate": -signal.SIGTERM,
    "fork": 0,
    "late": 0,
    "bare": 0,
    "finalizers": 0,
}


def profile_itself(hz: int, rate: int) -> int:
    """Take and check a CPU and a heap profile of this process; return the exit code."""
    checker = Checker([work.SCRIPT])
    stop = threading.Event()
    heap_sampler.enable(rate)
    if not heap_sampler.resume() and not sys.modules["tracemalloc"].is_tracing():
        checker.fail(f"the heap sampler is off: {heap_sampler.why_off()}")

    def busy() -> None:
        while not stop.is_set():
            work.exec()
            work.tenants()
            work.generators()

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        profile = asyncio.run(cpu_native.collect(0.3, asyncio.Event(), hz))
        checker.check(profile.samples, "cpu")
        checker.check(heap_sampler.copy().samples(), "heap")
    finally:
        stop.set()
        thread.join()
    heap_sampler.disable()
    if checker.counts["cpu samples"] == 0:
        checker.fail("no CPU samples")
    for error in checker.errors[:5]:
        sys.stderr.write(f"in the child: {error}\n")
    sys.stderr.flush()
    return 1 if checker.errors else 0


def fork(checker: Checker, hz: int, rate: int) -> None:
    """Fork a child that profiles itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning of a fork while threads run
        with work.alone_with_interpreters:
            child = os.fork()
    if child == 0:
        code = 99
        try:
            code = profile_itself(hz, rate)
        except BaseException as error:
            sys.stderr.write(f"in the child: {error!r}\n")
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(code)

    def poll() -> int | None:
        ended, status = os.waitpid(child, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None

    ended_with = _wait(poll)
    if ended_with is None:
        os.kill(child, signal.SIGABRT)  # the inherited faulthandler prints the child's stacks
        os.waitpid(child, 0)
    _expect(checker, "fork", ended_with, 0)


def _wait(poll: Callable[[], int | None]) -> int | None:
    """Return the exit code as soon as there is one; None if the child hangs."""
    # The limit is a number of polls, not a time: both processes may be stopped for a while.
    for _ in range(_LOOKS):
        if (code := poll()) is not None:
            return code
        time.sleep(_LOOK_S)
    return None


def _multiprocessing_main(hz: int, rate: int) -> None:
    sys.exit(profile_itself(hz, rate))


def processes(checker: Checker, hz: int, rate: int) -> None:
    """Run a child by one of multiprocessing's start methods, chosen at random."""
    kind = random.choice(("fork", "fork", "spawn", "forkserver"))
    process = multiprocessing.get_context(kind).Process(
        target=_multiprocessing_main, args=(hz, rate)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with work.alone_with_interpreters:
            process.start()
    code = _wait(lambda: process.exitcode)
    if code is None:
        os.kill(process.pid, signal.SIGABRT)
        process.join()
    _expect(checker, f"multiprocessing {kind}", code, 0)
    process.close()


def endings(checker: Checker, hz: int, rate: int) -> None:
    """Run a child that ends while it takes profiles."""
    how = random.choice(list(ENDINGS))
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.soak.children", how]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as output,
        subprocess.Popen([*command, str(hz), str(rate)], stdout=output, stderr=output) as child,
    ):
        code = _wait(child.poll)
        if code is None:
            child.send_signal(signal.SIGABRT)
        child.wait()
        output.seek(0)
        said = output.read()
    _expect(checker, f"ending {how}", code, ENDINGS[how])
    if code != ENDINGS[how] or "Fatal" in said or "in the child" in said:
        checker.fail(f"ending {how}: {said[-3000:]}")


def _expect(checker: Checker, what: str, code: int | None, expected: int) -> None:
    checker.count(children=1)
    if code != expected:
        checker.fail(f"{what}: ended with {code}, not {expected}")


CHILDREN: dict[str, Callable[[Checker, int, int], None]] = {
    "fork": fork,
    "multiprocessing": processes,
    "endings": endings,
}


# --- in the child that ends during a profile ------------------------------------------


def _profile_for_ever(hz: int) -> None:
    async def profile() -> None:
        while True:
            await cpu_native.collect(0.2, asyncio.Event(), hz)

    with contextlib.suppress(BaseException):
        asyncio.run(profile())


def _burn_for_ever() -> None:
    while True:
        work.exec()
        work.generators()
        work.burn()


class _AtTheEnd:
    """Finalized when the module is torn down: runs Python code and disables the sampler."""

    def __del__(self) -> None:
        work.burn(100)
        heap_sampler.disable()


_kept: list[object] = []


def _end(how: str, hz: int, rate: int) -> None:
    heap_sampler.enable(rate)
    if how == "bare":
        native.cpu_start(hz)
    else:
        threading.Thread(target=_profile_for_ever, args=(hz,), daemon=True).start()
    for _ in range(2):
        threading.Thread(target=_burn_for_ever, daemon=True).start()
    time.sleep(random.uniform(0.05, 0.4))
    match how:
        case "exit":
            sys.exit(3)
        case "os_exit":
            os._exit(4)
        case "exception":
            raise work.Odd("on purpose")
        case "interrupt":
            # A shell starts background jobs with SIGINT ignored, and child processes inherit it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.raise_signal(signal.SIGINT)
        case "terminate":
            signal.raise_signal(signal.SIGTERM)
        case "fork":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                child = os.fork()
            if child and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
                sys.exit(5)
        case "finalizers":
            _kept.append(_AtTheEnd())


def _begin_again() -> None:
    # This callback was registered before the core's own, so it is called after it.
    with contextlib.suppress(Exception):
        heap_sampler.resume()
        heap_sampler.enable(512)
    with contextlib.suppress(Exception):
        native.cpu_start(1000)
    work.tenants()
    work.burn(2000)


if __name__ == "__main__":
    if sys.argv[1] == "late":
        import atexit

        # Callbacks run in reverse order: this one must be registered before the core's.
        atexit.unregister(native.close)
        atexit.register(_begin_again)
        atexit.register(native.close)
    _end(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

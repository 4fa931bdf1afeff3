"""
Run both samplers under all kinds of work at once, and check every profile.

The exit code is 1 if a profile contains something impossible, a child process
fails or anything hangs. A crash prints the stacks of all threads.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import random
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable

from asgi_pprof.collectors.cpu import native_engine as cpu_native
from asgi_pprof.errors import ProfileBusy
from asgi_pprof.native.core import native, reason
from asgi_pprof.recorders import heap_sampler
from tests.soak import children, crowd, looks, work
from tests.soak.checks import Checker

_PROFILE_S = 3.0
_PAUSE_S = 0.5  # between two rounds of one kind of work, at most
_GRACE_S = 200  # for the last round of everything
_MOST_UNREADABLE = 0.01  # of all samples
_MOST_BUSY = 1000  # refusals in a row
_SLICES = {
    "samplers": [*work.THREADS, *work.TASKS, *children.CHILDREN],
    "looks": [*looks.LOOKING, *looks.THREADS, *looks.WITH],
    "crowd": [*crowd.CROWD, *crowd.WITH],
}
_NAMES = list(dict.fromkeys(name for names in _SLICES.values() for name in names))


class Soak:
    """One run of the soak."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.checker = Checker([work.SCRIPT, looks.SCRIPT])
        self.deadline = time.monotonic() + options.seconds
        self.begin = threading.Event()

    def is_over(self) -> bool:
        return time.monotonic() >= self.deadline

    async def run(self) -> None:
        """Run the selected work until the time is over."""
        threads = [
            threading.Thread(target=self._repeat, args=(name, each), name=name)
            for name, each in self._thread_work().items()
        ]
        if self.options.sampling:
            threads.append(threading.Thread(target=self._heap, name="heap"))
        for thread in threads:
            thread.start()
        # The work begins only when all threads are started: `work.threads` sets a small stack
        # size, which would hold for every thread that starts meanwhile.
        self.begin.set()
        tasks = [
            self._repeat_task(name, each)
            for name, each in work.TASKS.items()
            if name in self.options.only
        ]
        if self.options.sampling:
            tasks.append(self._cpu())
        await asyncio.gather(*tasks)
        for thread in threads:
            await asyncio.to_thread(thread.join)

    def _thread_work(self) -> dict[str, Callable[[], None]]:
        options, checker = self.options, self.checker
        child_work = {
            name: lambda run=run: run(checker, options.hz, options.rate)
            for name, run in children.CHILDREN.items()
        }
        looking = {name: lambda look=look: look(checker) for name, look in looks.LOOKING.items()}
        everything = {**work.THREADS, **looks.THREADS, **crowd.CROWD, **looking, **child_work}
        return {name: each for name, each in everything.items() if name in options.only}

    def _repeat(self, name: str, each: Callable[[], None]) -> None:
        self.begin.wait()
        while not self.is_over():
            started = time.monotonic()
            try:
                each()
            except Exception:
                self.checker.fail(f"{name}: {traceback.format_exc()}")
                return
            self.checker.count(**{f"{name} rounds": 1})
            # Each thread sleeps twice as long as it works: otherwise few profiles would be taken.
            time.sleep(min(2 * (time.monotonic() - started), _PAUSE_S))

    async def _repeat_task(self, name: str, each: Callable[[], Awaitable[None]]) -> None:
        while not self.is_over():
            try:
                await each()
            except Exception:
                self.checker.fail(f"{name}: {traceback.format_exc()}")
                return
            self.checker.count(**{f"{name} rounds": 1})
            await asyncio.sleep(0.02)

    async def _cpu(self) -> None:
        busy = 0
        while not self.is_over():
            fate = random.choice(("whole", "whole", "stopped", "cancelled", "cancelled"))
            length = min(_PROFILE_S, max(0.2, self.deadline - time.monotonic()))
            length = length if fate == "whole" else random.uniform(0.05, length)
            stop = asyncio.Event()
            task = asyncio.create_task(cpu_native.collect(length, stop, self.options.hz))
            if fate != "whole":
                # Above 1.0 the profile is ended after sampling, while its samples are read.
                await asyncio.sleep(length * random.uniform(0.2, 1.1))
                if fate == "stopped":
                    stop.set()
                else:
                    task.cancel()
            try:
                profile = await task
            except asyncio.CancelledError:
                self.checker.count(cancelled=1)
                continue
            except ProfileBusy:
                # The samples of the cancelled profile before it are still being read.
                busy += 1
                if busy > _MOST_BUSY:
                    self.checker.fail("cpu: busy for ever")
                    return
                await asyncio.sleep(0.05)
                continue
            except Exception:
                self.checker.fail(f"cpu: {traceback.format_exc()}")
                continue
            busy = 0
            self.checker.count(**{"cpu profiles": 1})
            await asyncio.to_thread(self.checker.check, profile.samples, "cpu")
            for comment in profile.comments:
                if comment.startswith(("lost:", "threads:", "stopped early")):
                    self.checker.count(**{f"cpu comment {comment.split(':')[0]}": 1})

    def _heap(self) -> None:
        while not self.is_over():
            try:
                self._one_heap()
            except Exception:
                self.checker.fail(f"heap: {traceback.format_exc()}")

    def _one_heap(self) -> None:
        heap_sampler.enable(self.options.rate)
        for _ in range(random.randrange(1, 4)):
            time.sleep(random.uniform(0.05, 0.5))
            heap_sampler.resume()
            self.checker.check(heap_sampler.copy().samples(), "heap")
            self.checker.count(**{"heap profiles": 1})
        copied = heap_sampler.copy()
        stats = native.heap_stats()
        self.checker.count(
            **{
                "heap stat lost": stats["lost"],
                "heap stat unreadable": stats["unreadable"],
                "heap stat unlabelled": stats["unlabelled"],
            }
        )
        heap_sampler.disable()
        if random.random() < 0.5:  # read the copy after sampling has started again
            heap_sampler.enable(self.options.rate)
            time.sleep(0.05)
            copied.samples()
            heap_sampler.disable()

    def verdict(self) -> int:
        """Print the summary and all errors; return the exit code."""
        counts = self.checker.counts
        if self.options.sampling:
            self._judge_totals()
        numbers = {
            "samples": counts["cpu samples"] + counts["heap samples"],
            "unreadable": counts["cpu unreadable"] + counts["heap unreadable"],
            "lost": counts["cpu lost"] + counts["heap lost"] + counts["heap stat lost"],
            "names checked": counts["names"],
            "places": counts["places"],
            "children": counts["children"],
            "looks": counts["looks"],
            "errors": counts["errors"],
        }
        for error in self.checker.errors:
            sys.stdout.write(f"{error}\n")
        if self.options.verbose:
            for name, number in sorted(counts.items()):
                sys.stdout.write(f"  {name}: {number}\n")
        version = sys.version.split()[0]
        text = ", ".join(f"{name} {number}" for name, number in numbers.items())
        sys.stdout.write(f"soak: CPython {version}, {self.options.seconds:g} s: {text}\n")
        return 1 if counts["errors"] else 0

    def _judge_totals(self) -> None:
        counts, fail = self.checker.counts, self.checker.fail
        for kind in ("cpu", "heap"):
            if counts[f"{kind} samples"] == 0:
                fail(f"{kind}: no samples at all")
            elif counts[f"{kind} unreadable"] > _MOST_UNREADABLE * counts[f"{kind} samples"]:
                fail(f"{kind}: too many stacks could not be read: {counts[f'{kind} unreadable']}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=60, help="how long (60)")
    add("--hz", type=int, default=5000, help="CPU samples a second (5000)")
    add("--rate", type=int, default=512, help="bytes a heap sample (512)")
    add("--slice", choices=_SLICES, default="samplers", help="what to run (%(default)s)")
    add("--only", default="", help=f"run just these, with commas: {','.join(_NAMES)}")
    add("--without", default="", help="what not to run, with commas")
    add("--seed", type=int, default=None, help="of the random choices")
    add("--verbose", action="store_true", help="print all counts")
    add(
        "--no-sampling",
        dest="sampling",
        action="store_false",
        help="run the same without the samplers: whose crash is it?",
    )
    options = parser.parse_args()
    options.only = [name for name in options.only.split(",") if name] or _SLICES[options.slice]
    for name in {*options.only, *filter(None, options.without.split(","))} - {*_NAMES}:
        parser.error(f"there is no {name!r}")
    options.only = [name for name in options.only if name not in options.without.split(",")]
    return options


def main() -> int:
    """Run the soak and return its exit code."""
    options = _parse()
    if native is None and options.sampling:
        sys.stderr.write(f"soak: no native core: {reason}\n")
        return 2
    faulthandler.enable()
    faulthandler.dump_traceback_later(options.seconds + _GRACE_S, exit=True)
    # Generators that are collected at the recursion limit raise errors that no code can catch.
    sys.unraisablehook = lambda _: None
    random.seed(options.seed)
    sys.setswitchinterval(0.001)  # threads switch more often, at more different instructions
    gc.collect()
    soak = Soak(options)
    asyncio.run(soak.run())
    faulthandler.cancel_dump_traceback_later()
    return soak.verdict()


if __name__ == "__main__":
    sys.exit(main())

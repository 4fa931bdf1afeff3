"""
Serve random traffic and random pulls of profiles, and check that the process stops growing.

    python -m tests.soak.growth --help

Most of what a request brings is never seen again: its method, host and path, its
labels, its tasks' and threads' names, the code it runs, and the lines that allocate.
Half of the service's requests make new code objects. Clients pull every
profile meanwhile, in random order, some of them leave before the answer.
The service's own memory has a constant size, so that what grows is the profiler's.

Exit code 1 if the memory in the end is above that after the first fifth of the
requests, if descriptors or threads are left, or if a pull fails.
"""

from __future__ import annotations

import argparse
import http.client
import random
import resource
import socket
import statistics
import string
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from pathlib import Path

from tests.servers import serve_process

MOST_GROWTH_MIB = 2.0
_REQUESTERS = 4
_PULLERS = 3
_SAMPLES = 200
"""How often memory is read in a run."""

PULLS = (
    "profile?seconds=1",
    "profile?seconds=1&hz=500",
    "profile?seconds=1&debug=1",
    "heap",
    "heap?debug=1",
    "heap?gc=1",
    "heap?seconds=1",
    "heap?seconds=1&debug=1",
    "allocs",
    "allocs?debug=1",
    "allocs?seconds=1",
    "goroutine",
    "goroutine?debug=1",
    "goroutine?debug=2",
    "goroutineleak",
    "goroutineleak?debug=1",
    "goroutineleak?debug=2",
    "block",
    "block?debug=1",
    "block?seconds=1",
    "goroutine?seconds=1&debug=1",
    "mutex?seconds=1",
    "mutex?debug=1",
    "stall",
    "stall?debug=1",
    "stall?seconds=1",
    "thread",
    "thread?debug=1",
    "thread?debug=2",
    "threadcreate",
    "threadcreate?debug=1",
    "stats",
    "cmdline",
    "symbol?0x1+0x2",
    "",
)
"""Every kind of answer."""

_METHODS = ("GET", "GET", "GET", "POST", "PUT", "DELETE")


@dataclass
class Usage:
    """Resident memory in MiB, open files and threads of a process."""

    rss: float
    files: int
    threads: int


@dataclass
class Growth:
    """
    What was seen in a run.

    Args:
        memory: Resident memory in MiB at equal distances, once the first fifth was over.
        idle: The usage without any client, after the first fifth and at the end.
    """

    memory: list[float] = field(default_factory=list)
    idle: list[Usage] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def fourths(self) -> list[float]:
        """Return the median memory in each fourth of what followed the first fifth."""
        size = len(self.memory) // 4
        return [statistics.median(self.memory[i * size : (i + 1) * size]) for i in range(4)]

    def problems(self) -> list[str]:
        """Return what has grown, and what failed."""
        found = list(self.errors)
        first, *_, last = self.fourths()
        if last > first + MOST_GROWTH_MIB:
            found.append(f"memory has grown by {last - first:.1f} MiB")
        before, after = self.idle
        if after.files > before.files or after.threads > before.threads:
            found.append(f"files or threads have grown: {before}, {after}")
        return found


def usage_of(pid: int) -> Usage:
    """Return what a process uses now."""
    proc = Path(f"/proc/{pid}")
    pages = int((proc / "statm").read_text().split()[1])
    return Usage(
        rss=pages * resource.getpagesize() / 2**20,
        files=len(list((proc / "fd").iterdir())),
        threads=len(list((proc / "task").iterdir())),
    )


def _idle_usage(pid: int) -> Usage:
    """Return the least that a process uses within some seconds; what ends needs a moment."""
    seen = []
    for _ in range(30):
        seen.append(usage_of(pid))
        time.sleep(0.1)
    rss, files, threads = (min(values) for values in zip(*map(astuple, seen), strict=True))
    return Usage(rss, files, threads)


def grow(
    app: str, loop: str, requests: int, pulls: tuple[str, ...], say: Callable[[str], object]
) -> Growth:
    """Run the service until it has answered that many requests; return what it used."""
    growth = Growth()
    with serve_process(app, loop) as server:
        pid = server.process.pid

        def sample() -> None:
            growth.memory.append(usage_of(pid).rss)
            if len(growth.memory) % (_SAMPLES // 10) == 1:
                done, pulled = growth.counts["requests"], growth.counts["pulls"]
                say(f"{done:7} requests {pulled:5} pulls {growth.memory[-1]:6.1f} MiB\n")

        for share, each in ((1, lambda: None), (4, sample)):
            _run(server.port, share * requests // 5, pulls, growth, each)
            growth.idle.append(_idle_usage(pid))
    return growth


def _run(
    port: int, requests: int, pulls: tuple[str, ...], growth: Growth, sample: Callable[[], None]
) -> None:
    """Let all clients ask until there were that many more requests; sample 200 times meanwhile."""
    before, is_over = growth.counts["requests"], threading.Event()
    most = before + requests
    threads = [
        threading.Thread(target=_request, args=(port, most, growth, is_over))
        for _ in range(_REQUESTERS)
    ]
    if pulls:
        threads += [
            threading.Thread(target=_pull, args=(port, pulls, growth, is_over))
            for _ in range(_PULLERS)
        ]
    for thread in threads:
        thread.start()
    try:
        samples = 0
        while not is_over.wait(0.01):
            if growth.counts["requests"] - before >= samples * requests / _SAMPLES:
                samples += 1
                sample()
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def _request(port: int, most: int, growth: Growth, is_over: threading.Event) -> None:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while not is_over.is_set():
        method = random.choice(_METHODS) if random.random() < 0.9 else word().upper()
        headers = {"Host": f"{word()}.example" if random.random() < 0.5 else "shop"}
        if random.random() < 0.01:
            method, headers["X-Long"] = method * 50, word() * 500
        try:
            client.request(method, f"/{random.choice(PATHS)}/{word()}", headers=headers)
            client.getresponse().read()
        except (OSError, http.client.HTTPException) as error:
            growth.counts[f"request {type(error).__name__}"] += 1
            client.close()
            if isinstance(error, ConnectionRefusedError):
                growth.errors.append("the service is gone")
                is_over.set()
        growth.counts["requests"] += 1
        if growth.counts["requests"] >= most:
            is_over.set()
    client.close()


def _pull(port: int, pulls: tuple[str, ...], growth: Growth, is_over: threading.Event) -> None:
    while not is_over.is_set():
        path = random.choice(pulls)
        started = time.monotonic()
        try:
            if random.random() < 0.1:
                _leave(port, path)
                growth.counts["left"] += 1
                continue
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            client.request("GET", f"/debug/pprof/{path}")
            response = client.getresponse()
            body = response.read()
            client.close()
        except (OSError, http.client.HTTPException) as error:
            if not is_over.is_set():
                growth.errors.append(f"{path}: {error!r}")
            continue
        # Two clients that want a CPU profile at a time: one of them is told so, as by Go.
        is_busy = response.status == 500 and b"already" in body
        if response.status != 200 and not is_busy:
            growth.errors.append(f"{path}: {response.status} {body[:200]!r}")
        growth.counts["pulls"] += 1
        growth.counts[f"longest of {path} ms"] = max(
            growth.counts[f"longest of {path} ms"], int(1000 * (time.monotonic() - started))
        )


def _leave(port: int, path: str) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"GET /debug/pprof/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        time.sleep(random.uniform(0, 0.3))


def word() -> str:
    """Return a random word, long now and then."""
    length = 300 if random.random() < 0.01 else random.randrange(4, 12)
    return "".join(random.choices(string.ascii_lowercase, k=length))


PATHS = ("labels", "tasks", "threads", "code", "memory", "nothing", "wait", "missing")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.growth", description=__doc__)
    add = parser.add_argument
    add("--requests", type=int, default=100_000, help="of the service (%(default)s)")
    add("--loop", default="asyncio", choices=("asyncio", "uvloop"))
    add("--pulls", default=None, help="just these, with commas; none: no pulls")
    add("--bare", action="store_true", help="the same service without the middleware")
    add("--seed", type=int, default=None, help="of the random choices")
    return parser.parse_args()


def main() -> int:
    """Run it, print what was used, and return the exit code."""
    options = _parse()
    random.seed(options.seed)
    pulls = PULLS if options.pulls is None else tuple(options.pulls.split(","))
    if options.bare or options.pulls == "none":
        pulls = ()
    app = "tests.soak.growing_app:" + ("bare" if options.bare else "app")
    say = sys.stdout.write
    growth = grow(app, options.loop, options.requests, pulls, say)
    for name, count in sorted(growth.counts.items()):
        say(f"  {name}: {count}\n")
    say(f"median MiB by fourths: {' '.join(f'{each:.1f}' for each in growth.fourths())}\n")
    say(f"without clients, at first and in the end: {growth.idle}\n")
    problems = growth.problems()
    for problem in problems[:20]:
        say(f"{problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

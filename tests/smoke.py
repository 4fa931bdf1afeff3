"""
Take each profile once from the installed package, in process: a check of wheels.

Run as a script, it sees the installed package and not the checkout, and needs
nothing but the package's own dependencies:

    python tests/smoke.py native    # the C extension must be there
    python tests/smoke.py python    # it must not
"""

from __future__ import annotations

import asyncio
import gzip
import sys
import time

import asgi_pprof
from asgi_pprof import PprofApp
from asgi_pprof.native.core import native, reason

PROFILES = ("allocs", "block", "goroutine", "heap", "mutex", "thread", "threadcreate")


async def ask(app: PprofApp, name: str, query: str = "") -> bytes:
    """Return the body of a good answer to a request from this machine."""
    sent = []

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "path": f"/{name}",
        "query_string": query.encode(),
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
    }
    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent)
    assert sent[0]["status"] == 200, body
    return body


def burn_cpu(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(500))


async def main() -> None:
    app = PprofApp()
    for name in PROFILES:
        assert gzip.decompress(await ask(app, name)), name
    profile = asyncio.create_task(ask(app, "profile", "seconds=1"))
    while not profile.done():
        burn_cpu(0.05)
        await asyncio.sleep(0.01)
    assert b"burn_cpu" in gzip.decompress(await profile)
    app.close()


if __name__ == "__main__":
    assert sys.argv[1:] in (["native"], ["python"]), __doc__
    assert sys.argv[1] == ("native" if native else "python"), reason or native
    assert bool(reason) == (native is None)
    asyncio.run(main())
    sys.stdout.write(f"{asgi_pprof.__file__}: {reason or 'native'}\n")

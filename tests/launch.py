"""Run an app under uvicorn on a free port, and print that port as JSON."""

from __future__ import annotations

import json
import socket
import sys

import uvicorn


def main() -> None:
    app, loop = sys.argv[1:3]
    # If the protocol is given, asyncio sets TCP_NODELAY. Otherwise every answer waits for
    # the kernel's timer, in step with the ticks that drive the samplers.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    config = uvicorn.Config(app, loop=loop, log_level="warning")
    config.load()
    server = uvicorn.Server(config)
    sys.stdout.write(json.dumps({"port": listener.getsockname()[1]}) + "\n")
    sys.stdout.flush()
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()

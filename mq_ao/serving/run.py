"""Runs a server until it is told to end."""

from __future__ import annotations

import socket
import sys

import uvicorn

from mq_ao.serving.app import Server


def run(server: Server, host: str, port: int) -> None:
    """Listens at an address, and tells it on stderr.

    Raises:
        OSError: the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once on what says that it is TCP; else a short answer waits for 40 ms.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)  # so that who reads the address can come at once
        address = f"[{host}]" if ":" in host else host
        print(f"{server.name} at http://{address}:{listening.getsockname()[1]}/v1", file=sys.stderr, flush=True)
        config = uvicorn.Config(server.app(), log_level="warning", timeout_graceful_shutdown=30)
        uvicorn.Server(config).run(sockets=[listening])

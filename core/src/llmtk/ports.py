"""Ports of this machine."""

from __future__ import annotations

import socket

from llmtk.errors import ConfigurationError

LOCAL = "127.0.0.1"


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind((LOCAL, 0))
        return int(listener.getsockname()[1])


def check_port(host: str, port: int, option: str) -> None:
    """Refuse a port that cannot be listened on, by the name of its option; the host "" is all of this machine's."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just left is free
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ConfigurationError(f"{option} {port} cannot be had: {error.strerror}. Give another") from None

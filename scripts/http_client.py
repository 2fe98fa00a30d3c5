"""A client of a running server on this machine."""

from __future__ import annotations

import argparse
import http.client
import os
import socket
from urllib.parse import urlsplit

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def local_url(text: str) -> str:
    """Parse a server's address for argparse; only this machine may be tested, and a server must answer there."""
    parts = urlsplit(text)
    if parts.hostname not in LOCAL_HOSTS:
        raise argparse.ArgumentTypeError("the server must be on this machine")
    try:
        socket.create_connection((parts.hostname, parts.port or 80), timeout=10).close()
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"no server answers at {text}: {error}") from error
    return text


class Connection:
    """A persistent connection that sends the key in ``MEMTX_API_KEY``, if set.

    Args:
        url: Address of the server.
        timeout: Seconds that a response may take. Defaults to 60.
    """

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        parts, key = urlsplit(url), os.environ.get("MEMTX_API_KEY")
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def request(self, method: str, path: str, body: bytes | str | None = None) -> tuple[int, bytes]:
        """Return status and content of a response."""
        self._connection.request(method, path, body, self._headers)
        response = self._connection.getresponse()
        return response.status, response.read()

    def get_metric(self, name: str) -> float:
        """Return one of the server's metrics; NaN if it has none of that name."""
        self._connection.close()  # The server closes idle connections.
        lines = self.request("GET", "/metrics")[1].decode().splitlines()
        return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), float("nan"))

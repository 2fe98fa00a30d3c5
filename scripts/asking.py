"""What the scripts that ask a running server share: an address of this machine, and a connection that is kept."""

from __future__ import annotations

import argparse
import http.client
import os
from urllib.parse import urlsplit

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def local_url(text: str) -> str:
    """Read a server's address, for argparse: one of this machine, since other people's are not to be tried out."""
    if urlsplit(text).hostname not in LOCAL_HOSTS:
        raise argparse.ArgumentTypeError("the server must be on this machine")
    return text


class Connection:
    """One connection; shows the key in ``MEMTX_API_KEY``, if there is one.

    Args:
        url: the server's address.
        timeout: that an answer may take.
    """

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        parts, key = urlsplit(url), os.environ.get("MEMTX_API_KEY")
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def request(self, method: str, path: str, body: bytes | str | None = None) -> tuple[int, bytes]:
        """Return an answer's status and content."""
        self._connection.request(method, path, body, self._headers)
        response = self._connection.getresponse()
        return response.status, response.read()

    def get_metric(self, name: str) -> float:
        """Return one of the server's counters; NaN where it has none of the name."""
        self._connection.close()  # The server ends what was idle for long.
        lines = self.request("GET", "/metrics")[1].decode().splitlines()
        return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), float("nan"))

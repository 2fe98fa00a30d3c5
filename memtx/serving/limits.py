"""Who may ask, and how much: the key, where a request may come from, and the limits on body, time and number."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memtx.errors import MemtxError
from memtx.serving.metrics import Metrics
from memtx.serving.problems import Problem, answer

OPEN = ("/health", "/", "/openapi.json", "/favicon.ico")
"""Addresses that need no key: they say nothing about texts."""

LOOPBACK = ("127.0.0.1", "localhost", "::1", "testserver")


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    Attributes:
        body: bytes of a request.
        tokens: of one text that is made.
        choices: texts made for one request.
        inputs: texts labelled for one request.
        seconds: for one request.
        requests: worked on at once; more are told to come back.
    """

    body: int = 8 << 20
    tokens: int = 4096
    choices: int = 64
    inputs: int = 256
    seconds: float = 300.0
    requests: int = 128

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise MemtxError(f"The limit of {name} is {value}.", "Give more than 0.")


class Guard:
    """Looks at every request before the application does.

    Args:
        app: what answers.
        limits: to be kept.
        metrics: counts what was answered.
        key: that clients must show; None for none.
        import_body: bytes of a session that is brought along, where that is more than a body may have.
    """

    def __init__(
        self, app: ASGIApp, *, limits: Limits, metrics: Metrics, key: str | None = None, import_body: int = 0
    ) -> None:
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self.key = key.encode() if key is not None else None
        self.import_body = import_body
        self.working = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        works = scope["method"] == "POST"
        refused = self._refused(scope) or (self._full() if works else None)
        try:
            if refused is not None:
                await answer(refused)(scope, receive, counted)
                return
            deadline = time.monotonic() + self.limits.seconds
            scope.setdefault("state", {})["deadline"] = deadline
            self.working += works
            self.metrics.working.set(self.working)
            try:
                await self.app(scope, self._counting(scope, receive, deadline), counted)
            finally:
                self.working -= works
                self.metrics.working.set(self.working)
        finally:
            # The route's own pattern: a name in the address must not become a series of its own.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.answered(scope["method"], route, status, time.perf_counter() - began)

    def _full(self) -> Problem | None:
        if self.working < self.limits.requests:
            return None
        return Problem(429, f"The server works on {self.working} requests, as many as it may.", "Come back later.")

    def _refused(self, scope: Scope) -> Problem | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if refused := self._foreign(headers):
            return refused
        if self.key is not None and scope["path"] not in OPEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            # Compared in constant time, so that the time taken tells nothing of the key.
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self.key):
                return Problem(401, "The request shows no valid API key.", "Send 'Authorization: Bearer KEY'.")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            return Problem(400, "Content-Length is not a number.", "Send the body's length in bytes.")
        return self._too_large() if int(length) > self._body(scope) else None

    def _foreign(self, headers: MutableMapping[str, str]) -> Problem | None:
        """Refuse what a page of another site makes a browser send: it has no business here."""
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and origin != "null" and urlsplit(origin).netloc != host:
            return Problem(403, "The request comes from a page of another site.", "Use the page at /, or a program.")
        # Without a key only this machine may ask, also where another name was made to point here.
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self.key is None and name.strip("[]") not in LOOPBACK:
            return Problem(403, "The server is for this machine only.", "Ask 127.0.0.1, or start it with a key.")
        return None

    def _body(self, scope: Scope) -> int:
        return max(self.limits.body, self.import_body if scope["path"] == "/v1/sessions/import" else 0)

    def _too_large(self) -> Problem:
        return Problem(
            413, f"The body has more than {self.limits.body} bytes.", "Send less at once.", code="body_too_large"
        )

    def _counting(self, scope: Scope, receive: Receive, deadline: float) -> Receive:
        """Return ``receive`` with the body's limits: in bytes, and in time for one that does not come."""
        taken, complete = 0, False

        async def counting() -> Message:
            nonlocal taken, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0))
            except TimeoutError:
                raise _stopped(Problem(408, "The body did not come in time.", "Send it faster.")) from None
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if taken > self._body(scope):
                    raise _stopped(self._too_large())
            return message

        return counting


def _stopped(problem: Problem) -> Exception:
    # The one kind of error that FastAPI lets through while it reads a body.
    from starlette.exceptions import HTTPException

    return HTTPException(problem.status, str(problem))


def deadline_of(request: Any) -> float:
    """Return by when a request must be answered, a time of ``time.monotonic``."""
    deadline: float = request.scope["state"]["deadline"]
    return deadline

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
from memtx.serving.errors import APIError, error_response
from memtx.serving.metrics import Metrics

PUBLIC_PATHS = ("/health", "/", "/openapi.json", "/favicon.ico")
"""Addresses that need no key: they say nothing about texts."""

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1", "testserver")


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    Attributes:
        max_body_bytes: bytes of a request.
        max_tokens: of one text that is made.
        max_choices: texts made for one request.
        max_inputs: texts labelled for one request.
        max_seconds: for one request.
        max_concurrent_requests: worked on at once; more are told to come back.
    """

    max_body_bytes: int = 8 << 20
    max_tokens: int = 4096
    max_choices: int = 64
    max_inputs: int = 256
    max_seconds: float = 300.0
    max_concurrent_requests: int = 128

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise MemtxError(f"{name} is {value}.", "Give more than 0.")


class GuardMiddleware:
    """Looks at every request before the application does.

    Args:
        app: what answers.
        limits: to be kept.
        metrics: counts what was answered.
        api_key: that clients must show; None for none.
        max_import_bytes: bytes of a session that is brought along, where that is more than a body may have.
    """

    def __init__(
        self, app: ASGIApp, *, limits: Limits, metrics: Metrics, api_key: str | None = None, max_import_bytes: int = 0
    ) -> None:
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self.api_key = api_key.encode() if api_key is not None else None
        self.max_import_bytes = max_import_bytes
        self.active_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def send_and_record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        works = scope["method"] == "POST"
        refused = self._check_access(scope) or (self._check_capacity() if works else None)
        try:
            if refused is not None:
                await error_response(refused)(scope, receive, send_and_record_status)
                return
            deadline = time.monotonic() + self.limits.max_seconds
            scope.setdefault("state", {})["deadline"] = deadline
            self.active_requests += works
            self.metrics.active_requests.set(self.active_requests)
            try:
                await self.app(scope, self._limit_body(scope, receive, deadline), send_and_record_status)
            finally:
                self.active_requests -= works
                self.metrics.active_requests.set(self.active_requests)
        finally:
            # The route's own pattern: a name in the address must not become a series of its own.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.observe_request(scope["method"], route, status, time.perf_counter() - began)

    def _check_capacity(self) -> APIError | None:
        if self.active_requests < self.limits.max_concurrent_requests:
            return None
        return APIError(
            429, f"The server works on {self.active_requests} requests, as many as it may.", "Come back later."
        )

    def _check_access(self, scope: Scope) -> APIError | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if refused := self._check_origin(headers):
            return refused
        if self.api_key is not None and scope["path"] not in PUBLIC_PATHS:
            kind, _, given = headers.get("authorization", "").partition(" ")
            # Compared in constant time, so that the time taken tells nothing of the key.
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self.api_key):
                return APIError(401, "The request shows no valid API key.", "Send 'Authorization: Bearer KEY'.")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            return APIError(400, "Content-Length is not a number.", "Send the body's length in bytes.")
        return self._body_too_large() if int(length) > self._max_body_bytes(scope) else None

    def _check_origin(self, headers: MutableMapping[str, str]) -> APIError | None:
        """Refuse what a page of another site makes a browser send: it has no business here."""
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and origin != "null" and urlsplit(origin).netloc != host:
            return APIError(403, "The request comes from a page of another site.", "Use the page at /, or a program.")
        # Without a key only this machine may ask, also where another name was made to point here.
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self.api_key is None and name.strip("[]") not in LOOPBACK_HOSTS:
            return APIError(403, "The server is for this machine only.", "Ask 127.0.0.1, or start it with a key.")
        return None

    def _max_body_bytes(self, scope: Scope) -> int:
        return max(self.limits.max_body_bytes, self.max_import_bytes if scope["path"] == "/v1/sessions/import" else 0)

    def _body_too_large(self) -> APIError:
        return APIError(
            413,
            f"The body has more than {self.limits.max_body_bytes} bytes.",
            "Send less at once.",
            code="request_too_large",
        )

    def _limit_body(self, scope: Scope, receive: Receive, deadline: float) -> Receive:
        """Return ``receive`` with the body's limits: in bytes, and in time for one that does not come."""
        taken, complete = 0, False

        async def receive_limited() -> Message:
            nonlocal taken, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0))
            except TimeoutError:
                raise _to_http_exception(APIError(408, "The body did not come in time.", "Send it faster.")) from None
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if taken > self._max_body_bytes(scope):
                    raise _to_http_exception(self._body_too_large())
            return message

        return receive_limited


def _to_http_exception(error: APIError) -> Exception:
    # The one kind of error that FastAPI lets through while it reads a body.
    from starlette.exceptions import HTTPException

    return HTTPException(error.status_code, str(error))


def get_deadline(request: Any) -> float:
    """Return by when a request must be answered, a time of ``time.monotonic``."""
    deadline: float = request.scope["state"]["deadline"]
    return deadline

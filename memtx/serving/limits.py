"""Access control and limits: API key, origin, request size, duration and concurrency."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memtx.errors import MemtxError
from memtx.serving.errors import APIError, error_response
from memtx.serving.metrics import Metrics

PUBLIC_PATHS = ("/health", "/", "/openapi.json", "/favicon.ico")
"""Paths that need no API key, because they reveal no text."""

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1", "testserver")


@dataclass(frozen=True)
class Limits:
    """Limits, each positive: per request, except ``max_tokens`` per generated text and ``max_concurrent_requests``.

    ``max_choices`` counts generated texts and ``max_inputs`` predicted inputs. When ``max_concurrent_requests`` are in
    progress, further requests are told to retry.
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
                raise MemtxError(f"{name} ({value}) must be above 0.")


class GuardMiddleware:
    """Middleware that checks every request, applies the limits and counts the responses.

    Without ``api_key``, only this machine has access. The body of an imported session may have ``max_import_bytes`` or
    ``limits.max_body_bytes``, whichever is larger.
    """

    def __init__(
        self, app: ASGIApp, *, limits: Limits, metrics: Metrics, api_key: str | None = None, max_import_bytes: int = 0
    ) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.api_key = api_key.encode() if api_key is not None else None
        self.max_import_bytes, self.active_requests = max_import_bytes, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or reject it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def send_and_record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        is_work = scope["method"] == "POST"
        try:
            if error := self._check_access(scope):
                await error_response(error)(scope, receive, send_and_record_status)
                return
            deadline = scope.setdefault("state", {})["deadline"] = time.monotonic() + self.limits.max_seconds
            self._count_active(is_work)
            try:
                await self.app(scope, self._limit_body(scope, receive, deadline), send_and_record_status)
            finally:
                self._count_active(-is_work)
        finally:
            # The route's pattern, because a session id in the path must not become a metric of its own.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.observe_request(scope["method"], route, status, time.perf_counter() - start)

    def _count_active(self, change: int) -> None:
        self.active_requests += change
        self.metrics.active_requests.set(self.active_requests)

    def _check_access(self, scope: Scope) -> APIError | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if error := self._check_origin(headers):
            return error
        if self.api_key is not None and scope["path"] not in PUBLIC_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # Compared in constant time, so that the time reveals nothing about the key.
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self.api_key):
                return APIError(401, "The request has no valid API key.", "Send 'Authorization: Bearer KEY'.")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            return APIError(400, "Content-Length is not a number.", "Send the length of the body in bytes.")
        if int(length) > self._max_body_bytes(scope):
            return self._body_too_large(scope)
        if scope["method"] == "POST" and self.active_requests >= self.limits.max_concurrent_requests:
            return APIError(429, f"Request limit reached ({self.active_requests} in progress).", "Retry later.")
        return None

    def _check_origin(self, headers: Mapping[str, str]) -> APIError | None:
        """Reject requests that a browser sends for another site's page."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and origin != "null" and urlsplit(origin).netloc != host:
            return APIError(403, "The request comes from another site's page.", "Use the page at /, or a program.")
        # Without a key, only this machine has access, and not by another name that resolves to it.
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self.api_key is None and name.strip("[]") not in LOOPBACK_HOSTS:
            return APIError(403, "The server accepts only this machine.", "Use 127.0.0.1, or start it with an API key.")
        return None

    def _max_body_bytes(self, scope: Scope) -> int:
        return max(self.limits.max_body_bytes, self.max_import_bytes if scope["path"] == "/v1/sessions/import" else 0)

    def _body_too_large(self, scope: Scope) -> APIError:
        message = f"The body has more than {self._max_body_bytes(scope)} bytes."
        return APIError(413, message, "Send less per request.", code="request_too_large")

    def _limit_body(self, scope: Scope, receive: Receive, deadline: float) -> Receive:
        """Return ``receive`` with limits on the size of the body and on the time until it is complete."""
        num_bytes, complete = 0, False

        async def receive_limited() -> Message:
            nonlocal num_bytes, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0))
            except TimeoutError:
                raise _to_http_exception(APIError(408, "The body did not arrive in time.", "Send it faster.")) from None
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if num_bytes > self._max_body_bytes(scope):
                    raise _to_http_exception(self._body_too_large(scope))
            return message

        return receive_limited


def _to_http_exception(error: APIError) -> HTTPException:
    # The only exception that FastAPI passes on while it reads a body.
    return HTTPException(error.status_code, str(error))


async def get_deadline(request: Request) -> float:
    """Return the time by which a request must be answered, on the clock of ``time.monotonic``."""
    return float(request.state.deadline)


Deadline = Annotated[float, Depends(get_deadline)]

"""The application with its routes, limits and errors, and the server that runs it."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import sys
from collections.abc import AsyncIterator, Callable
from importlib import resources

import uvicorn
from anyio import to_thread
from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse

import memtx
from memtx.errors import MemtxError
from memtx.inference.predictor import BasePredictor
from memtx.inference.sessions.pool import SessionPool
from memtx.serving import completions, errors, routes, sessions
from memtx.serving.limits import GuardMiddleware, Limits
from memtx.serving.metrics import Metrics, PoolMetrics

SESSION_FILE_OVERHEAD = 1 << 20
"""Maximum bytes of a session file without its state: the header and text that was not read yet."""

SHUTDOWN_TIMEOUT = 10
"""Seconds that responses get to finish after SIGTERM, before they are cut and the sessions are saved."""


def create_app(
    pool: SessionPool, *, model_name: str, limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """Return the application of a language model. Its shutdown closes the pool, which saves every session.

    Args:
        pool: Pool that reads and generates.
        model_name: Name of the model in requests.
        limits: Limits of the requests.
        api_key: Key that clients must send. None disables it and restricts access to this machine.
    """
    limits, metrics = limits or Limits(), PoolMetrics(pool)
    app = _create_base_app(
        model_name,
        limits,
        metrics,
        api_key,
        stop=pool.engine.close,
        close=pool.close,
        max_import_bytes=pool.session_bytes + SESSION_FILE_OVERHEAD,
    )
    app.state.service = completions.CompletionService(pool, model_name, limits, metrics)
    app.include_router(completions.router)
    app.include_router(sessions.router)
    app.include_router(
        routes.build_rejecting_router(("/v1/predict",), "This model continues texts.", "Use /v1/completions.")
    )
    content = resources.files("memtx.serving").joinpath("page/index.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> HTMLResponse:
        policy = "default-src 'self' 'unsafe-inline'; img-src 'self' data:"
        return HTMLResponse(content, headers={"Content-Security-Policy": policy})

    return app


def create_task_app(
    predictor: BasePredictor, *, model_name: str, limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """Return the application of a task model; the options are those of :func:`create_app`."""
    metrics = Metrics(lambda: predictor.num_tokens_read)
    app = _create_base_app(
        model_name, limits or Limits(), metrics, api_key, stop=predictor.close, close=predictor.close
    )
    app.state.predictor = predictor
    app.include_router(routes.predict_router)
    paths = ("/v1/completions", "/v1/sessions", "/v1/sessions/{rest:path}")
    app.include_router(
        routes.build_rejecting_router(paths, f"This model does {predictor.task_name}.", "Use /v1/predict.")
    )
    return app


def _create_base_app(
    model_name: str,
    limits: Limits,
    metrics: Metrics,
    api_key: str | None,
    *,
    stop: Callable[[], None],
    close: Callable[[], None],
    max_import_bytes: int = 0,
) -> FastAPI:
    """Return the part of all applications: limits, errors, ``/health``, ``/metrics`` and ``/v1/models``.

    The server calls ``stop`` before it waits for its responses to finish, and ``close`` after that.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Each request that reads text occupies a thread, and the guard limits their number.
        to_thread.current_default_thread_limiter().total_tokens = limits.max_concurrent_requests + 8
        yield
        await to_thread.run_sync(close)

    # Without FastAPI's documentation pages, which load scripts from other sites.
    app = FastAPI(title="memtx", version=memtx.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.stop, app.state.model_name, app.state.limits = stop, model_name, limits
    errors.add_exception_handlers(app)
    app.add_middleware(
        GuardMiddleware, limits=limits, metrics=metrics, api_key=api_key, max_import_bytes=max_import_bytes
    )
    app.include_router(routes.models_router)

    @app.get("/health")
    def health() -> dict[str, str]:
        """Return the status of the server."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    def get_metrics() -> Response:
        """Return the metrics in Prometheus's text format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def serve(app: FastAPI, *, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then save the sessions.

    Args:
        app: Application of :func:`create_app` or :func:`create_task_app`.
        host: Address to listen on.
        port: Port to listen on; 0 for any free one.
        on_ready: Called with the server's URL when it listens.

    Raises:
        MemtxError: The address or port cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=512)
        # The event loop sets it for its own sockets only. Without it, the body of a response waits until the client
        # has confirmed the headers: 40 ms on Linux.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise MemtxError(f"Cannot listen on {host}:{port}: {error.strerror}.", "Try another --port.") from error
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_TIMEOUT)
    on_ready(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")
    _limit_arenas()
    # The kernel accepts connections from here on, and they are answered as soon as the loop runs.
    _Server(config, app.state.stop).run(sockets=[listener])


MAX_ARENAS = 2
"""Heaps of the C library while serving."""


def _limit_arenas() -> None:
    """Let threads share heaps, because by default glibc gives each one a heap of its own that keeps freed memory.

    With 64 sessions for three minutes, memory grew by 1.1% instead of 2.8% after the first one, at the same speed.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have no heaps per thread
        if mallopt is not None:
            mallopt(-8, MAX_ARENAS)  # M_ARENA_MAX


class _Server(uvicorn.Server):
    """Server that stops reading and generating before it waits for its responses, so that they end with an error."""

    def __init__(self, config: uvicorn.Config, on_shutdown: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_shutdown = on_shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await to_thread.run_sync(self._on_shutdown)
        await super().shutdown(sockets)

"""The application: routes, limits and errors put together, and the server that runs it."""

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
from memtx.serving import completions, errors, predictions, routes, sessions
from memtx.serving.limits import GuardMiddleware, Limits
from memtx.serving.metrics import Metrics, PoolMetrics

SESSION_FILE_OVERHEAD = 1 << 20
"""Bytes of a session's file beside its state, at most: its header and the text that waits."""

SHUTDOWN_TIMEOUT = 10
"""Seconds that answers have to end after SIGTERM; then they are cut and the sessions are saved."""


def create_app(
    pool: SessionPool, *, model_name: str, limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """Return the application; when it shuts down it closes the pool, which saves every session.

    Args:
        pool: what reads and makes.
        model_name: the model's, as clients call it.
        limits: to be kept.
        api_key: that clients must show; None for none, and for this machine's own clients only.
    """
    limits, metrics = limits or Limits(), PoolMetrics(pool)
    app = _create_base_app(model_name, limits, metrics, on_shutdown=pool.close)
    app.state.stop = pool.engine.close
    answers = completions.CompletionService(pool, model_name, limits, metrics)
    app.include_router(completions.build_completions_router(answers))
    app.include_router(sessions.build_sessions_router(pool, answers))
    app.include_router(
        routes.build_rejecting_router(("/v1/predict",), "This model goes on with texts.", "Ask /v1/completions.")
    )

    content = resources.files("memtx.serving").joinpath("page/index.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(
            content, headers={"Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:"}
        )

    app.add_middleware(
        GuardMiddleware,
        limits=limits,
        metrics=metrics,
        api_key=api_key,
        max_import_bytes=pool.session_bytes + SESSION_FILE_OVERHEAD,
    )
    return app


def create_task_app(
    predictor: BasePredictor, *, model_name: str, limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """Return the application that serves a task's model.

    Args:
        predictor: what answers.
        model_name: the model's, as clients call it.
        limits: to be kept.
        api_key: that clients must show; None for none, and for this machine's own clients only.
    """
    limits, metrics = limits or Limits(), Metrics()
    app = _create_base_app(model_name, limits, metrics, on_shutdown=predictor.close)
    app.state.stop = predictor.close
    app.include_router(predictions.build_predict_router(predictor, model_name, limits, metrics))
    others = ("/v1/completions", "/v1/sessions", "/v1/sessions/{rest:path}")
    app.include_router(
        routes.build_rejecting_router(others, f"This model does {predictor.task_name}.", "Ask /v1/predict.")
    )
    app.add_middleware(GuardMiddleware, limits=limits, metrics=metrics, api_key=api_key)
    return app


def _create_base_app(model_name: str, limits: Limits, metrics: Metrics, on_shutdown: Callable[[], None]) -> FastAPI:
    """Return what all servers have: one form of errors, ``/health``, ``/metrics`` and ``/v1/models``."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A request that reads holds a thread, and the guard lets no more of them in.
        to_thread.current_default_thread_limiter().total_tokens = limits.max_concurrent_requests + 8
        yield
        await to_thread.run_sync(on_shutdown)

    # The pages that FastAPI offers load scripts from elsewhere.
    app = FastAPI(title="memtx", version=memtx.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    errors.add_exception_handlers(app)
    app.include_router(routes.build_models_router(model_name))

    @app.get("/health")
    def health() -> dict[str, str]:
        """Say that the server is there."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    def get_metrics() -> Response:
        """Return the counters in Prometheus's text format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def serve(app: FastAPI, *, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; the sessions are saved by then.

    Args:
        app: of :func:`create_app`.
        host: the address to listen on.
        port: likewise; 0 for any free one.
        on_ready: is told the server's address once it listens.

    Raises:
        MemtxError: the address cannot be listened on.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=512)
        # The event loop does so itself, but not for the connections of a socket that it is handed. Without it an
        # answer's body waits until the client confirms the head: 40 ms on Linux.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise MemtxError(f"{host}:{port} cannot be listened on: {error.strerror}.", "Try another --port.") from error
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_TIMEOUT)
    shown = f"[{host}]" if ":" in host else host
    on_ready(f"http://{shown}:{listening.getsockname()[1]}")
    _limit_arenas()
    # Connections are taken in by the kernel from here on, and answered as soon as the loop runs.
    _Server(config, app.state.stop).run(sockets=[listening])


MAX_ARENAS = 2
"""Heaps of the C library's allocator while serving."""


def _limit_arenas() -> None:
    """Let threads share heaps: by default each of the many that answer gets one, and keeps what was freed in it.

    64 sessions for three minutes: after the first, memory grew by 1.1% instead of 2.8%, at the same speed.
    """
    if not sys.platform.startswith("linux"):
        return
    setting = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; others have no heap a thread
    if setting is not None:
        setting(-8, MAX_ARENAS)  # M_ARENA_MAX


class _Server(uvicorn.Server):
    """Ends what is being read and made before it waits for its answers to end: they say so, and are not cut off."""

    def __init__(self, config: uvicorn.Config, on_shutdown: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_shutdown = on_shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await to_thread.run_sync(self._on_shutdown)
        await super().shutdown(sockets)

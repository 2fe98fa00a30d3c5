"""The application with its routes, limits and errors, and the server that runs it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

import uvicorn
from anyio import to_thread
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse

import memtx
from memtx.errors import MemtxError
from memtx.inference.chat_template import ChatTemplate
from memtx.inference.predictor import BasePredictor
from memtx.inference.sessions.pool import SessionPool
from memtx.inference.text_to_text import TextToText
from memtx.models.beam_search import check_max_length
from memtx.ops.cpu.malloc import limit_arenas
from memtx.serving import chat, completions, sessions
from memtx.serving.errors import APIError, add_exception_handlers, check_model, to_api_error
from memtx.serving.limits import Deadline, GuardMiddleware, Limits
from memtx.serving.metrics import Metrics, PoolMetrics
from memtx.serving.schemas import PredictBody

SESSION_FILE_OVERHEAD = 1 << 20
"""Maximum bytes of a session file without its state: the header and unread text."""

MAX_ARENAS = 2
"""Maximum malloc arenas: with 64 sessions, memory grew by 1.1% after the first of three minutes, not by 2.8%."""

SHUTDOWN_TIMEOUT = 10
"""Seconds that responses have to finish after SIGTERM, before they are cut and the sessions are saved."""

models_router, predict_router = APIRouter(), APIRouter()


def _describe_model(request: Request) -> dict[str, Any]:
    return {"id": request.app.state.model_name, "object": "model", "created": 0, "owned_by": "memtx"}


@models_router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List the model."""
    return {"object": "list", "data": [_describe_model(request)]}


@models_router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """Describe the model."""
    check_model(name, request.app.state.model_name)
    return _describe_model(request)


@predict_router.post("/v1/predict")
def predict(body: PredictBody, request: Request, deadline: Deadline) -> dict[str, Any]:
    """Predict for ``input``: a text, an object with the fields of an example, or a list of these."""
    state = request.app.state
    if body.model is not None:
        check_model(body.model, state.model_name)
    inputs, max_inputs = body.inputs(), state.limits.max_inputs
    if not inputs:
        raise APIError(400, "The input is an empty list.", "Give a text.", param="input")
    if len(inputs) > max_inputs:
        message = f"The number of inputs ({len(inputs)}) must be at most {max_inputs}."
        raise APIError(400, message, "Send fewer per request.", param="input")
    options = _generation_options(body, state)
    try:
        predictions = state.predictor.predict(inputs, deadline=deadline, **options)
    except MemtxError as error:
        api_error = to_api_error(error)
        if api_error.status_code == 400:
            api_error.param = "input"
        raise api_error from error
    data = [{"index": index, **prediction} for index, prediction in enumerate(predictions)]
    return {"object": "list", "model": state.model_name, "task": state.predictor.task_name, "data": data}


def _generation_options(body: PredictBody, state: Any) -> dict[str, Any]:
    """Return the options of generation for the predictor; raises APIError for one that it does not take."""
    if not (values := body.generation_options()):
        return {}
    name, predictor, max_beams = next(iter(values)), state.predictor, state.limits.max_choices
    if not isinstance(predictor, TextToText):
        message = f"{name} is for encoder-decoders; this model predicts {predictor.task_name} without it."
        raise APIError(400, message, f"Remove {name}.", param=name)
    if (num_beams := values.get("num_beams", 1)) > max_beams:
        raise APIError(400, f"num_beams ({num_beams}) must be at most {max_beams}.", "Lower it.", param="num_beams")
    try:
        generation = predictor.generation.changed(**values)
        check_max_length(predictor.model, generation.search)
    except MemtxError as error:
        api_error = to_api_error(error)
        api_error.param = next((name for name in values if error.message.startswith(name)), name)
        raise api_error from error
    return {"generation": generation}


def _reject_paths(app: FastAPI, paths: tuple[str, ...], message: str, hint: str) -> None:
    """Reject all requests to the paths of the other kind of model."""

    async def reject() -> None:
        raise APIError(400, message, hint, code="unsupported_endpoint")

    for path in paths:
        app.add_api_route(path, reject, methods=["GET", "POST"], include_in_schema=False)


def create_app(
    pool: SessionPool,
    *,
    model_name: str,
    limits: Limits | None = None,
    api_key: str | None = None,
    chat_template: ChatTemplate | None = None,
) -> FastAPI:
    """Return the application of a language model. Its shutdown closes the pool, which saves every session.

    ``model_name`` is the model's name in requests, ``limits`` defaults to ``Limits()``, and ``api_key`` is the key that
    clients must send; None disables it and restricts access to this machine. Without ``chat_template``, requests for
    chat are rejected.
    """
    limits, metrics = limits or Limits(), PoolMetrics(pool)
    app = _create_base_app(model_name, limits, metrics, stop=pool.engine.close, close=pool.close)
    max_bytes = pool.session_bytes + SESSION_FILE_OVERHEAD
    app.add_middleware(GuardMiddleware, limits=limits, metrics=metrics, api_key=api_key, max_import_bytes=max_bytes)
    app.state.service = completions.CompletionService(pool, model_name, limits, metrics, chat_template)
    app.include_router(completions.router)
    app.include_router(chat.router)
    app.include_router(sessions.router)
    _reject_paths(app, ("/v1/predict",), "This model continues texts.", "Use /v1/completions.")
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
    limits, metrics = limits or Limits(), Metrics(lambda: predictor.num_tokens_read)
    app = _create_base_app(model_name, limits, metrics, stop=predictor.close, close=predictor.close)
    app.add_middleware(GuardMiddleware, limits=limits, metrics=metrics, api_key=api_key)
    app.state.predictor = predictor
    app.include_router(predict_router)
    paths = ("/v1/completions", "/v1/chat/completions", "/v1/sessions", "/v1/sessions/{rest:path}")
    _reject_paths(app, paths, f"This model does {predictor.task_name}.", "Use /v1/predict.")
    return app


def _create_base_app(
    model_name: str, limits: Limits, metrics: Metrics, stop: Callable[[], None], close: Callable[[], None]
) -> FastAPI:
    """Return the common part of the applications: errors, ``/health``, ``/metrics`` and ``/v1/models``.

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
    add_exception_handlers(app)
    app.include_router(models_router)

    describe = app.openapi

    def describe_with_model() -> dict[str, Any]:
        description = describe()
        for schema in description["components"]["schemas"].values():
            if (field := schema.get("properties", {}).get("model")) is not None:
                field |= {"enum": [model_name], "example": model_name}
        return description

    app.openapi = describe_with_model  # type: ignore[method-assign]

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
    """Serve until SIGTERM or Ctrl-C, then save the sessions; raises MemtxError if the address or port cannot be used.

    Port 0 selects any free port. ``on_ready`` is called with the server's URL when it listens.
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
    limit_arenas(MAX_ARENAS)
    # The kernel accepts connections from here on, and they are answered as soon as the loop runs.
    _Server(config, app.state.stop).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Server that stops reading and generating before it waits for its responses, so that they end with an error."""

    def __init__(self, config: uvicorn.Config, on_shutdown: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_shutdown = on_shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await to_thread.run_sync(self._on_shutdown)
        await super().shutdown(sockets)

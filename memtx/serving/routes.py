"""``/v1/models``, ``/v1/predict``, and the routes that reject requests for the other kind of model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from memtx.errors import MemtxError
from memtx.serving.errors import APIError, to_api_error
from memtx.serving.limits import Deadline
from memtx.serving.schemas import PredictBody

models_router = APIRouter()
predict_router = APIRouter()


def check_model(requested: str, model_name: str) -> None:
    """Raise unless a request names the model that is served."""
    if requested != model_name:
        message = f"There is no model '{requested[:80]}', only '{model_name}'."
        raise APIError(404, message, "GET /v1/models lists it.", param="model")


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
    try:
        predictions = state.predictor.predict(inputs, deadline=deadline)
    except MemtxError as error:
        api_error = to_api_error(error)
        if api_error.status_code == 400:
            api_error.param = "input"
        raise api_error from error
    data = [{"index": index, **prediction} for index, prediction in enumerate(predictions)]
    return {"object": "list", "model": state.model_name, "task": state.predictor.task_name, "data": data}


def build_rejecting_router(paths: tuple[str, ...], message: str, hint: str) -> APIRouter:
    """Return routes that reject all requests with a message about the kind of the model."""
    router = APIRouter()

    async def reject() -> None:
        raise APIError(400, message, hint, code="unsupported_endpoint")

    for path in paths:
        router.add_api_route(path, reject, methods=["GET", "POST"], include_in_schema=False)
    return router

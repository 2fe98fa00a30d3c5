"""``/v1/predict``: labels, tags or answers of raw texts, one or many at a time."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from memtx.errors import MemtxError
from memtx.inference.predictor import BasePredictor
from memtx.serving.errors import APIError, to_api_error
from memtx.serving.limits import Limits, get_deadline
from memtx.serving.metrics import Metrics
from memtx.serving.routes import check_model
from memtx.serving.schemas import PredictBody


def build_predict_router(predictor: BasePredictor, model_name: str, limits: Limits, metrics: Metrics) -> APIRouter:
    """Return the route.

    Args:
        predictor: answers.
        model_name: of the model.
        limits: to be kept.
        metrics: shows what was read.
    """
    routes = APIRouter()
    metrics.add_gauge("memtx_tokens_read", "Tokens read.", lambda: predictor.num_tokens_read)

    @routes.post("/v1/predict")
    def predict(body: PredictBody, request: Request) -> dict[str, Any]:
        """Say what the model makes of ``input``: a text, an object with an example's fields, or a list of such."""
        if body.model is not None:
            check_model(body.model, model_name)
        inputs = body.inputs()
        if not inputs:
            raise APIError(400, "The input is an empty list.", "Give a text.", param="input")
        if len(inputs) > limits.max_inputs:
            raise APIError(
                400,
                f"There are {len(inputs)} inputs, at most {limits.max_inputs} may be.",
                "Ask for less.",
                param="input",
            )
        try:
            said = predictor.predict(inputs, deadline=get_deadline(request))
        except MemtxError as error:
            problem = to_api_error(error)
            if problem.status_code == 400:
                problem.param = "input"
            raise problem from error
        data = [{"index": index, **one} for index, one in enumerate(said)]
        return {"object": "list", "model": model_name, "task": predictor.task_name, "data": data}

    return routes

"""``/v1/predict``: labels, tags or answers of raw texts, one or many at a time."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from memtx.errors import MemtxError
from memtx.inference.answering import Answering
from memtx.serving.limits import Limits, deadline_of
from memtx.serving.metrics import Metrics
from memtx.serving.names import check_model
from memtx.serving.problems import Problem, problem_of
from memtx.serving.schemas import PredictBody


def router(predictor: Answering, name: str, limits: Limits, metrics: Metrics) -> APIRouter:
    """Return the route.

    Args:
        predictor: answers.
        name: of the model.
        limits: to be kept.
        metrics: shows what was read.
    """
    routes = APIRouter()
    metrics.read("memtx_tokens_read", "Tokens read.", lambda: predictor.tokens_read)

    @routes.post("/v1/predict")
    def predict(body: PredictBody, request: Request) -> dict[str, Any]:
        """Say what the model makes of ``input``: a text, an object with an example's fields, or a list of such."""
        if body.model is not None:
            check_model(body.model, name)
        inputs = body.inputs()
        if not inputs:
            raise Problem(400, "The input is an empty list.", "Give a text.", param="input")
        if len(inputs) > limits.inputs:
            raise Problem(
                400, f"There are {len(inputs)} inputs, at most {limits.inputs} may be.", "Ask for less.", param="input"
            )
        try:
            said = predictor.predict(inputs, deadline=deadline_of(request))
        except MemtxError as error:
            problem = problem_of(error)
            if problem.status == 400:
                problem.param = "input"
            raise problem from error
        data = [{"index": index, **one} for index, one in enumerate(said)]
        return {"object": "list", "model": name, "task": predictor.kind, "data": data}

    return routes

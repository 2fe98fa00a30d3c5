"""``/v1/models``: what the one model is called, and what is said to requests that it is not for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from memtx.serving.errors import APIError


def check_model(requested: str, served_model: str) -> None:
    """Raise unless a request names the model that is served."""
    if requested != served_model:
        raise APIError(
            404, f"There is no model of that name, only '{served_model}'.", "GET /v1/models lists it.", param="model"
        )


def build_models_router(served_model: str) -> APIRouter:
    """Return the routes that list the one model."""
    routes = APIRouter()
    described = {"id": served_model, "object": "model", "created": 0, "owned_by": "memtx"}

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [described]}

    @routes.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        """Describe the model."""
        check_model(name, served_model)
        return described

    return routes


def build_rejecting_router(paths: tuple[str, ...], message: str, hint: str) -> APIRouter:
    """Return routes that say what kind of model this is, at addresses that are another kind's."""
    routes = APIRouter()

    async def reject() -> None:
        raise APIError(400, message, hint, code="unsupported_endpoint")

    for address in paths:
        routes.add_api_route(address, reject, methods=["GET", "POST"], include_in_schema=False)
    return routes

"""``/v1/models``: what the one model is called, and what is said to requests that it is not for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from memtx.serving.problems import Problem


def check_model(name: str, own: str) -> None:
    """Raise unless a request names the model that is served."""
    if name != own:
        raise Problem(404, f"There is no model of that name, only '{own}'.", "GET /v1/models lists it.", param="model")


def router(own: str) -> APIRouter:
    """Return the routes that list the one model."""
    routes = APIRouter()
    described = {"id": own, "object": "model", "created": 0, "owned_by": "memtx"}

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [described]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Describe the model."""
        check_model(name, own)
        return described

    return routes


def refusing(addresses: tuple[str, ...], what: str, cure: str) -> APIRouter:
    """Return routes that say what kind of model this is, at addresses that are another kind's."""
    routes = APIRouter()

    async def refuse() -> None:
        raise Problem(400, what, cure, code="wrong_kind_of_model")

    for address in addresses:
        routes.add_api_route(address, refuse, methods=["GET", "POST"], include_in_schema=False)
    return routes

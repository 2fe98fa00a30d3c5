"""Error responses: one JSON object with message and hint for every error, never a traceback."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from memtx.errors import MemtxError, closest_match
from memtx.inference.deadline import ClosedError, DeadlineExceededError
from memtx.inference.sessions.registry import SessionLimitError, SessionNotFoundError
from memtx.inference.sessions.store import SessionSaveError

logger = logging.getLogger("memtx.serving")

# By status code: headers of the response, the type in its body, and the default error code. A full server asks clients
# to retry after 5 seconds; after a timeout, OpenAI clients would retry a request that would take as long again.
_RETRY = {"Retry-After": "5"}
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: {"x-should-retry": "false"}, 429: _RETRY, 503: _RETRY}
_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_DEFAULT_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}

_ERROR_STATUS: tuple[tuple[type[MemtxError], int, str], ...] = (
    (SessionNotFoundError, 404, "session_not_found"),
    (SessionLimitError, 429, "session_limit_reached"),
    (DeadlineExceededError, 408, "deadline_exceeded"),
    (ClosedError, 503, "shutting_down"),
    (SessionSaveError, 507, "session_save_failed"),
)


MAX_VALUE_LENGTH = 60
"""Characters of a value in a message."""

# By pydantic's error types and constraints: the JSON type or the limit that a value was expected to have.
_JSON_TYPES = {
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "an object"),
    "string_type": "a text",
    "list_type": "a list",
    "none_required": "null",
}
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "expected": "one of"}
_LIMITS |= {"min_length": "at least", "max_length": "at most"}
# The location of an error holds field names and, for a field with several types, pydantic's names of the types.
_FIELD_NAME = re.compile(r"(?!(?:str|int|float|bool|dict|none)$)[a-z_]+")


class APIError(MemtxError):
    """Rejected request; ``code`` is for programs and defaults to that of the status, ``param`` is the invalid field."""

    def __init__(
        self, status_code: int, message: str, hint: str = "", *, code: str = "", param: str | None = None
    ) -> None:
        super().__init__(message, hint)
        self.status_code, self.param = status_code, param
        self.code = code or _DEFAULT_CODES.get(status_code, "invalid_request")


def check_model(requested: str, model_name: str) -> None:
    """Raise APIError unless a request names the served model."""
    if requested != model_name:
        message = f"There is no model '{requested[:80]}', only '{model_name}'."
        raise APIError(404, message, "GET /v1/models lists it.", code="model_not_found", param="model")


def _from_validation_error(error: RequestValidationError) -> APIError:
    errors = error.errors()
    details = next((entry for entry in errors if entry["type"] in ("extra_forbidden", "json_invalid")), errors[0])
    if details["type"] == "extra_forbidden":
        name, fields = str(details["ctx"]["name"]), details["ctx"]["known"]
        message = f"'{name}' is not a field of this request.{closest_match(name, fields)}"
        return APIError(400, message, f"Remove it; the fields are {', '.join(fields)}.", param=name)
    if details["type"] == "json_invalid":
        reason = f"{details.get('ctx', {}).get('error', 'invalid')} at character {details['loc'][-1]}"
        return APIError(400, f"The body is not JSON: {reason}.", "Send one JSON object.")
    # The deepest error of a field with several types is that of the type which the value was meant to have.
    branches = [entry for entry in errors if entry["loc"][1:2] == details["loc"][1:2]]
    depth = max(len(entry["loc"]) for entry in branches)
    branches = [entry for entry in branches if len(entry["loc"]) == depth]
    location = [part for part in branches[0]["loc"][1:] if isinstance(part, int) or _FIELD_NAME.fullmatch(part)]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    param = branches[0].get("ctx", {}).get("param") or (str(location[0]) if location else None)
    return APIError(400, _describe_mismatch(name or "The body", branches), "See /openapi.json.", param=param)


def _describe_mismatch(name: str, branches: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on a value that has none of the expected types, or is out of range."""
    details = next((entry for entry in branches if entry["type"] not in _JSON_TYPES), branches[0])
    if details["type"] == "value_error":
        return f"{str(details['msg']).removeprefix('Value error, ')}."
    if details["type"] == "missing":
        return f"{name} is missing."
    value = json.dumps(details["input"], ensure_ascii=False, default=lambda _: "...")
    value = value.encode("utf-8", "replace").decode()
    preview = value if len(value) <= MAX_VALUE_LENGTH else f"{value[:MAX_VALUE_LENGTH]}..."
    limits = [f"{text} {details.get('ctx', {})[key]}" for key, text in _LIMITS.items() if key in details.get("ctx", {})]
    if limits and details["type"] in ("too_long", "too_short", "string_too_long", "string_too_short"):
        unit = "characters" if isinstance(details["input"], str) else "entries"
        return f"{name} has {len(details['input'])} {unit}, expected {limits[0]}."
    expected = limits or list(dict.fromkeys(_JSON_TYPES.get(entry["type"], "another value") for entry in branches))
    return f"{name} is {preview}, expected {' or '.join(expected)}."


def to_api_error(error: BaseException) -> APIError:
    """Return the APIError for any error; an internal error is logged and its text is not shown to the client."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, MemtxError):
        for error_class, status, code in _ERROR_STATUS:
            if isinstance(error, error_class):
                return APIError(status, error.message, error.hint, code=code)
        return APIError(400, error.message, error.hint)
    if isinstance(error, RequestValidationError):
        return _from_validation_error(error)
    if isinstance(error, HTTPException):
        messages = {
            400: "The body is not JSON.",
            404: "There is nothing at this path.",
            405: "This path does not support the method.",
        }
        return APIError(error.status_code, messages.get(error.status_code, str(error.detail)), "See /openapi.json.")
    logger.error("a request failed", exc_info=error)
    hint = "See the server's log for the cause; sessions are unchanged."
    return APIError(500, "Internal server error.", hint, code="server_error")


def error_body(error: APIError) -> dict[str, Any]:
    """Return the JSON of an error in the format of OpenAI clients."""
    default_type = "invalid_request_error" if error.status_code < 500 else "server_error"
    fields = {"message": str(error), "type": _ERROR_TYPES.get(error.status_code, default_type), "param": error.param}
    return {"error": fields | {"code": error.code, "detail": error.message, "hint": error.hint}}


def error_response(error: APIError) -> JSONResponse:
    """Return the response for an error."""
    return JSONResponse(error_body(error), error.status_code, _HEADERS.get(error.status_code))


def add_exception_handlers(app: FastAPI) -> None:
    """Make an application return all errors in one format."""

    async def handle_error(_: Request, error: Exception) -> JSONResponse:
        response = error_response(to_api_error(error))
        response.headers.update(getattr(error, "headers", None) or {})
        return response

    for error_class in (MemtxError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(error_class, handle_error)

"""Fields of a JSON object, checked as they are read; errors name the field and its value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from memtx.errors import DataError, closest_match

MAX_PREVIEW_LENGTH = 60  # characters of a value in a message


def parse_record(line: bytes) -> Mapping[str, Any]:
    """Return the JSON object of a line; raises DataError."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"Not UTF-8: {error.reason} at byte {error.start}.", "Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at character {error.pos + 1}"
        raise DataError(f"Not JSON: {reason}.", "Give one whole JSON object a line.") from error
    if not isinstance(record, dict):
        raise DataError(f"A {type(record).__name__}, expected a JSON object.", "Give one object a line.")
    return record


def preview(value: object) -> str:
    """Return a value as short JSON for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_PREVIEW_LENGTH else text[: MAX_PREVIEW_LENGTH - 4] + " ..."


def missing_field(record: Mapping[str, Any], name: str) -> DataError:
    """Return the error of a field that is not there."""
    return DataError(
        f"There is no '{name}'.{closest_match(name, map(str, record))}", f"The fields are {preview(list(record))}."
    )


def get_text(record: Mapping[str, Any], name: str) -> str:
    """Return a text that is not empty; raises DataError."""
    if name not in record:
        raise missing_field(record, name)
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"'{name}' is {preview(value)}, expected a text.", "Give a text that is not empty.")
    return value


def get_label(record: Mapping[str, Any], labelled: bool) -> str | None:
    """Return the label, an integer as text; None without one unless ``labelled``. Raises DataError."""
    value = record.get("label")
    if not labelled and value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return get_text(record, "label")


def check_list(value: Any, name: str) -> list[Any]:
    """Return a list; raises DataError for another value of the field ``name``."""
    if not isinstance(value, list):
        raise DataError(f"'{name}' is {preview(value)}, expected a list.", "Write it in brackets.")
    return value


def get_texts(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a list of texts that are not empty; raises DataError."""
    if name not in record:
        raise missing_field(record, name)
    values = check_list(record[name], name)
    for index, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{name}[{index}] is {preview(value)}, expected a text.", "Change or remove it.")
    return tuple(values)

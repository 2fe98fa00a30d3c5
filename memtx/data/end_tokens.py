"""End tokens and stop strings of a published folder: where its files say that a text ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memtx import files
from memtx.errors import DataError

ID_FILES = ("generation_config.json", "config.json", "tokenizer_config.json")
"""Files whose ``eos_token_id`` is a number or a list of numbers."""

SPELLING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Files whose ``eos_token`` is a spelling, or an object with a spelling as ``content``."""


def read_eos_token_ids(folder: Path, vocabulary: Mapping[str, int]) -> frozenset[int]:
    """Return the ids at which generation stops, by all files of a folder; empty if it names none.

    ``vocabulary`` maps spellings to ids. A negative id stands for none.

    Raises DataError if a file names an end token that is no id and no spelling.
    """
    ids: set[int] = set()
    for name in ID_FILES:
        for config in _read_configs(folder / name):
            for value in _to_list(config.get("eos_token_id")):
                if isinstance(value, bool) or not isinstance(value, int):
                    raise _invalid(folder / name, "eos_token_id", value, "an id or a list of ids")
                if value >= 0:
                    ids.add(value)
    for name in SPELLING_FILES:
        for config in _read_configs(folder / name):
            for value in _to_list(config.get("eos_token")):
                spelling = value.get("content") if isinstance(value, Mapping) else value
                if not isinstance(spelling, str):
                    raise _invalid(folder / name, "eos_token", value, "a token's spelling")
                if spelling in vocabulary:
                    ids.add(vocabulary[spelling])
    return frozenset(ids)


def read_stop_strings(folder: Path) -> tuple[str, ...]:
    """Return the ``stop_strings`` of generation_config.json, at which generation stops.

    Raises DataError if they are not strings with at least one character.
    """
    path, strings = folder / ID_FILES[0], list[str]()
    for config in _read_configs(path):
        for value in _to_list(config.get("stop_strings")):
            if not isinstance(value, str) or not value:
                raise _invalid(path, "stop_strings", value, "a string or a list of strings")
            strings.append(value)
    return tuple(dict.fromkeys(strings))


def _read_configs(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the object in a file, if it exists, and that of its text model, as multimodal models have it."""
    config = files.read_json(path) if path.is_file() else None
    for value in (config, config.get("text_config") if isinstance(config, Mapping) else None):
        if isinstance(value, Mapping):
            yield value


def _to_list(value: Any) -> list[Any]:
    """Return a value as a list: empty for None."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _invalid(path: Path, key: str, value: Any, expected: str) -> DataError:
    return DataError(f"'{path}' has {key} = {value!r}, expected {expected}.", "Restore the file.")

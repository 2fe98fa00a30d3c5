"""A run's YAML, read before the parser sees it: what is mistyped is named by file, whole key and nearest valid key.

The parser alone names the last part of a key only, and for a choice of types whichever it tried last.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from memtx.cli.options import MAX_MESSAGE_LENGTH, shorten_message
from memtx.errors import MemtxError, closest_match

CLASS_CONFIG_KEYS = ("class_path", "init_args", "dict_kwargs")

LINKED_KEYS = {"model.segment_length": "data.segment_length", "model.vocab_size": "data.tokenizer"}
"""Keys that follow from another one."""

MAX_VALUE_LENGTH = 80
"""Characters of a value shown in a message."""


def find_config_files(argv: list[str]) -> list[str]:
    """Return what ``--config`` or ``-c`` names, in order."""
    found = [value for name, value in itertools.pairwise(argv) if name in ("--config", "-c")]
    return found + [one.partition("=")[2] for one in argv if one.startswith("--config=")]


def read_config(path: str) -> dict[str, Any]:
    """Read one config.

    Raises:
        MemtxError: missing, not UTF-8, not YAML, or not a mapping of keys.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        folder = Path(path).parent
        others = sorted(str(file) for file in folder.glob("*.y*ml")) if folder.is_dir() else []
        raise MemtxError(
            f"The config '{path}' does not exist.{closest_match(path, others)}", "Check --config."
        ) from error
    except UnicodeDecodeError as error:
        raise MemtxError(
            f"The config '{path}' is not UTF-8: {error.reason} at byte {error.start}.", "Save it as UTF-8."
        ) from error
    except OSError as error:
        raise MemtxError(f"The config '{path}' cannot be read: {error.strerror}.", "Check --config.") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error)
        raise MemtxError(f"'{path}'{where}: not YAML: {what}.", "Look at that line and the one before it.") from error
    if not isinstance(content, dict):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise MemtxError(f"The config '{path}' holds {kind}, expected keys such as data, model and trainer.")
    return content


def check_config(path: str, config: Mapping[str, Any], known_keys: Iterable[str]) -> None:
    """Refuse keys that do not exist and classes that cannot be found.

    Args:
        path: the file, for messages.
        config: what :func:`read_config` returned.
        known_keys: all dotted keys that the parser takes.

    Raises:
        MemtxError: names file, key and nearest key.
    """
    keys = {one for one in known_keys if one.rpartition(".")[2] not in ("help", "print_config", "==SUPPRESS==")}
    _check_keys(f"'{path}'", config, "", sorted(keys))


def _check_keys(location: str, config: Mapping[str, Any], prefix: str, known_keys: list[str]) -> None:
    for name, inner in config.items():
        key = f"{prefix}{name}"
        if key in LINKED_KEYS:
            # The parser would take it and go by the other without a word.
            raise MemtxError(f"{location}: '{key}' follows from '{LINKED_KEYS[key]}'.", "Set that instead.")
        if any(one.startswith(f"{key}.") for one in known_keys):
            if isinstance(inner, Mapping):
                _check_keys(location, inner, f"{key}.", known_keys)
        elif key in known_keys:
            _check_class_config(location, inner, key)
        else:
            siblings = {one.removeprefix(prefix).partition(".")[0] for one in known_keys if one.startswith(prefix)}
            raise MemtxError(f"{location}: there is no key '{key}'.{_suggest_key(str(name), siblings, known_keys)}")


def _suggest_key(name: str, siblings: Iterable[str], known_keys: Iterable[str]) -> str:
    """Return the hint for a sibling, else for the same name in another place, else the list of siblings."""
    siblings = sorted(siblings)
    if hint := closest_match(name, siblings):
        return hint
    elsewhere = [one for one in known_keys if one.rpartition(".")[2] == name]
    if elsewhere:
        return f" Did you mean '{elsewhere[0]}'?"
    return f" Valid there: {_truncate(', '.join(siblings), 200)}." if siblings else ""


def _check_class_config(location: str, value: Any, key: str) -> None:
    if isinstance(value, list):
        for index, one in enumerate(value):
            _check_class_config(location, one, f"{key}.{index}")
    if not isinstance(value, Mapping) or not isinstance(class_path := value.get("class_path"), str):
        if isinstance(value, str) and re.fullmatch(r"(memtx|torch)(\.\w+)*\.[A-Z]\w*", value):
            _resolve_class(location, value, key)
        return
    for name in value:
        if name not in CLASS_CONFIG_KEYS:
            raise MemtxError(
                f"{location}: there is no key '{key}.{name}'.{closest_match(str(name), CLASS_CONFIG_KEYS)}",
                "Beside class_path stands init_args alone.",
            )
    # A short name (LearningRateMonitor) is looked up by the parser, which knows what is expected there.
    part = _resolve_class(location, class_path, f"{key}.class_path") if "." in class_path else None
    arguments = value.get("init_args")
    if not isinstance(arguments, Mapping):
        return
    names, open_ended = _get_parameter_names(part) if part is not None else (set(), True)
    for name, inner in arguments.items():
        own = f"{key}.init_args.{name}"
        if name not in names and not open_ended:
            raise MemtxError(f"{location}: there is no key '{own}' ({class_path}).{_suggest_key(str(name), names, ())}")
        _check_class_config(location, inner, own)


def _resolve_class(location: str, class_path: str, key: str) -> Any:
    found = find_class(class_path)
    if isinstance(found, str):
        raise MemtxError(f"{location}: '{key}' names '{class_path}', which {found}")
    return found


def find_class(class_path: str) -> Any:
    """Import what a class path names.

    Returns:
        The class or function; where there is none, the end of a sentence that says why (a str).
    """
    module_name, _, name = class_path.rpartition(".")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        return "belongs to Python itself and is no part of a model."
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        above, _, last = missing.rpartition(".")
        if not module_name.startswith(missing):
            return f"needs '{missing}', which is not installed."
        names: list[str] = []
        if above:
            import pkgutil

            names = [one.name for one in pkgutil.iter_modules(getattr(importlib.import_module(above), "__path__", ()))]
        hint = closest_match(last, names)
        return f"is in no module: there is no '{missing}'.{hint or ' Is its folder in PYTHONPATH?' * (not above)}"
    except (ImportError, SyntaxError) as error:
        return f"cannot be imported: {error}."
    found = getattr(module, name, None)
    if str(getattr(found, "__module__", "")).partition(".")[0] in sys.stdlib_module_names:
        # os.system is callable with a number, as a memory is: it would run.
        return "belongs to Python itself and is no part of a model."
    return f"does not exist.{closest_match(name, dir(module))}" if found is None else found


def _get_parameter_names(target: Any) -> tuple[set[str], bool]:
    """Return the names that a class or function takes, and whether it takes others as well."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return set(), True
    return {one.name for one in parameters}, any(one.kind is one.VAR_KEYWORD for one in parameters)


def _truncate(value: object, max_length: int = MAX_VALUE_LENGTH) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= max_length else text[: max_length - 4] + " ..."


def _walk_config(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its value, from the outside in."""
    if key:
        yield key, value
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        yield from _walk_config(inner, f"{key}.{name}" if key else str(name))


_PARSER_KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)', re.S)
_ACTUAL_VALUE = re.compile(r"(?:Got value|Given value): (.*?)\s*$", re.S)
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
_EXPECTED_TYPE = re.compile(r"Expected an? (.+?)(?:\. Got value|$)", re.M)
_MISSING_MODULE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'|No module named '([\w.]+)'")
_UNKNOWN_OPTION = re.compile(r"Option '([^']+)' is not accepted")


def format_parser_error(message: str, configs: Mapping[str, Mapping[str, Any]], known_keys: Iterable[str]) -> str:
    """Make one line of what jsonargparse wrote: the whole key, the value met, what was expected.

    Args:
        message: of any number of lines.
        configs: the contents of the config files by name, to say which of them is meant.
        known_keys: the keys that are valid, for the nearest one.
    """
    if found := _UNKNOWN_OPTION.search(message):
        where, key, _ = _locate_key(found[1], None, configs)
        near = shorten_message(message, known_keys).partition("is not accepted")[2].lstrip(". ")
        return f"{where}there is no key '{key}'. {near}".strip()
    if not (found := _PARSER_KEY.search(message)):
        return shorten_message(message, known_keys)
    name, body = found[1], found[2]
    given = _ACTUAL_VALUE.search(body)
    where, key, value = _locate_key(name, given[1] if given else None, configs)
    if missing := _MISSING_MODULE.search(body):
        path = f"{missing[1]}.{missing[2]}" if missing[1] else missing[3]
        reason = find_class(path) if "." in path else "does not exist."
        return f"{where}'{key}' names '{path}', which {reason if isinstance(reason, str) else 'cannot be used there.'}"
    types = _SUBTYPES.search(body)
    expected = _format_types(types[1]) if types else " or ".join(map(_format_types, _EXPECTED_TYPE.findall(body)))
    if expected and given:
        if isinstance(value, Mapping) and "class_path" in value:
            return f"{where}'{key}' names '{value['class_path']}', which is not {expected}."
        return f"{where}'{key}' is {_truncate(value)}, expected {_truncate(expected, MAX_MESSAGE_LENGTH // 2)}."
    return shorten_message(message, known_keys)


def _locate_key(name: str, actual: str | None, configs: Mapping[str, Mapping[str, Any]]) -> tuple[str, str, Any]:
    """Return file and whole key of a key that the parser names by its end, and the value it has."""
    for path, content in reversed(list(configs.items())):
        for key, value in _walk_config(content):
            ends = key == name or key.endswith(f".{name}")
            if ends and (actual is None or actual == str(value) or isinstance(value, Mapping | list)):
                return f"'{path}': ", key, value
    return "", name, actual


def _format_types(types: str) -> str:
    """Return the types that a parser's message names as one would write them."""
    text = re.sub(r"<class '([\w.]+)'>", lambda one: one[1].rpartition(".")[2], types)
    text = re.sub(r"(?:typing\.)?Literal\[([^\]]*)\]", r"\1", text)
    text = re.sub(r"[\w.]*Callable\[\[.*?\], ([\w.]+)(?:\[[\w.]*\])?\]", r"\1", text)
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(\w+)", r"\1", text)
    parts = [one.strip() for one in text.split(",")]
    return ", ".join(dict.fromkeys("null" if one in ("NoneType", "None") else one for one in parts))

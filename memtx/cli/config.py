"""Checks of YAML configs before parsing, because the parser's errors name neither the file nor the full key."""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from memtx.cli.errors import MAX_MESSAGE_LENGTH, shorten_message
from memtx.cli.options import decode_utf8
from memtx.errors import MemtxError, closest_match, pip_name

CONFIG_FILE = "config.yaml"
CONFIG_OPTIONS = ("--config", "-c")
DEFAULT_RUN_DIR = "runs/memtx"
CLASS_CONFIG_KEYS = ("class_path", "init_args", "dict_kwargs")

LINKED_KEYS = {"model.segment_length": "data.segment_length", "model.vocab_size": "data.tokenizer"}


def get_option_values(argv: list[str], *options: str) -> list[str]:
    """Return the values of options such as ``--config`` and ``-c``."""
    values = [value for name, value in itertools.pairwise(argv) if name in options]
    parts = (argument.partition("=") for argument in argv)
    return values + [value for name, separator, value in parts if separator and name in options]


def put_configs_first(argv: list[str]) -> list[str]:
    """Return the arguments, subcommand first, with configs before options, which the parser would let configs undo."""
    configs, others = list[str](), list[str]()
    for previous, argument in itertools.pairwise(argv):
        is_config = previous in CONFIG_OPTIONS or argument in CONFIG_OPTIONS
        is_config |= argument.startswith(tuple(f"{option}=" for option in CONFIG_OPTIONS))
        (configs if is_config else others).append(argument)
    return [*argv[:1], *configs, *others]


def add_run_config(argv: list[str]) -> list[str]:
    """Add the run's config (from ``--run_dir``, else ``--ckpt_path``) to an evaluation without ``--config``."""
    if argv[0] == "fit" or get_option_values(argv, *CONFIG_OPTIONS) or "--help" in argv or "-h" in argv:
        return argv
    options = ("--run_dir", "--ckpt_path")
    run_dir, checkpoint = (next(iter(get_option_values(argv, option)), None) for option in options)
    folders = [Path(DEFAULT_RUN_DIR if run_dir is None else run_dir)]
    if run_dir is None and checkpoint not in (None, "best", "last"):
        path = Path(str(checkpoint))
        folders = [path, path.parent, path.parent.parent]
    for folder in folders:
        if (folder / CONFIG_FILE).is_file():
            run_option = [] if run_dir is not None else ["--run_dir", str(folder)]
            return [argv[0], "--config", str(folder / CONFIG_FILE), *run_option, *argv[1:]]
    return argv


def uses_class_paths(argv: list[str]) -> bool:
    """Return True if a config names its module or data by class path, as task configs do."""
    configs = map(read_config, get_option_values(argv, *CONFIG_OPTIONS))
    parts = [config.get(key) for config in configs for key in ("model", "data")]
    return any(isinstance(part, dict) and "class_path" in part for part in parts)


class _DuplicateKeyError(yaml.MarkedYAMLError):
    pass


class _UniqueKeyLoader(yaml.SafeLoader):
    """Loader that refuses a repeated key, of which YAML would use the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                name, mark = key_node.value, key_node.start_mark
                if name in lines:
                    problem = f"the key '{name}' occurs twice, first in line {lines[name]}"
                    raise _DuplicateKeyError(problem=problem, problem_mark=mark)
                lines[name] = mark.line + 1
        return super().construct_mapping(node, deep)


def read_config(path: str) -> dict[str, Any]:
    """Read one config; raises MemtxError if it is missing, not UTF-8, not YAML, or not a mapping."""
    try:
        text = decode_utf8(Path(path).read_bytes(), f"The config '{path}'")
    except FileNotFoundError as error:
        hint = closest_match(path, sorted(map(str, Path(path).parent.glob("*.y*ml"))))
        raise MemtxError(f"The config '{path}' does not exist.{hint}", "Check --config.") from error
    except OSError as error:
        raise MemtxError(f"The config '{path}' cannot be read: {error.strerror}.", "Check --config.") from error
    try:
        config = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        if isinstance(error, _DuplicateKeyError):
            raise MemtxError(f"'{path}'{location}: {reason}.", "Remove one of them.") from error
        hint = "Indent with spaces instead of tabs." if "\\t" in reason else "Check that line and the line before it."
        raise MemtxError(f"'{path}'{location}: not YAML: {reason}.", hint) from error
    if isinstance(config, dict) and not {"class_path", "architectures", "model_type"}.isdisjoint(config):
        raise MemtxError(
            f"'{path}' is the config of a model, not of training.", "Give a file such as those in configs/."
        )
    if not isinstance(config, dict):
        kind = "nothing" if config is None else f"a {type(config).__name__}"
        raise MemtxError(f"The config '{path}' holds {kind}, expected keys such as data, model and trainer.")
    return config


def check_config(
    path: str, config: Mapping[str, Any], known_keys: Iterable[str], other_keys: Mapping[str, Iterable[str]]
) -> None:
    """Raise MemtxError if a key is not in ``known_keys`` or a class does not exist.

    Args:
        path: Config file, for messages.
        config: Content of the file.
        known_keys: Keys of the command.
        other_keys: Keys of the other commands.
    """
    known_keys = list(known_keys)
    for key, keys_of in ((key, keys_of) for key in config for keys_of in other_keys.items()):
        if key in ("fit", *other_keys) and isinstance(config[key], Mapping):
            raise MemtxError(f"'{path}' has its options under '{key}'.", "Move them to the top level of the file.")
        if key in keys_of[1] and key not in known_keys:
            raise MemtxError(f"'{path}': '{key}' is an option of memtx {keys_of[0]} only.", "Remove it.")
    keys = {key for key in known_keys if key.rpartition(".")[2] not in ("help", "print_config", "==SUPPRESS==")}
    _check_keys(f"'{path}'", config, "", sorted(keys))


def _check_keys(location: str, config: Mapping[str, Any], prefix: str, known_keys: list[str]) -> None:
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key in LINKED_KEYS:
            # The parser would accept this key and silently use the other.
            raise MemtxError(f"{location}: '{key}' follows from '{LINKED_KEYS[key]}'.", "Set that instead.")
        if any(known.startswith(f"{key}.") for known in known_keys):
            if isinstance(value, Mapping):
                _check_keys(location, value, f"{key}.", known_keys)
            elif key not in known_keys or (value is not None and not Path(str(value)).is_file()):
                names = [known for known in known_keys if known.startswith(f"{key}.")]
                hint = f"Set its keys, such as {names[0]}."
                raise MemtxError(f"{location}: '{key}' is {_truncate(value)}, expected a mapping.", hint)
        elif key in known_keys:
            _check_class_config(location, value, key)
        else:
            nested = [known.removeprefix(prefix) for known in known_keys if known.startswith(prefix)]
            siblings = {known.partition(".")[0] for known in nested}
            raise MemtxError(f"{location}: there is no key '{key}'.{_suggest_key(str(name), siblings, known_keys)}")


def _suggest_key(name: str, siblings: Iterable[str], known_keys: Iterable[str]) -> str:
    """Return the hint for the closest sibling, else for the same name elsewhere, else the list of siblings."""
    siblings = sorted(siblings)
    if hint := closest_match(name, siblings):
        return hint
    if match := next((key for key in known_keys if key.rpartition(".")[2] == name), None):
        return f" Did you mean '{match}'?"
    return f" Valid keys: {_truncate(', '.join(siblings), 200)}." if siblings else ""


def _check_class_config(location: str, value: Any, key: str) -> None:
    if isinstance(value, list):
        for index, element in enumerate(value):
            _check_class_config(location, element, f"{key}.{index}")
    if not isinstance(value, Mapping) or not isinstance(class_path := value.get("class_path"), str):
        if isinstance(value, str) and re.fullmatch(r"(memtx|torch)(\.\w+)*\.[A-Z]\w*", value):
            _resolve_class(location, value, key)
        return
    for name in value:
        if name not in CLASS_CONFIG_KEYS:
            hint = closest_match(str(name), CLASS_CONFIG_KEYS)
            raise MemtxError(f"{location}: there is no key '{key}.{name}'.{hint}", "Put arguments under init_args.")
    # The parser resolves a short name (LearningRateMonitor), because it knows the expected type.
    target = _resolve_class(location, class_path, f"{key}.class_path") if "." in class_path else None
    init_args = value.get("init_args")
    if not isinstance(init_args, Mapping):
        return
    names, takes_any = _get_parameter_names(target) if target is not None else (set(), True)
    for name, argument in init_args.items():
        argument_key = f"{key}.init_args.{name}"
        if name not in names and not takes_any:
            hint = _suggest_key(str(name), names, ())
            raise MemtxError(f"{location}: there is no key '{argument_key}' ({class_path}).{hint}")
        _check_class_config(location, argument, argument_key)


def _resolve_class(location: str, class_path: str, key: str) -> Any:
    target = find_class(class_path)
    if isinstance(target, str):
        raise MemtxError(f"{location}: '{key}' names '{class_path}', which {target}")
    return target


def find_class(class_path: str) -> Any:
    """Return the class or function at a class path, or else the reason as the end of a sentence."""
    builtin = "belongs to Python itself and cannot be part of a model."
    module_name, _, name = class_path.rpartition(".")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        return builtin
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if not module_name.startswith(missing):
            package = missing.partition(".")[0]
            return f"needs '{missing}', which is not installed. Install it: pip install {pip_name(package)}"
        parent, _, last = missing.rpartition(".")
        if not parent:
            hint = closest_match(missing, ("memtx", "torch", "lightning"))
            hint = hint or f" Install it: pip install {pip_name(missing)}, or add your module's folder to PYTHONPATH."
            return f"needs '{missing}', which is not installed.{hint}"
        siblings = pkgutil.iter_modules(getattr(importlib.import_module(parent), "__path__", ()))
        hint = closest_match(last, [sibling.name for sibling in siblings])
        return f"cannot be imported: there is no module '{missing}'.{hint}"
    except (ImportError, SyntaxError) as error:
        return f"cannot be imported: {error}."
    target = getattr(module, name, None)
    if str(getattr(target, "__module__", "")).partition(".")[0] in sys.stdlib_module_names:
        # os.system takes a number, as a memory class does, so the parser would call it.
        return builtin
    return f"does not exist.{closest_match(name, dir(module))}" if target is None else target


def _get_parameter_names(target: Any) -> tuple[set[str], bool]:
    """Return the parameter names of a class or function, and whether it accepts any others."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return set(), True
    names = {parameter.name for parameter in parameters}
    return names, any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _truncate(value: object, max_length: int = 80) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= max_length else text[: max_length - 4] + " ..."


def _walk_config(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its value, parents first."""
    if key:
        yield key, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, child in items:
        yield from _walk_config(child, f"{key}.{name}" if key else str(name))


_PARSER_KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)', re.S)
_ACTUAL_VALUE = re.compile(r"(?:Got value|Given value): (.*?)\s*$", re.S)
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
_EXPECTED_TYPE = re.compile(r"Expected an? (.+?)(?:\. Got value|$)", re.M)
_MISSING_MODULE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'|No module named '([\w.]+)'")
_UNKNOWN_OPTION = re.compile(r"Option '([^']+)' is not accepted")


def format_parser_error(message: str, configs: Mapping[str, Mapping[str, Any]], known_keys: Iterable[str]) -> str:
    """Rewrite a jsonargparse message as one line: file (from ``configs``), full key, value and expected type."""
    if match := _UNKNOWN_OPTION.search(message):
        location, key, _ = _locate_key(match[1], None, configs)
        hint = shorten_message(message, known_keys).partition("is not accepted")[2].lstrip(". ")
        return f"{location}there is no key '{key}'. {hint}".strip()
    if not (match := _PARSER_KEY.search(message)):
        return shorten_message(message, known_keys)
    name, body = match.groups()
    actual = _ACTUAL_VALUE.search(body)
    location, key, value = _locate_key(name, actual[1] if actual else None, configs)
    if missing := _MISSING_MODULE.search(body):
        class_path = f"{missing[1]}.{missing[2]}" if missing[1] else missing[3]
        target = find_class(class_path) if "." in class_path else "does not exist."
        reason = target if isinstance(target, str) else "cannot be used there."
        return f"{location}'{key}' names '{class_path}', which {reason}"
    types = _SUBTYPES.search(body)
    expected = _format_types(types[1]) if types else " or ".join(map(_format_types, _EXPECTED_TYPE.findall(body)))
    if expected and actual:
        if isinstance(value, Mapping) and "class_path" in value:
            return f"{location}'{key}' names '{value['class_path']}', which is not {expected}."
        return f"{location}'{key}' is {_truncate(value)}, expected {_truncate(expected, MAX_MESSAGE_LENGTH // 2)}."
    return shorten_message(message, known_keys)


def _locate_key(name: str, actual: str | None, configs: Mapping[str, Mapping[str, Any]]) -> tuple[str, str, Any]:
    """Return the file, full name and value of a key that the parser names by its last parts."""
    for path, config in reversed(list(configs.items())):
        for key, value in _walk_config(config):
            is_match = key == name or key.endswith(f".{name}")
            if is_match and (actual is None or actual == str(value) or isinstance(value, Mapping | list)):
                return f"'{path}': ", key, value
    return "", name, actual


def _format_types(types: str) -> str:
    """Return the types in a parser message as they are written in a config."""
    text = re.sub(r"<class '([\w.]+)'>", lambda match: match[1].rpartition(".")[2], types)
    text = re.sub(r"(?:typing\.)?Literal\[([^\]]*)\]", r"\1", text)
    text = re.sub(r"[\w.]*Callable\[\[.*?\], ([\w.]+)(?:\[[\w.]*\])?\]", r"\1", text)
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(\w+)", r"\1", text)
    names = (name.strip() for name in text.split(","))
    return ", ".join(dict.fromkeys("null" if name in ("NoneType", "None") else name for name in names))

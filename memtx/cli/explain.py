"""The smallest value that the parser refuses, with its full key, the reason and the nearest valid name.

The parser reports all types that a value could have had; the walk here follows the one that the user meant, through
classes, their arguments and lists, over the config files and the command line alike.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import itertools
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser

import memtx
from memtx.cli.config import CONFIG_OPTIONS, find_class
from memtx.errors import MemtxError, closest_match, pip_name

MAX_NAMES_LENGTH = 200
_MISSING_ARGUMENT = re.compile(r"arguments are required: ([\w.]+)|[Kk]ey ['\"]?([\w.]+)['\"]? is required")


def _alternatives(hint: Any) -> Iterator[Any]:
    """Yield the types of a union, with the class that a factory returns in place of the factory."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for alternative in args:
            yield from _alternatives(alternative)
    elif origin is typing.Annotated:
        yield from _alternatives(args[0])
    elif origin is Callable and len(args) == 2:
        yield from _alternatives(args[1])
    else:
        yield hint


def _classes(hint: Any) -> list[type]:
    origins = (typing.get_origin(alternative) or alternative for alternative in _alternatives(hint))
    # A config builds no tensors and no types of Python.
    excluded = (*sys.stdlib_module_names, "builtins")
    return [
        cls for cls in origins if isinstance(cls, type)
        and cls.__module__.partition(".")[0] not in excluded and not issubclass(cls, torch.Tensor)
    ]  # fmt: skip


def _elements(hint: Any) -> Any:
    """Return the type of the elements, if a list is allowed."""
    for alternative in _alternatives(hint):
        origin, args = typing.get_origin(alternative), typing.get_args(alternative)
        if args and inspect.isclass(origin) and origin not in (dict, type) and hasattr(origin, "__iter__"):
            return typing.Union[tuple(arg for arg in args if arg is not Ellipsis)]  # noqa: UP007 (built at run time)
    return None


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__()))


def _class_names(classes: list[type]) -> list[str]:
    for name in dir(memtx):  # public classes are imported on first use
        with contextlib.suppress(ImportError):
            getattr(memtx, name)
    found_classes = set().union(*map(_subclasses, classes))
    public = (cls for cls in found_classes if not inspect.isabstract(cls) and not cls.__name__.startswith("_"))
    # The base classes of torch and Lightning do nothing by themselves.
    return sorted({cls.__name__ for cls in public if cls not in classes or cls.__module__.startswith("memtx.")})


@cache
def _parameters(target: Any) -> dict[str, Any]:
    """Return the options of a class or function: name -> the parser's action."""
    parser = ArgumentParser(exit_on_error=False)
    with contextlib.suppress(Exception):  # a class that the parser cannot describe
        add = parser.add_class_arguments if inspect.isclass(target) else parser.add_function_arguments
        add(target, fail_untyped=False)
    return {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}


def _is_accepted(hint: Any, value: Any) -> bool:
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
        parser.parse_object({"value": value})
    except Exception as error:
        # A relative path, or a type that is known in its own module only, is not refused.
        return isinstance(error, ValueError) and "Unsupported type" in str(error)
    return True


def _names(names: Iterable[object]) -> str:
    text = ", ".join(map(str, names))
    return text if len(text) <= MAX_NAMES_LENGTH else text[:MAX_NAMES_LENGTH].rpartition(", ")[0] + ", ..."


def _type_names(hint: Any) -> Iterator[str]:
    """Yield the names of the types and the choices that a value may have."""
    for alternative in _alternatives(hint):
        if typing.get_origin(alternative) is Literal:
            yield from map(str, typing.get_args(alternative))
        elif alternative is type(None):
            yield "null"
        elif (elements := _elements(alternative)) is not None:
            origin = typing.get_origin(alternative)
            yield f"{'tuple' if origin is tuple else 'list'} of {' or '.join(dict.fromkeys(_type_names(elements)))}"
        else:
            yield getattr(typing.get_origin(alternative) or alternative, "__name__", str(alternative))


def _describe(hint: Any, value: Any) -> str:
    """Return the expected types and choices, with the closest choice."""
    choices = [
        choice for part in _alternatives(hint) if typing.get_origin(part) is Literal for choice in _type_names(part)
    ]
    return f"expected {_names(dict.fromkeys(_type_names(hint)))}.{closest_match(str(value), choices)}"


def _check(value: Any, hint: Any, key: str, missing: str = "") -> str | None:
    """Return the sentence about the first value that is wrong, or lacks the argument ``missing``; None if all fit."""
    elements, classes = _elements(hint), _classes(hint)
    if isinstance(value, list) and elements is not None:
        problems = (_check(element, elements, f"{key}.{index}", missing) for index, element in enumerate(value))
        return next(filter(None, problems), None)
    class_path = value.get("class_path") if isinstance(value, Mapping) else value
    is_class = isinstance(value, Mapping) or missing or not _is_accepted(hint, value)
    if classes and is_class and isinstance(class_path, str) and _may_be_class(class_path, hint):
        target = _resolve(class_path, classes, key)
        if isinstance(target, str) and elements is not None and _check(value, elements, key) is None:
            return f"'{key}' is {_names([value])}, {_describe(hint, value)}"  # of a list's elements, but no list
        if isinstance(target, str):
            return target
        init_args = value.get("init_args") if isinstance(value, Mapping) else None
        return _check_arguments(init_args or {}, target, key, missing)
    if isinstance(value, Mapping) and classes:
        return f"'{key}' has no class_path. Add that of its {classes[0].__name__}." if "init_args" in value else None
    return None if _is_accepted(hint, value) else f"'{key}' is {_names([value])}, {_describe(hint, value)}"


def _may_be_class(name: str, hint: Any) -> bool:
    """Return False for a value such as ``x`` or ``1e-3`` where a number or a word is as good as a class."""
    has_leaf = any(alternative in (bool, int, float, str) for alternative in _alternatives(hint))
    return not has_leaf or name.rpartition(".")[2][:1].isupper()


def _resolve(class_path: str, classes: list[type], key: str) -> Any:
    """Return the class, or the sentence that says why there is none."""
    expected = " or ".join(cls.__name__ for cls in classes)
    if "." not in class_path:
        names = _class_names(classes)
        if class_path in names:
            return next(cls for base in classes for cls in _subclasses(base) if cls.__name__ == class_path)
        hint = closest_match(class_path, names) or f" Valid names: {_names(names)}, or the class path of your own."
        return f"'{key}' is '{class_path}', expected a class of {expected}.{hint}"
    target = find_class(class_path)
    if isinstance(target, str):
        return f"'{key}' names '{class_path}', which {target}"
    if inspect.isclass(target) and not any(issubclass(target, cls) for cls in classes):
        return f"'{key}' names '{class_path}', which is no {expected}."
    return target


def _check_arguments(init_args: Mapping[str, Any], target: Any, key: str, missing: str) -> str | None:
    parameters, name = _parameters(target), target.__name__
    if missing in parameters and missing not in init_args and parameters[missing].required:
        return f"'{key}' ({name}) needs '{missing}'. Add it with --{re.sub(r'[.][0-9]+', '', key)}.{missing} VALUE."
    for argument, value in init_args.items():
        if argument in parameters:
            hint = getattr(parameters[argument], "_typehint", None)
            if hint is not None and (problem := _check(value, hint, f"{key}.init_args.{argument}", missing)):
                return problem
        elif parameters:
            return unknown_key(f"{key}.init_args.{argument}", parameters, f" in {name}")
    return None


def unknown_key(key: str, names: Iterable[str], location: str = "") -> str:
    """Return the sentence about an unknown key, with the closest of the names that are valid there."""
    names = sorted(names)
    name = key.rpartition(".")[2]
    hint = closest_match(name, names) or (f" Valid keys: {_names(names)}." if names else "")
    return f"there is no key '{key}'{location}.{hint}"


def iter_options(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the options of a command line as (key, value); the value of an option without one is None."""
    following = [*arguments[1:], "--"]
    for argument, value in zip(arguments, following, strict=True):
        if argument.startswith("--") and argument != "--":
            name, separator, joined = argument[2:].partition("=")
            is_value = not value.startswith("--")
            yield name.removesuffix("+"), joined if separator else value if is_value else None


def suggest_option(name: str, known_keys: Iterable[str]) -> str:
    """Return the hint for an option: the same last part first (data.batch_size for batch-size), then the closest."""
    keys = list(dict.fromkeys(known_keys))
    normalized = name.replace("-", "_").lower()
    last_parts = {key.rpartition(".")[2]: key for key in reversed(keys)}
    # An abbreviation at the top, as --seed for --seed_everything, before the same name in a part.
    match = next((key for key in keys if key.lower() == normalized or key.startswith(f"{normalized}_")), None)
    match = match or last_parts.get(normalized)
    match = match or next((key for part, key in last_parts.items() if part.startswith(f"{normalized}_")), None)
    if match is None:
        matches = difflib.get_close_matches(normalized, keys, n=1, cutoff=0.75)
        parts = difflib.get_close_matches(normalized.rpartition(".")[2], last_parts, n=1, cutoff=0.7)
        match = matches[0] if matches else last_parts[parts[0]] if parts else None
    return "" if match is None else f" Did you mean '--{match}'?"


class Explainer:
    """Explanation of a refused command line.

    Args:
        actions: The subcommand's options.
        arguments: Command line after the subcommand.
        configs: Content of the config files by path.
        message: Reason of the parser, which names an argument that is missing.
    """

    def __init__(
        self, actions: Iterable[Any], arguments: list[str], configs: Mapping[str, Mapping[str, Any]], message: str = ""
    ) -> None:
        match = _MISSING_ARGUMENT.search(message)
        self.missing = next(filter(None, match.groups())).rpartition(".")[2] if match else ""
        actions = [action for action in actions if not action.dest.endswith(".help")]
        self.hints = {action.dest: getattr(action, "_typehint", None) for action in actions}
        self.defaults = {action.dest: action.default for action in actions}
        self.options, self.configs, self.arguments = list(iter_options(arguments)), configs, arguments
        self.flags = {string.lstrip("-") for action in actions for string in action.option_strings}

    def explain(self) -> str | None:
        """Return the sentence about the first wrong value or name: in the command line, then in the configs."""
        problems = itertools.chain(map(self._check_option, self.options), self._check_configs(), [self._check_strays()])
        return next(filter(None, problems), None)

    def _check_configs(self) -> Iterator[str | None]:
        for path, config in self.configs.items():
            for key, hint in self.hints.items():
                value: Any = config
                for part in key.split("."):
                    value = value.get(part) if isinstance(value, Mapping) else None
                if hint is not None and value is not None and (problem := _check(value, hint, key, self.missing)):
                    yield f"'{path}': {problem}"

    def _check_option(self, option: tuple[str, str | None]) -> str | None:
        key, text = option
        if text is None and (key in self.hints or key in self.flags):
            return None
        text = text or ""
        if (hint := self.hints.get(key)) is not None:
            value: Any = text
            if text[:1] in ("[", "{"):
                with contextlib.suppress(yaml.YAMLError):
                    value = yaml.safe_load(text)
            return _check(value, hint, key, self.missing)
        if any(name.startswith(f"{key}.") for name in self.hints) and not Path(text).exists():
            names = (f"--{name}" for name in self.hints if name.startswith(f"{key}.") and not name.endswith(".help"))
            return f"--{key} {text} names no config file. Set its options: {_names(names)}."
        if key in self.flags or f"--{key}" in CONFIG_OPTIONS:
            return None
        owner = max((name for name in self.hints if key.startswith(f"{name}.")), key=len, default=None)
        if owner is not None and self.hints[owner] is not None:
            return self._check_nested(owner, key, text)
        return f"there is no option '--{key}'.{suggest_option(key, self._known_keys())}"

    def _known_keys(self) -> list[str]:
        nested = [f"{owner}.{name}" for owner in self.hints for name in self._class_parameters(owner)]
        order = ("data", "trainer", "model", "checkpoint")
        keys = [key for key in (*self.hints, *nested) if not key.endswith(("help", "print_config", "SUPPRESS=="))]
        return sorted(keys, key=lambda key: (key.count("."), *(key.startswith(part) for part in reversed(order))))

    def _class_parameters(self, owner: str) -> dict[str, Any]:
        target = self._class_of(owner, self.hints[owner])
        return _parameters(target) if target is not None else {}

    def _class_of(self, key: str, hint: Any) -> Any:
        """Return the class of a key on the command line, in the configs or by default; None if it has none."""
        if hint is None or not (classes := _classes(hint) or _classes(_elements(hint))):
            return None
        values: list[Any] = [text for name, text in reversed(self.options) if name in (key, f"{key}.class_path")]
        for config in reversed(list(self.configs.values())):
            value: Any = config
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            values.append(value)
        values.append(self.defaults.get(key))
        for value in values:
            value = value[-1] if isinstance(value, list) and value else value
            if inspect.isclass(value):
                return value
            name = value.get("class_path") if hasattr(value, "get") else getattr(value, "class_path", value)
            if isinstance(name, str):
                target = _resolve(name, classes, key)
                return None if isinstance(target, str) else target
        return classes[0] if len(classes) == 1 else None

    def _check_nested(self, owner: str, key: str, text: str) -> str | None:
        """Check an argument of a class, such as ``model.optimizer.lr`` or ``model.optimizer.init_args.lr``."""
        target, hint = self._class_of(owner, self.hints[owner]), self.hints[owner]
        parts = [part for part in key.removeprefix(f"{owner}.").split(".") if part not in ("init_args", "dict_kwargs")]
        path = owner
        for index, part in enumerate(parts):
            if target is None or part in ("class_path", "help"):
                return None
            parameters = _parameters(target)
            if parameters and part not in parameters:
                return unknown_key(f"{path}.{part}", parameters, f" in {target.__name__}")
            hint = getattr(parameters.get(part), "_typehint", None)
            path = f"{path}.init_args.{part}"
            if index == len(parts) - 1:
                return None if hint is None else _check(text, hint, f"{owner}.{'.'.join(parts)}", self.missing)
            target = self._class_of(path, hint)
        return None

    def _check_strays(self) -> str | None:
        for previous, argument in itertools.pairwise(["", *self.arguments]):
            if re.match(r"-[A-Za-z]{2}", argument):
                return f"there is no option '{argument}'.{suggest_option(argument[1:], self._known_keys())}"
            if not argument.startswith("-") and (not previous.startswith("-") or "=" in previous):
                option = "--config" if argument.endswith((".yaml", ".yml")) else "--data.root"
                hint = f" Did you mean '{option} {argument}'?" if Path(argument).exists() else ""
                return f"'{argument}' belongs to no option.{hint}"
        return None


_TYPE_MISMATCH = re.compile(r"- (Expected an? |Not a valid subclass|Does not validate|Not of type)")


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def innermost_reason(message: str) -> str:
    """Return the line of a message of nested alternatives that says why the meant one failed, else the first line."""
    lines = [line for line in message.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        text = line.strip()
        if text.startswith("- ") and not _TYPE_MISMATCH.match(text):
            # The reason follows on the deeper lines.
            ends = (number for number, after in enumerate(lines) if number > index and _depth(after) <= _depth(line))
            deeper = lines[index + 1 : next(ends, None)]
            return innermost_reason("\n".join(deeper)) if deeper else text.removeprefix("- ")
    return lines[0].strip() if lines else ""


def suggest_remedy(reason: str, parameters: Iterable[str]) -> MemtxError:
    """Return the error for a reason of torch or Lightning, with the package to install or the option to change."""
    if match := re.search(r"Requirement '([\w-]+)([^']*)'|No module named '([\w.]+)'", reason):
        package = match[1] or pip_name(match[3].partition(".")[0])
        requirement = f"'{match[1]}{match[2]}'" if match[1] else package
        return MemtxError(f"The package {package} is not installed.", f"Install it: pip install {requirement}")
    names = sorted(parameters, key=len, reverse=True)
    match = re.search(rf"\b({'|'.join(names)})\b", reason)
    hint = "" if "pip install" in reason else f"Change --trainer.{match[1]}." if match else "--traceback shows where."
    return MemtxError(f"{reason.rstrip('.')}.", hint)

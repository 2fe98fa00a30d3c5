"""A part as data: ``functools.partial(Class, a=1)`` <-> ``{"class_path": "module.Class", "init_args": {"a": 1}}``.

A part of a model is configured by a factory that waits for the number its owner knows (a width, a rate). In
Python that is a partial or the class itself, in YAML a class_path with init_args; both are written to
config.json in the second form and read back as the first.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from memtx.errors import CheckpointError, closest_match

TRUSTED_PACKAGES = ("memtx", "torch.nn")
"""Packages from which a class path in a file may be imported; others must have been imported already."""

CONFIGURABLE_PACKAGES = ("memory", "layers", "models")
"""Folders of memtx whose classes and functions may stand in a config."""


def _class_path(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def to_config(value: Any) -> Any:
    """Return ``value`` as numbers, texts, lists and dicts that JSON can hold.

    Raises:
        TypeError: a part that no file can name, such as a lambda.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_config(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_config(item) for item in value]
    if isinstance(value, functools.partial):
        target, arguments = value.func, dict(value.keywords)
        if value.args and inspect.isclass(value.args[-1]):
            # What jsonargparse hands over: a partial of its instantiator, the class last among the positionals.
            target = value.args[-1]
        elif value.args:
            raise TypeError(f"{value} has positional arguments; give them by name so that they can be saved.")
        return {
            "class_path": _class_path(target),
            "init_args": {key: to_config(item) for key, item in arguments.items()},
        }
    if callable(value) and getattr(value, "__qualname__", "<").find("<") < 0:
        return {"class_path": _class_path(value), "init_args": {}}
    raise TypeError(
        f"{value!r} cannot be saved in a config: use a class or functools.partial of one, not an object or lambda."
    )


def _is_configurable(target: Any) -> bool:
    from torch import nn

    if inspect.isclass(target) and issubclass(target, nn.Module):
        return True
    # A function or class that memtx defines beside its modules; not what its files merely import.
    home = str(getattr(target, "__module__", ""))
    return callable(target) and any(home.startswith(f"memtx.{folder}.") for folder in CONFIGURABLE_PACKAGES)


def _import_target(class_path: str) -> Any:
    module_name, _, name = class_path.rpartition(".")
    trusted = any(module_name == root or module_name.startswith(root + ".") for root in TRUSTED_PACKAGES)
    if not trusted and module_name not in sys.modules:
        raise CheckpointError(
            f"The config names '{class_path}', which is outside memtx and was not imported.",
            f"If you trust it, import {module_name or class_path} first.",
        )
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"The config names '{class_path}', which cannot be imported.", str(error)) from error
    found = getattr(module, name, None)
    if found is not None and not _is_configurable(found):
        # Every module of the standard library counts as imported: os.system is not to be reached from a file.
        raise CheckpointError(
            f"The config names '{class_path}', which is neither a torch module nor a part of memtx.",
            "Do not load this file unless you know who wrote it.",
        )
    if found is None:
        raise CheckpointError(
            f"The config names '{class_path}', which does not exist.{closest_match(name, dir(module))}",
            "Was it written by another release?",
        )
    return found


def from_config(value: Any) -> Any:
    """Return the factories that :func:`to_config` wrote down; other values pass unchanged.

    Raises:
        CheckpointError: a class path that is unknown, untrusted, or does not take the arguments given.
    """
    if isinstance(value, list):
        return [from_config(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        return {key: from_config(item) for key, item in value.items()}
    factory = _import_target(str(value["class_path"]))
    arguments = {key: from_config(item) for key, item in (value.get("init_args") or {}).items()}
    known = inspect.signature(factory).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for key in arguments:
        if key not in known and not open_ended:
            raise CheckpointError(
                f"The config gives '{key}' to {value['class_path']}, which takes no such argument."
                f"{closest_match(key, known)}",
                "Was it written by another release?",
            )
    return functools.partial(factory, **arguments) if arguments else factory

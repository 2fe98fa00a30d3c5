"""Factories as data: ``partial(Class, a=1)`` <-> ``{"class_path": "module.Class", "init_args": {"a": 1}}``.

Model parts are configured by factories, which their owner calls with the arguments it knows (a width, a rate). In
Python a factory is a partial or a class; in YAML and config.json it is a class_path with init_args.
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
"""Packages from which a class path in a file may be imported; other packages must be imported already."""

CONFIGURABLE_PACKAGES = ("memory", "layers", "models")
"""Subpackages of memtx whose classes and functions may appear in a config."""


def _class_path(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def factory_target(factory: Any) -> Any:
    """Return the class or function that a factory calls."""
    if not isinstance(factory, functools.partial):
        return factory
    # jsonargparse passes a partial of its instantiator, with the class as the last positional argument.
    return factory.args[-1] if factory.args and inspect.isclass(factory.args[-1]) else factory.func


def to_config(value: Any) -> Any:
    """Convert ``value`` to JSON values; raises TypeError for an object without a class path, such as a lambda."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_config(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [to_config(element) for element in value]
    if isinstance(value, functools.partial):
        target = factory_target(value)
        if value.args and target is value.func:
            raise TypeError(f"{value} has positional arguments; pass them by name so that they can be saved.")
        return {"class_path": _class_path(target), "init_args": to_config(value.keywords)}
    if callable(value) and "<" not in getattr(value, "__qualname__", "<"):
        return {"class_path": _class_path(value), "init_args": {}}
    raise TypeError(
        f"{value!r} cannot be saved in a config: use a class or functools.partial of one, not an object or lambda."
    )


def _is_configurable(target: Any) -> bool:
    from torch import nn

    if inspect.isclass(target) and issubclass(target, nn.Module):
        return True
    # Also allow functions and other classes that memtx defines, but nothing that its files merely import.
    module_name = str(getattr(target, "__module__", ""))
    return callable(target) and module_name.startswith(tuple(f"memtx.{folder}." for folder in CONFIGURABLE_PACKAGES))


def _import_target(class_path: str) -> Any:
    module_name, _, name = class_path.rpartition(".")
    if module_name not in sys.modules and not f"{module_name}.".startswith(
        tuple(f"{package}." for package in TRUSTED_PACKAGES)
    ):
        message = f"The config names '{class_path}', which is outside memtx and was not imported."
        raise CheckpointError(message, f"If you trust it, import {module_name or class_path} first.")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"The config names '{class_path}', which cannot be imported.", str(error)) from error
    target = getattr(module, name, None)
    if target is None:
        message = f"The config names '{class_path}', which does not exist.{closest_match(name, dir(module))}"
        raise CheckpointError(message, "Use the release that wrote it.")
    if not _is_configurable(target):
        # Every module of the standard library counts as imported: a file must not reach os.system.
        message = f"The config names '{class_path}', which is neither a torch module nor a part of memtx."
        raise CheckpointError(message, "Do not load this file unless you know who wrote it.")
    return target


def from_config(value: Any) -> Any:
    """Rebuild the factories that :func:`to_config` described; other values pass unchanged.

    Raises CheckpointError if a class path is unknown or untrusted, or does not accept the arguments.
    """
    if isinstance(value, list):
        return [from_config(element) for element in value]
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        return {key: from_config(element) for key, element in value.items()}
    factory = _import_target(str(value["class_path"]))
    arguments = {key: from_config(element) for key, element in (value.get("init_args") or {}).items()}
    parameters = inspect.signature(factory).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in arguments:
        if key not in parameters and not takes_any:
            message = f"The config passes '{key}' to {value['class_path']}, which does not accept it."
            raise CheckpointError(f"{message}{closest_match(key, parameters)}", "Use the release that wrote it.")
    return functools.partial(factory, **arguments) if arguments else factory

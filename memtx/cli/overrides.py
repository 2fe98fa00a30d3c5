"""Overrides as Hydra and sweep tools write them: ``key=value``, ``+key=value``, ``++key=value``, Python's None."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from memtx.errors import MemtxError

_OVERRIDE = re.compile(r"(~|\+{0,2})([A-Za-z_]\w*(?:\.\w+)*)(\+?=)(.*)", re.DOTALL)
_REMOVAL = re.compile(r"~([A-Za-z_]\w*(?:\.\w+)*)(=.*)?", re.DOTALL)
_QUOTED = re.compile(r"(['\"])(.*)\1", re.DOTALL)
# A key of a mapping as Hydra writes it, without the space that YAML needs; no address such as s3://a.
_MAPPING_KEY = re.compile(r"([{,]\s*[\w.]+):(?=[^\s/])")
_FLAGS = ("--traceback", "--print_config", "--help", "-h")
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def to_options(argv: Sequence[str]) -> list[str]:
    """Return the arguments, subcommand first, with each override as an option ``--key=value``.

    A value in quotes loses them, and a value ``None`` is null. Raises MemtxError for Hydra's ``~key``.
    """
    options: list[str] = []
    is_value = False  # the value of the option before it
    for argument in argv:
        if not is_value and _REMOVAL.fullmatch(argument):
            key = argument[1:].partition("=")[0]
            raise MemtxError(f"'{argument}' would remove a key, which is not supported.", f"Set it: {key}=null.")
        match = None if is_value else _OVERRIDE.fullmatch(argument)
        if match is not None:
            argument = f"--{match[2]}{match[3]}{_to_yaml(match[4])}"
        elif argument == "None" and is_value:
            argument = "null"
        elif argument.startswith("--") and argument.endswith("=None"):
            argument = argument.removesuffix("None") + "null"
        options.append(argument)
        is_value = argument.startswith("-") and "=" not in argument and argument not in _FLAGS
    return options


def _to_yaml(value: str) -> str:
    if value == "None":
        return "null"
    if match := _QUOTED.fullmatch(value):
        return match[2]
    return _MAPPING_KEY.sub(r"\1: ", value) if value.startswith("{") else value


def expand_variables(path: str) -> str:
    """Return a path with its environment variables, such as $WANDB_RUN_ID; raises MemtxError if one is not set."""
    for match in _VARIABLE.finditer(path):
        if not os.environ.get(name := match[1].strip("{}")):
            raise MemtxError(f"'{path}' needs the environment variable {name}, which is not set.", "Set it.")
    return os.path.expandvars(path)

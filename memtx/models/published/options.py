"""A published config.json, read key by key: what is missing or out of range is named with the key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from memtx.errors import CheckpointError, nearest

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_python": nn.GELU,
    "gelu_new": partial(nn.GELU, approximate="tanh"),
    "gelu_fast": partial(nn.GELU, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
"""The layout's names of non-linearities; those of a formula of their own are equal to ours in exact arithmetic."""


class Options:
    """A config with typed access.

    Args:
        config: the object in config.json.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def value(self, key: str, default: Any = None) -> Any:
        """Return a key's value as it is; the default where it is missing or null."""
        found = self.config.get(key)
        return default if found is None else found

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number.

        Raises:
            CheckpointError: missing without a default, of another type, or too small.
        """
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, int) or found < least:
            raise CheckpointError(
                f"config.json has {key} = {found!r}, expected a whole number of at least {least}.", "Restore it."
            )
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number that is not negative.

        Raises:
            CheckpointError: missing without a default, of another type, or negative.
        """
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not found >= 0:
            raise CheckpointError(f"config.json has {key} = {found!r}, expected a number from 0 on.", "Restore it.")
        return float(found)

    def flag(self, key: str, default: bool) -> bool:
        """Return a truth value.

        Raises:
            CheckpointError: of another type.
        """
        found = self.value(key, default)
        if not isinstance(found, bool):
            raise CheckpointError(f"config.json has {key} = {found!r}, expected true or false.", "Restore it.")
        return found

    def wholes(self, key: str, count: int | None, default: Any = None, *, least: int = 1) -> list[int]:
        """Return a list of whole numbers; one number stands for ``count`` of them.

        Raises:
            CheckpointError: missing without a default, of another type or number, or too small.
        """
        found = self.value(key, default)
        if isinstance(found, int) and not isinstance(found, bool) and count is not None:
            found = [found] * count
        right = isinstance(found, list | tuple) and all(
            isinstance(each, int) and not isinstance(each, bool) and each >= least for each in found
        )
        if not right or (count is not None and len(found) != count):
            many = f"{count} whole numbers" if count is not None else "whole numbers"
            raise CheckpointError(f"config.json has {key} = {found!r}, expected {many} from {least} on.", "Restore it.")
        return list(found)

    def activation(self, key: str, default: str) -> Callable[[], nn.Module]:
        """Return what makes the non-linearity that a key names.

        Raises:
            CheckpointError: it is none that we know.
        """
        name = str(self.value(key, default))
        if name not in ACTIVATIONS:
            raise CheckpointError(
                f"config.json has {key} = '{name}', known are {', '.join(ACTIVATIONS)}.{nearest(name, ACTIVATIONS)}",
                "Convert the model, or ask for the non-linearity.",
            )
        return ACTIVATIONS[name]

    def refuse(self, key: str, harmless: Any, why: str) -> None:
        """Raise unless a key is missing or has a harmless value.

        Raises:
            CheckpointError: it has another one.
        """
        found = self.value(key, harmless)
        if found != harmless:
            raise CheckpointError(f"config.json has {key} = {found!r}: {why}.", f"Only {key} = {harmless!r} is read.")

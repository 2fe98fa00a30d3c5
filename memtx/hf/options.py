"""A published config.json, read key by key: what is missing or out of range is named with the key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from memtx.errors import CheckpointError, closest_match

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


class HFConfig:
    """A config with typed access.

    Args:
        values: the object in config.json.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        """Return a key's value as it is; the default where it is missing or null."""
        found = self.values.get(key)
        return default if found is None else found

    def get_int(self, key: str, default: int | None = None, *, min_value: int = 1) -> int:
        """Return a whole number.

        Raises:
            CheckpointError: missing without a default, of another type, or too small.
        """
        found = self.get(key, default)
        if isinstance(found, bool) or not isinstance(found, int) or found < min_value:
            raise CheckpointError(
                f"config.json has {key} = {found!r}, expected a whole number of at least {min_value}.", "Restore it."
            )
        return found

    def get_float(self, key: str, default: float | None = None) -> float:
        """Return a number that is not negative.

        Raises:
            CheckpointError: missing without a default, of another type, or negative.
        """
        found = self.get(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not found >= 0:
            raise CheckpointError(f"config.json has {key} = {found!r}, expected a number from 0 on.", "Restore it.")
        return float(found)

    def get_bool(self, key: str, default: bool) -> bool:
        """Return a truth value.

        Raises:
            CheckpointError: of another type.
        """
        found = self.get(key, default)
        if not isinstance(found, bool):
            raise CheckpointError(f"config.json has {key} = {found!r}, expected true or false.", "Restore it.")
        return found

    def get_ints(self, key: str, count: int | None, default: Any = None, *, min_value: int = 1) -> list[int]:
        """Return a list of whole numbers; one number stands for ``count`` of them.

        Raises:
            CheckpointError: missing without a default, of another type or number, or too small.
        """
        found = self.get(key, default)
        if isinstance(found, int) and not isinstance(found, bool) and count is not None:
            found = [found] * count
        right = isinstance(found, list | tuple) and all(
            isinstance(each, int) and not isinstance(each, bool) and each >= min_value for each in found
        )
        if not right or (count is not None and len(found) != count):
            many = f"{count} whole numbers" if count is not None else "whole numbers"
            raise CheckpointError(
                f"config.json has {key} = {found!r}, expected {many} from {min_value} on.", "Restore it."
            )
        return list(found)

    def get_activation(self, key: str, default: str) -> Callable[[], nn.Module]:
        """Return what makes the non-linearity that a key names.

        Raises:
            CheckpointError: it is none that we know.
        """
        name = str(self.get(key, default))
        if name not in ACTIVATIONS:
            raise CheckpointError(
                f"config.json has {key} = '{name}', known are {', '.join(ACTIVATIONS)}."
                f"{closest_match(name, ACTIVATIONS)}",
                "Convert the model, or ask for the non-linearity.",
            )
        return ACTIVATIONS[name]

    def require(self, key: str, supported: Any, reason: str) -> None:
        """Raise unless a key is missing or has a harmless value.

        Raises:
            CheckpointError: it has another one.
        """
        found = self.get(key, supported)
        if found != supported:
            raise CheckpointError(
                f"config.json has {key} = {found!r}: {reason}.", f"Only {key} = {supported!r} is read."
            )

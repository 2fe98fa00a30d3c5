"""A Hugging Face config.json, read key by key; errors name the key that is missing or out of range."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from memtx.errors import CheckpointError, check_at_least, closest_match
from memtx.layers.positions.base import Positions
from memtx.layers.positions.rotary import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rotary,
    RotaryFrequencies,
    YarnScaling,
)
from memtx.memory.recurrent import RecurrentMemory

T = TypeVar("T")
logger = logging.getLogger(__name__)

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
"""Activations by their names in config.json; formulas of ``transformers`` equal these in exact arithmetic."""


class HFConfig:
    """Typed access to config.json, or to an object in it.

    The typed getters raise CheckpointError if a value is missing without a default, has another type, or is out of
    range.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or the default if it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def get_int(self, key: str, default: int | None = None, *, min_value: int = 1) -> int:
        """Return an integer of at least ``min_value``."""
        value = self.get(key, default)
        if not _is_int(value) or value < min_value:
            raise _invalid(key, value, f"an integer of at least {min_value}")
        return int(value)

    def get_float(self, key: str, default: float | None = None) -> float:
        """Return a number of at least 0."""
        value = self.get(key, default)
        if not (_is_int(value) or isinstance(value, float)) or not value >= 0:
            raise _invalid(key, value, "a number of at least 0")
        return float(value)

    def get_bool(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise _invalid(key, value, "true or false")
        return value

    def get_ints(self, key: str, count: int | None, default: Any = None, *, min_value: int = 1) -> list[int]:
        """Return ``count`` integers, or any number if None; a single integer is repeated ``count`` times."""
        value = self.get(key, default)
        integers = [value] * count if count is not None and _is_int(value) else value
        if (
            not isinstance(integers, list | tuple)
            or not all(_is_int(integer) and integer >= min_value for integer in integers)
            or (count is not None and len(integers) != count)
        ):
            raise _invalid(key, value, f"{'' if count is None else f'{count} '}integers of at least {min_value}")
        return list(integers)

    def get_activation(self, key: str, default: str) -> Callable[[], nn.Module]:
        """Return the factory of an activation named in ``ACTIVATIONS``."""
        return _look_up(ACTIVATIONS, key, str(self.get(key, default)), "activation")

    def require(self, key: str, supported: Any, feature: str) -> None:
        """Raise CheckpointError unless a key is missing, null or ``supported``; ``feature`` names other values."""
        value = self.get(key, supported)
        if value != supported:
            message = f"config.json has {key} = {value!r}: {feature} are not supported."
            raise CheckpointError(message, f"Use a model with {key} = {supported!r}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _invalid(key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"config.json has {key} = {value!r}, expected {expected}.", "Restore config.json.")


def _look_up(table: Mapping[str, T], key: str, name: str, feature: str) -> T:
    if name not in table:
        message = f"config.json has {key} = '{name}', expected one of {', '.join(table)}.{closest_match(name, table)}"
        raise CheckpointError(message, f"Convert the model, or request this {feature}.")
    return table[name]


def build_window_memories(
    requested_window: int | None, max_length: int, sliding_windows: Sequence[int | None]
) -> list[Any]:
    """Return the memories of a decoder, an exact window in each layer.

    The window defaults to ``max_length``, the trained length. No layer's window exceeds its sliding window, which is
    None for full attention.
    """
    if requested_window is not None:
        check_at_least(1, window=requested_window)
    window = requested_window if requested_window is not None else max_length
    options = [(window, max_length) if sliding is None else (min(sliding, window), None) for sliding in sliding_windows]
    memories = [partial(RecurrentMemory, window=window, trained_length=length) for window, length in options]
    return memories[:1] if len(set(options)) == 1 else memories


RopeParser = Callable[[HFConfig, int], dict[str, Any]]


def _parse_linear(rope: HFConfig, max_length: int) -> dict[str, Any]:
    return {"scaling_factor": rope.get_float("factor")}


def _parse_llama3(rope: HFConfig, max_length: int) -> dict[str, Any]:
    return {
        "scaling_factor": rope.get_float("factor"),
        "low_freq_factor": rope.get_float("low_freq_factor"),
        "high_freq_factor": rope.get_float("high_freq_factor"),
        "original_max_length": rope.get_int("original_max_position_embeddings", max_length),
    }


def _parse_yarn(rope: HFConfig, max_length: int) -> dict[str, Any]:
    original_length = rope.get_int("original_max_position_embeddings", max_length)
    scaling_factor = rope.get_float("factor", max_length / original_length)
    attention_factor = rope.get("attention_factor")
    if attention_factor is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        mscale, mscale_all_dim = (
            1.0 if scaling_factor <= 1 else 0.1 * rope.get_float(key) * math.log(scaling_factor) + 1.0
            for key in ("mscale", "mscale_all_dim")
        )
        attention_factor = mscale / mscale_all_dim
    return {
        "scaling_factor": scaling_factor,
        "original_max_length": original_length,
        "beta_fast": rope.get_float("beta_fast", 32.0) or 32.0,
        "beta_slow": rope.get_float("beta_slow", 1.0) or 1.0,
        "attention_factor": None if attention_factor is None else float(attention_factor),
        "truncate": rope.get_bool("truncate", True),
    }


def _parse_longrope(rope: HFConfig, max_length: int) -> dict[str, Any]:
    original_length = rope.get_int("original_max_position_embeddings", max_length)
    ratio = rope.get_float("factor", max_length / original_length)
    default = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original_length))
    window = rope.get_int("window", max_length)
    # The published code changes from short to long factors while a text grows, and with them what was read before.
    is_long = window > original_length
    if is_long and rope.get("long_factor") != rope.get("short_factor"):
        message = (
            "Positions are scaled by long_factor, as for texts beyond %s tokens; a window of at most as many scales"
        )
        logger.warning(f"{message} them by short_factor, as for shorter texts.", f"{original_length:,}")
    factors = rope.get("long_factor" if is_long else "short_factor")
    if not isinstance(factors, list) or not all(isinstance(factor, int | float) for factor in factors):
        raise _invalid("long_factor", factors, "a list of numbers")
    return {"factors": factors, "attention_factor": rope.get_float("attention_factor", default)}


LONG_ROPE_TYPES = ("longrope", "su")

ROPE_SCALINGS: dict[str, tuple[Callable[..., RotaryFrequencies], RopeParser] | None] = {
    "default": None,
    # Scales only beyond the trained length, which no window exceeds.
    "dynamic": None,
    "linear": (LinearScaling, _parse_linear),
    "llama3": (Llama3Scaling, _parse_llama3),
    "yarn": (YarnScaling, _parse_yarn),
    **dict.fromkeys(LONG_ROPE_TYPES, (LongRopeScaling, _parse_longrope)),
}
"""Scalings of rotary positions by ``rope_type``; None for unscaled frequencies."""


def build_rotary(
    config: HFConfig,
    max_length: int,
    *,
    head_dim: int | None = None,
    partial_factor: float = 1.0,
    window: int | None = None,
) -> tuple[Callable[[int, int], Positions], int, int | None]:
    """Return the factory of rotary positions, the number of positions supported, and the rotated channels of a head.

    Reads both formats: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``. Raises CheckpointError if the
    scaling is unknown or lacks an option.

    Args:
        config: The config.
        max_length: Number of positions in the config.
        head_dim: Width of a head, for layouts that may rotate a part of it; None refuses such configs, and no number of
            rotated channels is returned.
        partial_factor: Share of rotated channels if config.json omits ``partial_rotary_factor``.
        window: Number of exact positions seen, if it is chosen.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise _invalid("rope_parameters", parameters, "an object")
    rope = HFConfig(parameters)
    base = rope.get_float("rope_theta", config.get_float("rope_theta", 10000.0))
    rope_type = str(rope.get("rope_type", rope.get("type", "default")))
    scaling = _look_up(ROPE_SCALINGS, "rope_type", rope_type, "scaling")
    rotary_dim = None
    if head_dim is None:
        for values in (config, rope):
            values.require("partial_rotary_factor", 1.0, "partially rotated heads")
    else:
        factor = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", partial_factor))
        rotary_dim = int(head_dim * HFConfig({"partial_rotary_factor": factor}).get_float("partial_rotary_factor"))
    if rope_type == "dynamic":
        max_length = min(max_length, rope.get_int("original_max_position_embeddings", max_length))
    if rope_type == "yarn":
        # Published configs extend a model by rope_scaling alone: max_position_embeddings may be the original length.
        original_length = rope.get_int("original_max_position_embeddings", max_length)
        max_length = max(max_length, int(rope.get_float("factor", 1.0) * original_length))
    positions = partial(Rotary, base=base) if rotary_dim is None else partial(Rotary, base=base, rotary_dim=rotary_dim)
    if scaling is None:
        return positions, max_length, rotary_dim
    scaling_class, parse = scaling
    if rope_type in LONG_ROPE_TYPES:
        # Former configs have the original length beside rope_scaling.
        original = config.get("original_max_position_embeddings")
        rope = HFConfig({"original_max_position_embeddings": original, **parameters, "window": window})
    return partial(positions, frequencies=partial(scaling_class, **parse(rope, max_length))), max_length, rotary_dim

"""Rotary options of a published config.json, in the older spelling (rope_theta, rope_scaling) and the newer one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from memtx.errors import CheckpointError, closest_match
from memtx.hf.options import HFConfig
from memtx.layers.positions.base import Positions
from memtx.layers.positions.rotary import LinearScaling, Llama3Scaling, Rotary, RotaryFrequencies, YarnScaling

ScalingParser = Callable[[HFConfig, int], dict[str, Any]]


def _llama3(rope_config: HFConfig, max_length: int) -> dict[str, Any]:
    return {
        "scaling_factor": rope_config.get_float("factor"),
        "low_freq_factor": rope_config.get_float("low_freq_factor"),
        "high_freq_factor": rope_config.get_float("high_freq_factor"),
        "original_max_length": rope_config.get_int("original_max_position_embeddings", max_length),
    }


def _yarn(rope_config: HFConfig, max_length: int) -> dict[str, Any]:
    trained = rope_config.get_int("original_max_position_embeddings", max_length)
    stretch = rope_config.get_float("factor", max_length / trained)
    factor = rope_config.get("attention_factor")
    if factor is None and rope_config.get("mscale") and rope_config.get("mscale_all_dim"):
        sharp, all_sharp = (_yarn_mscale(stretch, rope_config.get_float(key)) for key in ("mscale", "mscale_all_dim"))
        factor = sharp / all_sharp
    return {
        "scaling_factor": stretch,
        "original_max_length": trained,
        "beta_fast": rope_config.get_float("beta_fast", 32.0) or 32.0,
        "beta_slow": rope_config.get_float("beta_slow", 1.0) or 1.0,
        "attention_factor": None if factor is None else float(factor),
        "truncate": rope_config.get_bool("truncate", True),
    }


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _linear(rope_config: HFConfig, max_length: int) -> dict[str, Any]:
    return {"scaling_factor": rope_config.get_float("factor")}


ROPE_SCALINGS: dict[str, tuple[Callable[..., RotaryFrequencies], ScalingParser] | None] = {
    "default": None,
    # Of the length of what is read: below the trained length, which no window exceeds, nothing is scaled.
    "dynamic": None,
    "linear": (LinearScaling, _linear),
    "llama3": (Llama3Scaling, _llama3),
    "yarn": (YarnScaling, _yarn),
}
"""The layout's names of scalings."""


def build_rotary(config: HFConfig, max_length: int) -> tuple[Callable[[int, int], Positions], int]:
    """Return what makes a layer's positions, and how many it knows.

    Args:
        config: of the config.
        max_length: positions the config says the model knows.

    Raises:
        CheckpointError: the scaling is none that we know, or lacks a number.
    """
    older = config.get("rope_scaling") or {}
    found = config.get("rope_parameters") or older
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json has rotary options {found!r}, expected an object.", "Restore it.")
    rope = HFConfig(found)
    base = rope.get_float("rope_theta", config.get_float("rope_theta", 10000.0))
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if kind not in ROPE_SCALINGS:
        raise CheckpointError(
            f"config.json has rope_type = '{kind}', known are {', '.join(ROPE_SCALINGS)}."
            f"{closest_match(kind, ROPE_SCALINGS)}",
            "Convert the model, or ask for the scaling.",
        )
    for part in (config, rope):
        part.require("partial_rotary_factor", 1.0, "heads turned in part are not read")
    if kind == "dynamic":
        max_length = min(max_length, rope.get_int("original_max_position_embeddings", max_length))
    scaling = ROPE_SCALINGS[kind]
    if scaling is None:
        return partial(Rotary, base=base), max_length
    made, arguments = scaling
    return partial(Rotary, base=base, frequencies=partial(made, **arguments(rope, max_length))), max_length

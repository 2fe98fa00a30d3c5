"""Rotary options of a published config.json, in the older spelling (rope_theta, rope_scaling) and the newer one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from memtx.errors import CheckpointError, nearest
from memtx.layers.frequencies import Frequencies, LinearScaling, Llama3Scaling, YarnScaling
from memtx.layers.positions import Positions, Rotary
from memtx.models.published.options import Options

Make = Callable[[Options, int], dict[str, Any]]


def _llama3(rope: Options, longest: int) -> dict[str, Any]:
    return {
        "stretch": rope.number("factor"),
        "low": rope.number("low_freq_factor"),
        "high": rope.number("high_freq_factor"),
        "trained": rope.whole("original_max_position_embeddings", longest),
    }


def _yarn(rope: Options, longest: int) -> dict[str, Any]:
    trained = rope.whole("original_max_position_embeddings", longest)
    stretch = rope.number("factor", longest / trained)
    factor = rope.value("attention_factor")
    if factor is None and rope.value("mscale") and rope.value("mscale_all_dim"):
        sharp, all_sharp = (_sharper(stretch, rope.number(key)) for key in ("mscale", "mscale_all_dim"))
        factor = sharp / all_sharp
    return {
        "stretch": stretch,
        "trained": trained,
        "fast": rope.number("beta_fast", 32.0) or 32.0,
        "slow": rope.number("beta_slow", 1.0) or 1.0,
        "factor": None if factor is None else float(factor),
        "truncate": rope.flag("truncate", True),
    }


def _sharper(stretch: float, scale: float) -> float:
    return 1.0 if stretch <= 1 else 0.1 * scale * math.log(stretch) + 1.0


def _linear(rope: Options, longest: int) -> dict[str, Any]:
    return {"stretch": rope.number("factor")}


SCALINGS: dict[str, tuple[Callable[..., Frequencies], Make] | None] = {
    "default": None,
    # Of the length of what is read: below the trained length, which no window exceeds, nothing is scaled.
    "dynamic": None,
    "linear": (LinearScaling, _linear),
    "llama3": (Llama3Scaling, _llama3),
    "yarn": (YarnScaling, _yarn),
}
"""The layout's names of scalings."""


def rotary(options: Options, longest: int) -> tuple[Callable[[int, int], Positions], int]:
    """Return what makes a layer's positions, and how many it knows.

    Args:
        options: of the config.
        longest: positions the config says the model knows.

    Raises:
        CheckpointError: the scaling is none that we know, or lacks a number.
    """
    older = options.value("rope_scaling") or {}
    found = options.value("rope_parameters") or older
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json has rotary options {found!r}, expected an object.", "Restore it.")
    rope = Options(found)
    base = rope.number("rope_theta", options.number("rope_theta", 10000.0))
    kind = str(rope.value("rope_type", rope.value("type", "default")))
    if kind not in SCALINGS:
        raise CheckpointError(
            f"config.json has rope_type = '{kind}', known are {', '.join(SCALINGS)}.{nearest(kind, SCALINGS)}",
            "Convert the model, or ask for the scaling.",
        )
    for part in (options, rope):
        part.refuse("partial_rotary_factor", 1.0, "heads turned in part are not read")
    if kind == "dynamic":
        longest = min(longest, rope.whole("original_max_position_embeddings", longest))
    scaling = SCALINGS[kind]
    if scaling is None:
        return partial(Rotary, base=base), longest
    made, arguments = scaling
    return partial(Rotary, base=base, frequencies=partial(made, **arguments(rope, longest))), longest

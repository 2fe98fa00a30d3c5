"""Where bfloat16 is worth multiplying in: on an accelerator, and on CPUs with instructions for it."""

from __future__ import annotations

from functools import cache

import torch


@cache
def is_cpu_bf16_fast() -> bool:
    """Return whether torch multiplies bfloat16 on this CPU by fast kernels.

    Without AVX-512 it does so number by number: on an AMD EPYC with AVX2 at 0.8 GFLOP/s a core, float32 at 68.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_bf16_slow(accelerator: str = "auto") -> bool:
    """Return whether a run on an accelerator of Lightning's name would multiply bfloat16 many times slower."""
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    return on_cpu and not is_cpu_bf16_fast()


def choose_precision(precision: str, accelerator: str = "auto") -> str:
    """Return the precision, as Lightning calls them, to train in where ``precision`` is asked for.

    ``32-true`` for ``bf16-mixed`` where that is slow: the weights are the same float32, their products rounded less.
    """
    return "32-true" if precision in ("bf16-mixed", "bf16") and is_bf16_slow(accelerator) else precision

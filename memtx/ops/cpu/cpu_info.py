"""Processor information, and whether bfloat16 is fast."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch


@cache
def read_cpu_info() -> dict[str, str]:
    """Return the fields of the first core, such as ``flags``; only ``model name`` without /proc/cpuinfo."""
    try:
        core = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {"model name": platform.processor()}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in core.splitlines())}


@cache
def is_cpu_bf16_fast() -> bool:
    """Return True if torch has fast bfloat16 kernels for this CPU.

    Without AVX-512 torch multiplies element by element: 0.8 GFLOP/s per core of an AMD EPYC with AVX2, 68 in float32.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_bf16_slow(accelerator: str = "auto") -> bool:
    """Return True if bfloat16 is many times slower than float32 on ``accelerator``, one of Lightning's names."""
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    return on_cpu and not is_cpu_bf16_fast()


def choose_precision(precision: str, accelerator: str = "auto") -> str:
    """Return ``precision`` (Lightning's name), or ``32-true`` instead of ``bf16-mixed`` where bfloat16 is slow.

    Weights are float32 in both; with ``32-true`` their products are rounded less.
    """
    return "32-true" if precision in ("bf16-mixed", "bf16") and is_bf16_slow(accelerator) else precision

"""The gated delta rule on CUDA by flash-linear-attention's kernels, if ``fla-core`` is installed.

The kernels compute in bfloat16 or float16. The mapping of arguments is tested with a plain rule of their signature; no
GPU has run them from here yet.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

RESET_LOG_DECAY = -60.0
"""Log decay of a document's first token: exp(-60) is nothing beside a bfloat16 value, and a sum of it in float32 still
resolves other decays, so that documents need no list of their ends, which the host would wait for."""

MIN_LENGTH = 64
"""Minimum number of tokens, a chunk of the kernels."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_available() -> bool:
    """Return True if fla-core is installed."""
    return importlib.util.find_spec("fla") is not None


def is_supported(q: Tensor, log_decay: Tensor | None, compute_dtype: torch.dtype) -> bool:
    """Return True if the kernels compute queries like q, ``(batch, heads, length, key_dim)``, with these decays."""
    return (
        q.device.type == "cuda"
        and compute_dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] >= MIN_LENGTH
        and (log_decay is None or log_decay.dim() == 3)
        and is_available()
    )


def fla_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, document_starts: Tensor,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute :func:`memtx.ops.delta_rule.gated_delta_rule` with a decay per head, products in ``compute_dtype``."""
    kernels: Any = importlib.import_module("fla.ops.gated_delta_rule")
    ratio = v.shape[1] // q.shape[1]
    log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
    log_decay = log_decay.masked_fill(document_starts[:, None], RESET_LOG_DECAY)
    out, next_state = kernels.chunk_gated_delta_rule(
        *(x.repeat_interleave(ratio, dim=1).transpose(1, 2).to(compute_dtype) for x in (q, k)),
        v.transpose(1, 2).to(compute_dtype),
        g=log_decay.mT,
        beta=beta.mT,
        scale=1.0,
        initial_state=state,
        output_final_state=True,
    )
    return out.transpose(1, 2).to(v.dtype), next_state

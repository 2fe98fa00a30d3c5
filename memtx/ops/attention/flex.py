"""Attention through torch's flex_attention: the lifetimes as a mask function, whole blocks left out.

Meant for CUDA, where it is compiled into one kernel; on the CPU it runs uncompiled, for comparison only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from memtx.ops.attention.bias import Bias
from memtx.ops.visibility import Visibility


@cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., Any] = flex_attention
    return torch.compile(function, dynamic=False) if compiled else function


def _block_mask(visibility: Visibility, rows: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    born, expires = visibility.born.expand(rows, -1), visibility.expires.expand(rows, -1)

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (born[row, key] <= query) & (query < expires[row, key])

    return create_block_mask(sees, rows, None, visibility.queries, visibility.keys, device=str(born.device))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: Bias | None = None,
    dropout: float = 0.0,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the attention output and its log-sum-exp; shapes as in the reference.

    Args:
        q: (rows, heads, queries, head_dim).
        k: (rows, kv_heads, keys, head_dim).
        v: (rows, kv_heads, keys, head_dim).
        visibility: who sees whom; its block mask is made once for all layers that share it.
        bias: added to the scaled scores.
        dropout: must be 0 here.
        scale: factor of the scores.
    """
    assert dropout == 0.0, "the dispatcher sends dropout to the reference"
    mask = visibility.once(("flex", q.shape[0]), lambda: _block_mask(visibility, q.shape[0]))
    score = None
    if bias is not None:
        slopes, tick = bias.slopes.to(q.dtype), bias.tick.expand(q.shape[0], -1).to(torch.float32)

        def score(value: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return value - slopes[head] * (query - tick[row, key])

    from torch.nn.attention.flex_attention import AuxRequest

    grouped = q.shape[1] != k.shape[1]
    aux = AuxRequest(lse=True)
    out, made = _flex(q.is_cuda)(
        q, k, v, score_mod=score, block_mask=mask, scale=scale, enable_gqa=grouped, return_aux=aux
    )
    return out, made.lse

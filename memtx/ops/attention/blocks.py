"""A block of queries at a time by public calls, on any device, with autograd over the blocks.

``attend_sdpa`` is one ``scaled_dot_product_attention`` a block, over its ranges joined: it has no log-sum-exp and no
gradient for a bias. ``attend_unfused`` has both, and dropout, and keeps the weights of all blocks for the backward
pass: still linear in the number of queries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.bias import ScoreBias, compute_block_bias
from memtx.ops.attention.block_plan import create_additive_mask, split_queries
from memtx.ops.attention.mask import Visibility, create_mask
from memtx.ops.attention.reference import softmax_attention


def attend_sdpa(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, scale: float, block_size: int
) -> Tensor:
    """Return the output, with gradients of q, k and v; shapes as in the reference."""
    out = []
    group = q.shape[1] // k.shape[1]
    for start, stop, parts in split_queries(visibility, block_size):
        if not parts:
            out.append(torch.zeros_like(q[:, :, start:stop]))
            continue
        masks = [create_additive_mask(visibility, bias, (start, stop), part, q.dtype) for part in parts]
        mask = torch.cat([one for one, _ in masks], dim=-1)
        blind = torch.stack([one for _, one in masks]).all(0).transpose(1, 2)[..., None]
        keys, values = (torch.cat([x[:, :, low:high] for low, high in parts], dim=2) for x in (k, v))
        one = F.scaled_dot_product_attention(
            q[:, :, start:stop],
            keys,
            values,
            # Backends differ on a query that sees nothing: let it see all, then erase it.
            attn_mask=mask.masked_fill(blind[..., 0][..., None], 0.0),
            scale=scale,
            enable_gqa=group > 1,
        )
        out.append(one.masked_fill(blind, 0.0))
    return torch.cat(out, dim=2)


def compute_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return scale * q k', in float32 at least."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (q.to(kind) @ k.to(kind).transpose(-1, -2)) * scale


def attend_unfused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    bias: ScoreBias | None,
    scale: float,
    block_size: int,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, with gradients of q, k, v and the bias; shapes as in the reference."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    outs, lses = [], []
    for start, stop, parts in split_queries(visibility, block_size):
        queries = q[:, :, start:stop]
        # A block that meets no key still gives its zeros, by an empty product.
        parts = parts or [(0, 0)]
        keys, values = (torch.cat([x[:, :, low:high] for low, high in parts], dim=2) for x in (k, v))
        scores = compute_scores(queries, keys, scale)
        if bias is not None:
            scores = scores + torch.cat([compute_block_bias(bias, (start, stop), part) for part in parts], -1).to(
                scores.dtype
            )
        seen = torch.cat([create_mask(visibility, (start, stop), part) for part in parts], dim=-1)
        out, lse = softmax_attention(scores, seen[:, None], values, dropout)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

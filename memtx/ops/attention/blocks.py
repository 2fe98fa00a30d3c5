"""A block of queries at a time by public calls, on any device, with autograd over the blocks.

``fused`` is one ``scaled_dot_product_attention`` a block, over its ranges joined: it has no log-sum-exp and no
gradient for a bias. ``plain`` has both, and dropout, and keeps the weights of all blocks for the backward pass:
still linear in the number of queries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.bias import ScoreBias, bias_of
from memtx.ops.attention.plan import additive_mask, cut
from memtx.ops.attention.reference import weigh
from memtx.ops.visibility import Visibility, visible


def fused(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, scale: float, block: int
) -> Tensor:
    """Return the output, with gradients of q, k and v; shapes as in the reference."""
    out = []
    group = q.shape[1] // k.shape[1]
    for start, stop, parts in cut(visibility, block):
        if not parts:
            out.append(torch.zeros_like(q[:, :, start:stop]))
            continue
        masks = [additive_mask(visibility, bias, (start, stop), part, q.dtype) for part in parts]
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


def scores_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return scale * q k', in float32 at least."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (q.to(kind) @ k.to(kind).transpose(-1, -2)) * scale


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    bias: ScoreBias | None,
    scale: float,
    block: int,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, with gradients of q, k, v and the bias; shapes as in the reference."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    outs, lses = [], []
    for start, stop, parts in cut(visibility, block):
        queries = q[:, :, start:stop]
        # A block that meets no key still gives its zeros, by an empty product.
        parts = parts or [(0, 0)]
        keys, values = (torch.cat([x[:, :, low:high] for low, high in parts], dim=2) for x in (k, v))
        scores = scores_of(queries, keys, scale)
        if bias is not None:
            scores = scores + torch.cat([bias_of(bias, (start, stop), part) for part in parts], -1).to(scores.dtype)
        seen = torch.cat([visible(visibility, (start, stop), part) for part in parts], dim=-1)
        out, lse = weigh(scores, seen[:, None], values, dropout)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

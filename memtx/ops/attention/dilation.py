"""Causal windows whose heads see every d-th position (Longformer, Beltagy et al. 2020, sections 3.1 and 4.1).

The positions that a query at offset t sees through distance d are congruent to t modulo d. So each group of heads with
one distance reads d shorter texts with plain windows, and every backend computes dilated windows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.ops.attention.bias import AlibiBias, ScoreBias
from memtx.ops.attention.mask import DilatedWindow, KeyRange, Visibility

Attend = Callable[[Tensor, Tensor, Tensor, Visibility, ScoreBias | None], tuple[Tensor, Tensor | None]]
"""Returns output and log-sum-exp of q, k, v, their visibility and their bias."""


def fold_dilation(x: Tensor, dilation: int) -> Tensor:
    """Reshape ``(batch, heads, n, width)`` to (batch * dilation, heads, ceil(n / dilation), width), padded with zeros.

    Text r of a batch entry has the tokens r, r + dilation, r + 2 dilation, ...
    """
    if dilation == 1:
        return x
    x = F.pad(x, (0, 0, 0, -x.shape[2] % dilation))
    x = x.view(*x.shape[:2], -1, dilation, x.shape[3])  # (batch, heads, n, dilation, width)
    return x.permute(0, 3, 1, 2, 4).flatten(0, 1)


def unfold_dilation(x: Tensor, dilation: int) -> Tensor:
    """Undo :func:`fold_dilation`, up to its padding."""
    if dilation == 1:
        return x
    x = x.view(-1, dilation, *x.shape[1:])  # (batch, dilation, heads, n, width)
    return x.permute(0, 2, 3, 1, 4).flatten(2, 3)


def attend_dilated(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, attend: Attend
) -> tuple[Tensor, Tensor | None]:
    """Return the attention of heads with dilated windows, computed by ``attend`` for each group of equal distance.

    Arguments and results are those of :func:`memtx.ops.attention.dispatch.segment_attention`.
    """
    window = visibility.dilated
    assert window is not None
    outputs, lses = [], []
    for distance, heads in _groups(window, q.shape[1]):
        compute = partial(_fold, visibility, distance, q.shape[0])
        folded = visibility.memo(("dilated", distance, q.shape[0]), compute)
        num_cached = folded.num_keys * distance - (q.shape[2] + -q.shape[2] % distance)
        keys, values = (_select_keys(x, heads, q, num_cached, distance) for x in (k, v))
        group_bias = None if bias is None else _fold_bias(bias, heads, distance, folded)
        out, lse = attend(fold_dilation(q[:, heads], distance), keys, values, folded, group_bias)
        outputs.append(unfold_dilation(out, distance)[:, :, : q.shape[2]])
        if lse is not None:
            lses.append(unfold_dilation(lse[..., None], distance)[:, :, : q.shape[2], 0])
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1) if lses else None


def attend_slots(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, window: DilatedWindow, bias: ScoreBias | None, attend: Attend
) -> Tensor:
    """Return the attention of one token per stream to a ring of slots, ``(batch, heads, 1, head_dim)``.

    ``k`` and ``v`` are ``(batch, kv_heads, slots, head_dim)`` with position p in slot p modulo their number, and
    ``position`` ``(batch,)`` is the tokens'. Only the slots that a head sees are read.
    """
    outputs = []
    for distance, heads in _groups(window, q.shape[1]):
        offset = -distance * torch.arange(window.size, device=q.device)
        visible_position = position[:, None] + offset
        index = (visible_position % k.shape[2])[:, None, :, None].expand(-1, _num_keys(heads, q, k), -1, k.shape[3])
        keys, values = (_key_heads(x, heads, q).gather(2, index) for x in (k, v))
        visible_from = (visible_position < 0).long()
        slots = Visibility(visible_from, torch.ones_like(visible_from), 1, (KeyRange(window.size),))
        group_bias = None if bias is None else AlibiBias(_slopes(bias)[heads], offset[None].double())
        outputs.append(attend(q[:, heads], keys, values, slots, group_bias)[0])
    return torch.cat(outputs, dim=1)


def _groups(window: DilatedWindow, heads: int) -> list[tuple[int, slice]]:
    """Return the distance of each run of heads."""
    groups, start = [], 0
    for distance, run in groupby(window.by_head(heads)):
        stop = start + len(list(run))
        groups.append((distance, slice(start, stop)))
        start = stop
    return groups


def _fold(visibility: Visibility, distance: int, batch_size: int) -> Visibility:
    """Return the visibility of the texts that heads of one distance read, with keys before the window left out."""
    assert visibility.dilated is not None
    size, queries = visibility.dilated.size, visibility.num_queries
    num_past = visibility.num_keys - queries
    num_cached = min(num_past, (size - 1) * distance)
    until = visibility.visible_until[:, num_past - num_cached :].expand(batch_size, -1)
    # Padded keys have an empty interval.
    until = F.pad(until, (-num_cached % distance, -queries % distance), value=-(1 << 40))
    first = -(num_cached + -num_cached % distance) // distance
    until = fold_dilation(until[:, None, :, None], distance)[:, 0, :, 0]  # (batch * distance, keys)
    remainder = torch.arange(distance, device=until.device).repeat(batch_size)[:, None]
    visible_from = torch.arange(first, first + until.shape[1], device=until.device).expand_as(until)
    # The first token of the text, congruent to the remainder, that does not see the key any more.
    until = torch.minimum(-((remainder - until) // distance), visible_from + size)
    key_range = KeyRange(until.shape[1], first, 1, size)
    return Visibility(visible_from, until, -(-queries // distance), (key_range,))


def _select_keys(x: Tensor, heads: slice, q: Tensor, num_cached: int, distance: int) -> Tensor:
    """Return the folded keys of a group of heads: the last ``num_cached`` and the call's, padded in front if fewer."""
    queries = q.shape[2]
    x = _key_heads(x, heads, q)[:, :, max(x.shape[2] - queries - num_cached, 0) :]
    return fold_dilation(F.pad(x, (0, 0, max(num_cached + queries - x.shape[2], 0), 0)), distance)


def _num_keys(heads: slice, q: Tensor, k: Tensor) -> int:
    """Return the number of key heads that serve a group of query heads."""
    group, num_heads = q.shape[1] // k.shape[1], int(heads.stop - heads.start)
    is_whole = heads.start % group == 0 and heads.stop % group == 0
    return num_heads // group if is_whole else num_heads


def _key_heads(x: Tensor, heads: slice, q: Tensor) -> Tensor:
    """Return the key heads of a group of query heads, repeated if they serve heads of other distances, too."""
    group = q.shape[1] // x.shape[1]
    if _num_keys(heads, q, x) * group == heads.stop - heads.start:
        return x[:, heads.start // group : heads.stop // group]
    return x[:, torch.arange(heads.start, heads.stop, device=x.device) // group]


def _slopes(bias: ScoreBias) -> Tensor:
    if isinstance(bias, AlibiBias):
        return bias.slopes
    message = "A dilated window does not support relative positions or a bias learned by distance."
    raise MemtxError(message, "Use rotary positions or ALiBi, or a dilation of 1.")


def _fold_bias(bias: ScoreBias, heads: slice, distance: int, folded: Visibility) -> AlibiBias:
    slopes = _slopes(bias)
    key = ("dilated bias", bias, heads.start)
    return folded.memo(key, lambda: AlibiBias(slopes[heads] * distance, folded.visible_from[:1].double()))

"""Additive score biases: by distance (ALiBi, T5), by query and distance (Transformer-XL), by key (Expire-Span).

Distance is the query's offset minus the key's: positive for the past.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.mask import BankSplit
from memtx.ops.attention.scores import DistanceScores

PAD_COLUMNS = 8
"""Columns that a key bias adds per head: one is used, eight keep the heads aligned in memory."""


# Compared by identity: backends cache what they compute from a bias with the object as key.
@dataclass(frozen=True, eq=False)
class AlibiBias:
    """A penalty that grows linearly with distance (ALiBi, Press et al. 2022, section 3).

    Share one object among layers with the same visibility: backends cache per object.

    Attributes:
        slopes: ``(heads,)``, penalty per token of distance.
        key_offset: ``(batch or 1, keys)``, offsets of the keys.
    """

    slopes: Tensor
    key_offset: Tensor

    @property
    def weight(self) -> Tensor:
        """``(heads, ...)``, the tensor that may be learned."""
        return self.slopes

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.slopes.shape[0]

    @property
    def num_keys(self) -> int:
        """Number of keys."""
        return self.key_offset.shape[-1]

    def compute_bias(self, distance: Tensor) -> Tensor:
        """Return the bias ``(batch, heads, ...)`` for distances ``(batch, heads or 1, ...)``."""
        slopes = self.slopes.to(distance.dtype)
        return -slopes.view(-1, *(1,) * (distance.dim() - 2)) * distance


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """A learned number per head and distance (T5, Raffel et al. 2020, section 2.1).

    With one column per distance it is also the term of Transformer-XL that does not depend on the query (Dai et al.
    2019, section 3.3, term d).

    Attributes:
        table: ``(heads, columns)``.
        key_offset: ``(batch or 1, keys)``, offsets of the keys; fractional distances are rounded down.
        min_distance: Distance of column 0, or of entry 0 of ``buckets``. Distances beyond either end use the last one.
        buckets: ``(distances,)`` int64, column of each distance from ``min_distance`` on. None uses one column per
            distance.
    """

    table: Tensor
    key_offset: Tensor
    min_distance: int = 0
    buckets: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """``(heads, ...)``, the tensor that may be learned."""
        return self.table

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.table.shape[0]

    @property
    def num_keys(self) -> int:
        """Number of keys."""
        return self.key_offset.shape[-1]

    def compute_bias(self, distance: Tensor) -> Tensor:
        """Return the bias ``(batch, heads, ...)`` for distances ``(batch, heads or 1, ...)``."""
        num_distances = self.table.shape[1] if self.buckets is None else self.buckets.shape[0]
        index = (distance.floor().to(torch.int64) - self.min_distance).clamp(0, num_distances - 1)
        if self.buckets is not None:
            index = self.buckets[index]
        heads = torch.arange(self.table.shape[0], device=index.device)
        return self.table[heads.view(-1, *(1,) * (distance.dim() - 2)), index]


@dataclass(frozen=True, eq=False)
class ExpireBias:
    """The logarithm of each key's factor beyond its span, besides another bias (Expire-Span, Sukhbaatar et al. 2021).

    At a distance of d from a key of span e the factor is 1 + (e - d) / ramp, between 0 and 1.

    Attributes:
        spans: ``(batch, keys)``.
        key_offset: ``(batch or 1, keys)``, offsets of the keys.
        ramp: Distance within which a key fades.
        base: The other bias, or None.
    """

    spans: Tensor
    key_offset: Tensor
    ramp: int
    base: AlibiBias | RelativeBias | DistanceScores | None = None

    @property
    def weight(self) -> Tensor:
        """The tensor that may be learned."""
        return self.spans

    def compute_block(self, query_range: tuple[int, int], key_range: tuple[int, int]) -> Tensor:
        """Return the bias for a block of queries and keys, ``(batch, heads or 1, queries, keys)``."""
        keys = slice(*key_range)
        offset = torch.arange(*query_range, device=self.spans.device)[None, :, None]
        distance = (offset - self.key_offset[:, None, keys]).to(self.spans.dtype)
        factor = 1.0 + (self.spans[:, None, keys] - distance) / self.ramp
        bias = factor.clamp(torch.finfo(factor.dtype).eps, 1.0).log()[:, None]
        return (
            bias if self.base is None else bias + compute_block_bias(self.base, query_range, key_range).to(bias.dtype)
        )


ScoreBias = AlibiBias | RelativeBias | DistanceScores | ExpireBias
"""Added to the scaled scores."""


def split_bias(bias: ScoreBias | None, split: BankSplit) -> tuple[ScoreBias | None, ScoreBias | None]:
    """Return the biases of both parts of the keys, the same objects for the layers that share a bias and a split."""
    if bias is None:
        return None, None
    if isinstance(bias, DistanceScores):
        first = bias.num_keys - split.exact.num_keys
        return bias.narrow(0, split.bank.num_keys), bias.narrow(first, split.exact.num_keys)

    def slices() -> tuple[ScoreBias, ScoreBias]:
        first = bias.key_offset.shape[1] - split.exact.num_keys
        offsets = bias.key_offset[:, : split.bank.num_keys], bias.key_offset[:, first:]
        return replace(bias, key_offset=offsets[0]), replace(bias, key_offset=offsets[1])

    return split.bank.memo(("split_bias", bias), slices)


def is_unfused(bias: ScoreBias | None) -> bool:
    """Return True if the bias needs a gradient or depends on queries, which no fused kernel supports."""
    if bias is None or isinstance(bias, DistanceScores):
        return bias is not None
    return bias.weight.requires_grad and torch.is_grad_enabled()


def compute_block_bias(bias: ScoreBias, query_range: tuple[int, int], key_range: tuple[int, int]) -> Tensor:
    """Return the bias for a block of queries and keys, ``(batch or 1, heads, queries, keys)``."""
    if isinstance(bias, DistanceScores | ExpireBias):
        return bias.compute_block(query_range, key_range)
    offset = torch.arange(*query_range, device=bias.key_offset.device, dtype=bias.key_offset.dtype)
    distance = offset[None, :, None] - bias.key_offset[:, None, key_range[0] : key_range[1]]
    return bias.compute_bias(distance[:, None])


def append_key_bias(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Append a column to queries and keys that adds a bias per key to the scores, in any backend.

    ``q`` is ``(batch, queries, heads, head_dim)``, ``k`` and ``v`` are ``(batch, keys, kv_heads, head_dim)``. They, and
    the output of their attention, get PAD_COLUMNS additional columns. ``key_bias``, ``(batch, n)``, is added to the
    scaled scores of the first n keys for every query and head. Pass ``scale``, the factor of the scores, to attention
    as well, since its default depends on the head dimension.
    """
    column = F.pad(key_bias.to(k.dtype) / scale, (0, k.shape[1] - key_bias.shape[1]))[..., None, None]
    k = torch.cat([k, column.expand(-1, -1, k.shape[2], 1)], dim=-1)
    q = torch.cat([q, torch.ones_like(q[..., :1])], dim=-1)
    return F.pad(q, (0, PAD_COLUMNS - 1)), F.pad(k, (0, PAD_COLUMNS - 1)), F.pad(v, (0, PAD_COLUMNS))

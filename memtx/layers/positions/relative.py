"""Transformer-XL's relative positions (Dai et al. 2019, section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, check_divisible, check_probability
from memtx.layers.positions.base import Memoize, Positions
from memtx.memory.base import EntryPositions, Memory
from memtx.memory.kv_ring import DecodePlan
from memtx.ops.attention.scores import DistanceScores, EntryCounts
from memtx.ops.cpu.linear import Linear
from memtx.segment import Segment


def sinusoidal_embedding(distance: Tensor, dim: int, like: Tensor) -> Tensor:
    """Return the embeddings of distances ``(n,)``, sines before cosines, ``(n, dim)`` in the dtype of ``like``."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequency = 1 / 10000 ** (torch.arange(0, dim, 2, device=like.device, dtype=dtype) / dim)
    angle = distance.to(dtype)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)


class RelativePositions(Positions):
    """Scores by content and by distance, each with a learned bias per head.

    The score of query i and key j is (q_i + u) k_j + (q_i + v) W r_(i-j), where r are sinusoids of the distance. It
    is that of position to position for exact states. A compressed entry counts as one position, as in the Compressive
    Transformer (Rae et al. 2020, algorithm 1), whose keys are [compressed memory | memory | segment]: the newest entry
    comes after the oldest exact state that the query sees, and the oldest entry is the farthest. ``Rotary`` and
    ``Alibi`` place an entry at the center of its block instead.

    The backends "reference" and "banded" support it, on the CPU and on CUDA; "auto" chooses "banded".

    Args:
        heads: Number of query heads.
        head_dim: Width of a head.
        width: Width of the sinusoids, even. Defaults to heads * head_dim.
        clamp_length: Largest distance that is told apart; 0 or less for no limit.
        dropout: Dropout rate of the sinusoids.

    Raises:
        MemtxError: A number is out of range.
    """

    def __init__(
        self, heads: int, head_dim: int, width: int | None = None, clamp_length: int = -1, dropout: float = 0.0
    ) -> None:
        super().__init__(heads, head_dim)
        self.width = width if width is not None else heads * head_dim
        check_divisible("Give an even width.", width=self.width, parts=2)
        check_probability(dropout=dropout)
        self.clamp_length, self.dropout = clamp_length, dropout
        self.distance = Linear(self.width, heads * head_dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, head_dim))
        self.position_bias = nn.Parameter(torch.zeros(heads, head_dim))

    def extra_repr(self) -> str:
        """Return the options."""
        return f"width={self.width}, clamp_length={self.clamp_length}, dropout={self.dropout}"

    def reset_parameters(self, std: float) -> None:
        """Initialize all weights as published, with normal values."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)

    def check_memories(self, *memories: Memory[Any]) -> None:
        """Raise MemtxError if the distances of a memory's entries are not known."""
        for memory in memories:
            if not memory.supports_relative_positions:
                message = f"RelativePositions cannot count the entries of {type(memory).__name__} with these options."
                raise MemtxError(message, "Use Rotary or Alibi in its layer.")

    def forward(
        self, q: Tensor, k: Tensor, entry_positions: EntryPositions, segment: Segment
    ) -> tuple[Tensor, Tensor, DistanceScores]:
        """Return queries and keys for the scores by content, and the scores by distance."""
        visibility, count = entry_positions.visibility, entry_positions.counts
        counts = None if count is None else visibility.memo(EntryCounts, count)
        max_distance = visibility.num_keys if (span := visibility.key_ranges[-1].max_span) is None else span - 1
        scores = self._scores(q, visibility.num_keys, counts, max_distance, visibility.memo)
        return q + self.content_bias.to(q.dtype), k, scores

    def step(self, q: Tensor, position: Tensor, plan: DecodePlan, memo: Memoize) -> tuple[Tensor, DistanceScores]:
        """Return the query of one token per stream for the scores by content, and the scores by distance."""
        distance = plan.visibility.memo(EntryCounts, plan.distance)
        counts = EntryCounts(torch.zeros_like(distance[:, :1]), -distance, 0, distance.shape[1])
        scores = self._scores(q, distance.shape[1], counts, 0, plan.visibility.memo)
        return q + self.content_bias.to(q.dtype), scores

    def _scores(
        self, q: Tensor, num_keys: int, counts: EntryCounts | None, max_distance: int, memo: Memoize
    ) -> DistanceScores:
        """Return the scores by distance of queries ``(batch, queries, heads, head_dim)``."""
        num_counted = counts.key.shape[1] if counts is not None else 0
        max_distance = min(max_distance, max(num_keys - num_counted - 1, 0))
        if counts is not None:
            max_distance = max(max_distance, counts.find_bounds((0, q.shape[1]))[1])
        if self.clamp_length > 0:
            max_distance = min(max_distance, self.clamp_length)
        num_distances, width = max_distance + 1, self.width

        def sinusoids() -> Tensor:
            return sinusoidal_embedding(torch.arange(num_distances, device=q.device), width, q)

        r = F.dropout(memo((RelativePositions, num_distances, width), sinusoids), self.dropout, self.training)
        q = (q + self.position_bias.to(q.dtype)).transpose(1, 2) * self.head_dim**-0.5
        num_cached = num_keys - num_counted - q.shape[2] if counts is None or num_keys > num_counted else 0
        # Project the distances, or the queries if these are few: both give (q + v) W r.
        batch_size, queries = q.shape[0], q.shape[2]
        num_products = num_distances * self.head_dim * (width + batch_size * queries)
        is_cheaper = num_products <= batch_size * queries * width * (self.head_dim + num_distances)
        if is_cheaper or not isinstance(self.distance, nn.Linear):
            embedding = self.distance(r).view(-1, self.heads, self.head_dim).transpose(0, 1)
        else:
            weight = self.distance.weight.view(self.heads, self.head_dim, width)
            q, embedding = q @ weight.to(q.dtype), r[None]
        return DistanceScores(q, embedding, num_keys, counts, num_cached)

"""Reformer's attention: local attention within chunks of the text, and LSH attention within chunks of similar tokens.

Kitaev, Kaiser and Levskaya 2020, section 2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError, check_at_least, check_divisible
from memtx.memory.parts import merge_heads, split_heads
from memtx.ops.cpu.linear import Linear
from memtx.ops.lsh import attend_chunks, choose_bucket_factors, hash_vectors, look_adjacent, sample_rotations


class ReformerAttention(nn.Module, ABC):
    """Attention within chunks.

    Args:
        dim: Width of the hidden states.
        heads: Number of heads.
        causal: If True, tokens do not see later ones.
        head_dim: Width of a head. Defaults to dim / heads.
        chunk_length: Tokens per chunk; texts of at most one chunk get full attention.
        num_chunks_before: Previous chunks that a token sees.
        num_chunks_after: Following chunks that a token sees.
        dropout: Dropout rate of the attention weights.

    Raises:
        MemtxError: A number is out of range, or dim is not divisible by heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        causal: bool = True,
        head_dim: int | None = None,
        chunk_length: int = 64,
        num_chunks_before: int = 1,
        num_chunks_after: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if head_dim is None:
            check_divisible("Choose a divisor, or give head_dim.", dim=dim, heads=heads)
        check_at_least(1, chunk_length=chunk_length)
        check_at_least(0, num_chunks_before=num_chunks_before, num_chunks_after=num_chunks_after)
        if causal and num_chunks_after:
            raise MemtxError(
                f"num_chunks_after is {num_chunks_after}, but causal attention sees no later tokens.", "Give 0."
            )
        self.heads = heads
        self.head_dim = head_dim if head_dim is not None else dim // heads
        self.causal = causal
        self.chunk_length = chunk_length
        self.num_chunks_before = num_chunks_before
        self.num_chunks_after = num_chunks_after
        self.dropout = dropout
        self.value = Linear(dim, heads * self.head_dim, bias=False)
        self.out = Linear(heads * self.head_dim, dim, bias=False)
        self._add_projections(dim, heads * self.head_dim)

    @abstractmethod
    def _add_projections(self, dim: int, inner_dim: int) -> None:
        """Create the query and key projections."""

    @abstractmethod
    def forward(self, x: Tensor, attention_mask: Tensor | None, buckets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the output, ``(batch, n, dim)``, and the hash buckets of the tokens, if any.

        Args:
            x: Hidden states, ``(batch, n, dim)``; n is at most one chunk or a multiple of it.
            attention_mask: False for padding, ``(batch, n)`` bool. None if there is no padding.
            buckets: Buckets of an earlier call, to reproduce its result. None computes them.
        """

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, mask: Tensor | None, *, mask_self: bool
    ) -> tuple[Tensor, Tensor]:
        """Attend from each chunk to itself and its neighbors, for tokens in the order that is cut into chunks.

        Args:
            q: Queries; keys and values have the same shape, ``(batch, heads, m, head_dim)``, as the output.
            k: Keys.
            v: Values.
            position: Positions in the text, ``(batch or 1, heads or 1, m)`` int64.
            mask: False for padding, ``(batch, heads or 1, m)`` bool. None if there is no padding.
            mask_self: If True, a token sees itself only if it sees nothing else.

        Returns:
            Output and log-sum-exp, ``(batch, heads, m)``.
        """

        def split(x: Tensor, before: int = 0, after: int = 0) -> Tensor:
            chunks = x.reshape(*x.shape[:2], -1, min(self.chunk_length, x.shape[2]), *x.shape[3:])
            return chunks if chunks.shape[2] == 1 else look_adjacent(chunks, before, after)

        visible = (self.num_chunks_before, self.num_chunks_after)
        out, lse = attend_chunks(
            split(q),
            split(k, *visible) * self.head_dim**-0.5,
            split(v, *visible),
            split(position),
            split(position, *visible),
            split(mask, *visible) if mask is not None else None,
            causal=self.causal,
            mask_self=mask_self,
            dropout=self.dropout if self.training else 0.0,
        )
        return out.flatten(2, 3), lse.flatten(2, 3)


class LocalAttention(ReformerAttention):
    """Attention within chunks of the text."""

    def _add_projections(self, dim: int, inner_dim: int) -> None:
        """Create the query and key projections."""
        self.query = Linear(dim, inner_dim, bias=False)
        self.key = Linear(dim, inner_dim, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None, buckets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the output, ``(batch, n, dim)``, and None."""
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.query, self.key, self.value))
        position = torch.arange(x.shape[1], device=x.device)[None, None]
        mask = attention_mask[:, None] if attention_mask is not None else None
        out, _ = self.attend(q, k, v, position, mask, mask_self=False)
        return self.out(merge_heads(out)), None


class LSHAttention(ReformerAttention):
    """Attention within chunks of tokens with similar hashes, in several rounds; queries and keys are shared.

    Arguments not listed are those of :class:`ReformerAttention`.

    Args:
        num_hashes: Hash rounds.
        num_buckets: Number of buckets, even, or its even factors. Defaults to about two per chunk of the text.
        max_length: Longest text that the model is for, in tokens; used only if ``num_buckets`` is None.
        seed: Seed of the random rotations, which are then the same in every layer and call. None draws new ones.

    Raises:
        MemtxError: A number is out of range, or dim is not divisible by heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        causal: bool = True,
        head_dim: int | None = None,
        chunk_length: int = 64,
        num_chunks_before: int = 1,
        num_chunks_after: int = 0,
        num_hashes: int = 1,
        num_buckets: int | Sequence[int] | None = None,
        max_length: int = 4096,
        seed: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, causal, head_dim, chunk_length, num_chunks_before, num_chunks_after, dropout)
        check_at_least(1, num_hashes=num_hashes)
        self.bucket_factors: tuple[int, ...] | None = None
        if num_buckets is not None:
            factors = (num_buckets,) if isinstance(num_buckets, int) else tuple(num_buckets)
            if not factors or any(factor < 2 or factor % 2 for factor in factors):
                raise MemtxError(f"num_buckets is {num_buckets}.", "Give even numbers of at least 2.")
            self.bucket_factors = factors
        self.num_hashes = num_hashes
        self.max_length = max_length
        self.seed = seed

    def _add_projections(self, dim: int, inner_dim: int) -> None:
        """Create the shared projection of queries and keys."""
        self.query_key = Linear(dim, inner_dim, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None, buckets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the output, ``(batch, n, dim)``, and the buckets, ``(batch, heads, num_hashes, n)``."""
        q, v = split_heads(self.query_key(x), self.heads), split_heads(self.value(x), self.heads)
        n = x.shape[1]
        if n <= self.chunk_length:
            position = torch.arange(n, device=x.device)[None, None]
            out, _ = self._attend_sorted(q, v, position, attention_mask)
        else:
            buckets = self._hash_buckets(q, attention_mask) if buckets is None else buckets
            # Sort by round, then by bucket, then by position in the text.
            num_buckets = int(buckets.max()) + 1
            hash_round = torch.arange(self.num_hashes, device=x.device)[:, None]
            order = (buckets + hash_round * num_buckets).flatten(2).argsort(dim=-1, stable=True)
            position = order % n
            index = position[..., None].expand(-1, -1, -1, self.head_dim)
            out, lse = self._attend_sorted(q.gather(2, index), v.gather(2, index), position, attention_mask)
            rank = torch.arange(order.shape[2], device=x.device).expand_as(order)
            inverse = torch.empty_like(order).scatter_(2, order, rank)
            by_round = (x.shape[0], self.heads, self.num_hashes, n)
            out = out.gather(2, inverse[..., None].expand_as(out)).view(*by_round, -1)
            lse = lse.gather(2, inverse).view(by_round)
            # As in the published models, including rounding: where a token sees only itself in two rounds, both lse are
            # near -1e5, and float32 keeps the logarithm of their sum to 0.004. A softmax would be more accurate.
            weights = torch.exp(lse - torch.logsumexp(lse, dim=2, keepdim=True))
            out = (out * weights[..., None].to(out.dtype)).sum(2)
        return self.out(merge_heads(out)), buckets

    def _hash_buckets(self, q: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the buckets of q, in the smallest integer type that holds them."""
        factors = self.bucket_factors
        if factors is None:
            factors = choose_bucket_factors(q.shape[2], self.chunk_length, self.max_length)
        vectors = q.detach()
        rotations = sample_rotations(self.heads, self.head_dim, self.num_hashes, factors, self.seed, vectors)
        buckets = hash_vectors(vectors, rotations, factors)
        num_buckets = math.prod(factors)
        if attention_mask is not None:
            # Padding has a bucket of its own after all others.
            buckets = torch.where(attention_mask[:, None, None], buckets, num_buckets)
        return buckets.to(torch.uint8 if num_buckets < 256 else torch.int16 if num_buckets < 1 << 15 else torch.int64)

    def _attend_sorted(
        self, q: Tensor, v: Tensor, position: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the output, ``(batch, heads, m, head_dim)``, and its log-sum-exp of sorted tokens at ``position``."""
        # Keys are queries normalized to a mean square of 1; the epsilon protects zero vectors.
        k = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6)
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, None].expand(-1, position.shape[1], -1)
            mask = mask.gather(2, position.expand(attention_mask.shape[0], -1, -1))
        return self.attend(q, k, v, position, mask, mask_self=True)

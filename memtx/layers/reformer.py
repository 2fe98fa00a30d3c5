"""Reformer's two kinds of attention: within chunks of the text, and within chunks of what hashes alike.

Kitaev, Kaiser and Levskaya 2020, section 2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.ops.cpu.linear import Linear
from memtx.ops.lsh import attend_chunks, choose_bucket_factors, hash_vectors, look_adjacent, sample_rotations


class ReformerAttention(nn.Module, ABC):
    """Attention of a text's places within chunks.

    Args:
        dim: width of the hidden states.
        heads: how many.
        causal: whether places behind a query are unseen.
        head_dim: width of a head; dim / heads by default.
        chunk_length: places of a chunk; a text of no more is read with everyone seeing everyone.
        num_chunks_before: chunks before its own that a place sees.
        num_chunks_after: chunks after its own that it sees.
        dropout: of attention weights.

    Raises:
        MemtxError: a number is out of range, or heads do not divide dim.
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
        if head_dim is None and (heads < 1 or dim % heads):
            raise MemtxError(f"dim is {dim}, which {heads} heads do not divide.", "Choose a divisor, or give head_dim.")
        if chunk_length < 1 or num_chunks_before < 0 or num_chunks_after < 0:
            raise MemtxError(
                f"Chunks are of {chunk_length} places, "
                f"{num_chunks_before} before and {num_chunks_after} after are seen.",
                "Give at least 1, 0 and 0.",
            )
        if causal and num_chunks_after:
            raise MemtxError(
                f"num_chunks_after is {num_chunks_after} where places behind a query are unseen.", "Give 0."
            )
        self.heads = heads
        self.head_dim = head_dim if head_dim is not None else dim // heads
        self.causal = causal
        self.chunk_length = chunk_length
        self.num_chunks_before = num_chunks_before
        self.num_chunks_after = num_chunks_after
        self.dropout_rate = dropout
        self.value = Linear(dim, heads * self.head_dim, bias=False)
        self.out = Linear(heads * self.head_dim, dim, bias=False)

    @property
    def dropout(self) -> float:
        """The probability with which a weight is dropped now."""
        return self.dropout_rate if self.training else 0.0

    def split_heads(self, x: Tensor) -> Tensor:
        """(rows, n, heads * head_dim) -> (rows, heads, n, head_dim)."""
        return x.view(*x.shape[:-1], self.heads, self.head_dim).transpose(1, 2)

    def split_chunks(self, x: Tensor) -> Tensor:
        """(rows, heads, n, ...) -> (rows, heads, chunks, chunk_length, ...); a short text is one chunk."""
        n = x.shape[2]
        return x.reshape(*x.shape[:2], -1, min(self.chunk_length, n), *x.shape[3:])

    def with_neighbors(self, x: Tensor) -> Tensor:
        """Return chunks with their neighbours; a short text has none."""
        return x if x.shape[2] == 1 else look_adjacent(x, self.num_chunks_before, self.num_chunks_after)

    @abstractmethod
    def forward(self, x: Tensor, attention_mask: Tensor | None, buckets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (rows, n, dim), and the buckets that places fell into.

        Args:
            x: (rows, n, dim); n is at most a chunk or a multiple of it.
            attention_mask: (rows, n) bool, False for padding; None for none.
            buckets: as returned before, to make the same result again; None for a first time.
        """


class LocalAttention(ReformerAttention):
    """Chunks of the text."""

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
        super().__init__(dim, heads, causal, head_dim, chunk_length, num_chunks_before, num_chunks_after, dropout)
        self.query = Linear(dim, heads * self.head_dim, bias=False)
        self.key = Linear(dim, heads * self.head_dim, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None, buckets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (rows, n, dim) and None."""
        q, k, v = (self.split_chunks(self.split_heads(part(x))) for part in (self.query, self.key, self.value))
        place = self.split_chunks(torch.arange(x.shape[1], device=x.device)[None, None])
        out, _ = attend_chunks(
            q,
            self.with_neighbors(k) * self.head_dim**-0.5,
            self.with_neighbors(v),
            place,
            self.with_neighbors(place),
            None if attention_mask is None else self.with_neighbors(self.split_chunks(attention_mask[:, None])),
            causal=self.causal,
            mask_self=False,
            dropout=self.dropout,
        )
        made: Tensor = self.out(out.flatten(2, 3).transpose(1, 2).flatten(2))
        return made, None


class LSHAttention(ReformerAttention):
    """Chunks of places that hash alike, in several rounds; queries are the keys, of length one.

    Args:
        dim: width of the hidden states.
        heads: how many.
        causal: whether places behind a query are unseen.
        head_dim: width of a head; dim / heads by default.
        chunk_length: places of a chunk.
        num_chunks_before: chunks before its own that a place sees.
        num_chunks_after: chunks after its own that it sees.
        num_hashes: of hashing.
        num_buckets: how many, even, or even factors of their number; by default about two for each chunk of the text.
        max_length: places of the longest text that the model is for; used where ``num_buckets`` is left open.
        seed: of the random directions, which then are the same in every layer and call; None for ever new ones.
        dropout: of attention weights.

    Raises:
        MemtxError: a number is out of range.
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
        factors = (
            None if num_buckets is None else (num_buckets,) if isinstance(num_buckets, int) else tuple(num_buckets)
        )
        if num_hashes < 1 or (factors is not None and (not factors or any(n < 2 or n % 2 for n in factors))):
            raise MemtxError(
                f"num_hashes is {num_hashes}, num_buckets {num_buckets}.", "Give at least 1 round and even numbers."
            )
        self.num_hashes = num_hashes
        self.bucket_factors = factors
        self.max_length = max_length
        self.seed = seed
        self.query_key = Linear(dim, heads * self.head_dim, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None, buckets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (rows, n, dim) and the buckets (rows, heads, num_hashes, n), in as few bytes as hold them."""
        q, v = self.split_heads(self.query_key(x)), self.split_heads(self.value(x))
        rows, n = x.shape[:2]
        if n <= self.chunk_length:
            order = torch.arange(n, device=x.device)[None, None]
            out, _ = self._attend_sorted(q, v, order, attention_mask)
        else:
            buckets = self._hash_buckets(q, attention_mask) if buckets is None else buckets
            # Rounds stand one after another, within a round buckets, within a bucket places as in the text.
            most = int(buckets.max()) + 1
            rounds = torch.arange(self.num_hashes, device=x.device)[:, None] * most
            order = (buckets + rounds).flatten(2).argsort(dim=-1, stable=True)  # (rows, heads, num_hashes * n)
            place = order % n
            index = place[..., None].expand(-1, -1, -1, self.head_dim)
            out, lse = self._attend_sorted(q.gather(2, index), v.gather(2, index), place, attention_mask)
            back = torch.empty_like(order).scatter_(
                2, order, torch.arange(order.shape[2], device=x.device).expand_as(order)
            )
            out = out.gather(2, back[..., None].expand_as(out)).view(rows, self.heads, self.num_hashes, n, -1)
            lse = lse.gather(2, back).view(rows, self.heads, self.num_hashes, n)
            # As the published models do it, to the rounding: where a place sees itself alone in two rounds, both are
            # near -1e5, and float32 keeps their sum's logarithm to 0.004. A softmax would be nearer to the truth.
            shares = torch.exp(lse - torch.logsumexp(lse, dim=2, keepdim=True))
            out = (out * shares[..., None].to(out.dtype)).sum(2)
        made: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return made, buckets

    def _hash_buckets(self, q: Tensor, attention_mask: Tensor | None) -> Tensor:
        n = q.shape[2]
        factors = (
            self.bucket_factors
            if self.bucket_factors is not None
            else choose_bucket_factors(n, self.chunk_length, self.max_length)
        )
        found = q.detach()
        directions = sample_rotations(self.heads, self.head_dim, self.num_hashes, factors, self.seed, found)
        buckets = hash_vectors(found, directions, factors)
        count = math.prod(factors)
        if attention_mask is not None:
            # Padding has a bucket of its own, behind all others.
            buckets = torch.where(attention_mask[:, None, None], buckets, count)
        return buckets.to(torch.uint8 if count < 256 else torch.int16 if count < 1 << 15 else torch.int64)

    def _attend_sorted(
        self, q: Tensor, v: Tensor, position: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return out (rows, heads, m, head_dim) and lse (rows, heads, m) of places in their order, (.., m)."""
        # Keys of length one: their mean square is one, up to what keeps a zero from being divided by.
        k = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6) * self.head_dim**-0.5
        asking = self.split_chunks(position)
        there = None
        if attention_mask is not None:
            there = attention_mask[:, None].expand(-1, position.shape[1], -1)
            there = there.gather(2, position.expand(attention_mask.shape[0], -1, -1))
            there = self.with_neighbors(self.split_chunks(there))
        out, lse = attend_chunks(
            self.split_chunks(q),
            self.with_neighbors(self.split_chunks(k)),
            self.with_neighbors(self.split_chunks(v)),
            asking,
            self.with_neighbors(asking),
            there,
            causal=self.causal,
            mask_self=True,
            dropout=self.dropout,
        )
        return out.flatten(2, 3), lse.flatten(2, 3)

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
from memtx.ops.attention.lsh import adjacent, attend_in_chunks, bucket_factors, hashed, rotations
from memtx.ops.linear import Linear


class ChunkAttention(nn.Module, ABC):
    """Attention of a text's places within chunks.

    Args:
        dim: width of the hidden states.
        heads: how many.
        causal: whether places behind a query are unseen.
        head_dim: width of a head; dim / heads by default.
        chunk: places of a chunk; a text of no more is read with everyone seeing everyone.
        before: chunks before its own that a place sees.
        after: chunks after its own that it sees.
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
        chunk: int = 64,
        before: int = 1,
        after: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if head_dim is None and (heads < 1 or dim % heads):
            raise MemtxError(f"dim is {dim}, which {heads} heads do not divide.", "Choose a divisor, or give head_dim.")
        if chunk < 1 or before < 0 or after < 0:
            raise MemtxError(
                f"Chunks are of {chunk} places, {before} before and {after} after are seen.",
                "Give at least 1, 0 and 0.",
            )
        if causal and after:
            raise MemtxError(f"after is {after} where places behind a query are unseen.", "Give 0.")
        self.heads = heads
        self.head_dim = head_dim if head_dim is not None else dim // heads
        self.causal = causal
        self.chunk = chunk
        self.before = before
        self.after = after
        self.rate = dropout
        self.value = Linear(dim, heads * self.head_dim, bias=False)
        self.out = Linear(heads * self.head_dim, dim, bias=False)

    @property
    def dropout(self) -> float:
        """The probability with which a weight is dropped now."""
        return self.rate if self.training else 0.0

    def in_heads(self, x: Tensor) -> Tensor:
        """(rows, n, heads * head_dim) -> (rows, heads, n, head_dim)."""
        return x.view(*x.shape[:-1], self.heads, self.head_dim).transpose(1, 2)

    def in_chunks(self, x: Tensor) -> Tensor:
        """(rows, heads, n, ...) -> (rows, heads, chunks, chunk, ...); a short text is one chunk."""
        n = x.shape[2]
        return x.reshape(*x.shape[:2], -1, min(self.chunk, n), *x.shape[3:])

    def around(self, x: Tensor) -> Tensor:
        """Return chunks with their neighbours; a short text has none."""
        return x if x.shape[2] == 1 else adjacent(x, self.before, self.after)

    @abstractmethod
    def forward(self, x: Tensor, present: Tensor | None, buckets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (rows, n, dim), and the buckets that places fell into.

        Args:
            x: (rows, n, dim); n is at most a chunk or a multiple of it.
            present: (rows, n) bool, False for padding; None for none.
            buckets: as returned before, to make the same result again; None for a first time.
        """


class LocalAttention(ChunkAttention):
    """Chunks of the text."""

    def __init__(
        self,
        dim: int,
        heads: int,
        causal: bool = True,
        head_dim: int | None = None,
        chunk: int = 64,
        before: int = 1,
        after: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, causal, head_dim, chunk, before, after, dropout)
        self.query = Linear(dim, heads * self.head_dim, bias=False)
        self.key = Linear(dim, heads * self.head_dim, bias=False)

    def forward(self, x: Tensor, present: Tensor | None, buckets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (rows, n, dim) and None."""
        q, k, v = (self.in_chunks(self.in_heads(part(x))) for part in (self.query, self.key, self.value))
        place = self.in_chunks(torch.arange(x.shape[1], device=x.device)[None, None])
        out, _ = attend_in_chunks(
            q,
            self.around(k) * self.head_dim**-0.5,
            self.around(v),
            place,
            self.around(place),
            None if present is None else self.around(self.in_chunks(present[:, None])),
            causal=self.causal,
            apart=False,
            dropout=self.dropout,
        )
        made: Tensor = self.out(out.flatten(2, 3).transpose(1, 2).flatten(2))
        return made, None


class HashAttention(ChunkAttention):
    """Chunks of places that hash alike, in several rounds; queries are the keys, of length one.

    Args:
        dim: width of the hidden states.
        heads: how many.
        causal: whether places behind a query are unseen.
        head_dim: width of a head; dim / heads by default.
        chunk: places of a chunk.
        before: chunks before its own that a place sees.
        after: chunks after its own that it sees.
        rounds: of hashing.
        buckets: how many, even, or even factors of their number; by default about two for each chunk of the text.
        longest: places of the longest text that the model is for; used where ``buckets`` is left open.
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
        chunk: int = 64,
        before: int = 1,
        after: int = 0,
        rounds: int = 1,
        buckets: int | Sequence[int] | None = None,
        longest: int = 4096,
        seed: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, causal, head_dim, chunk, before, after, dropout)
        factors = None if buckets is None else (buckets,) if isinstance(buckets, int) else tuple(buckets)
        if rounds < 1 or (factors is not None and (not factors or any(n < 2 or n % 2 for n in factors))):
            raise MemtxError(f"rounds is {rounds}, buckets {buckets}.", "Give at least 1 round and even numbers.")
        self.rounds = rounds
        self.factors = factors
        self.longest = longest
        self.seed = seed
        self.query_key = Linear(dim, heads * self.head_dim, bias=False)

    def forward(self, x: Tensor, present: Tensor | None, buckets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (rows, n, dim) and the buckets (rows, heads, rounds, n), in as few bytes as hold them."""
        q, v = self.in_heads(self.query_key(x)), self.in_heads(self.value(x))
        rows, n = x.shape[:2]
        if n <= self.chunk:
            order = torch.arange(n, device=x.device)[None, None]
            out, _ = self._attended(q, v, order, present)
        else:
            buckets = self._buckets(q, present) if buckets is None else buckets
            # Rounds stand one after another, within a round buckets, within a bucket places as in the text.
            most = int(buckets.max()) + 1
            rounds = torch.arange(self.rounds, device=x.device)[:, None] * most
            order = (buckets + rounds).flatten(2).argsort(dim=-1, stable=True)  # (rows, heads, rounds * n)
            place = order % n
            index = place[..., None].expand(-1, -1, -1, self.head_dim)
            out, lse = self._attended(q.gather(2, index), v.gather(2, index), place, present)
            back = torch.empty_like(order).scatter_(
                2, order, torch.arange(order.shape[2], device=x.device).expand_as(order)
            )
            out = out.gather(2, back[..., None].expand_as(out)).view(rows, self.heads, self.rounds, n, -1)
            lse = lse.gather(2, back).view(rows, self.heads, self.rounds, n)
            # As the published models do it, to the rounding: where a place sees itself alone in two rounds, both are
            # near -1e5, and float32 keeps their sum's logarithm to 0.004. A softmax would be nearer to the truth.
            shares = torch.exp(lse - torch.logsumexp(lse, dim=2, keepdim=True))
            out = (out * shares[..., None].to(out.dtype)).sum(2)
        made: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return made, buckets

    def _buckets(self, q: Tensor, present: Tensor | None) -> Tensor:
        n = q.shape[2]
        factors = self.factors if self.factors is not None else bucket_factors(n, self.chunk, self.longest)
        found = q.detach()
        directions = rotations(self.heads, self.head_dim, self.rounds, factors, self.seed, found)
        buckets = hashed(found, directions, factors)
        count = math.prod(factors)
        if present is not None:
            # Padding has a bucket of its own, behind all others.
            buckets = torch.where(present[:, None, None], buckets, count)
        return buckets.to(torch.uint8 if count < 256 else torch.int16 if count < 1 << 15 else torch.int64)

    def _attended(self, q: Tensor, v: Tensor, place: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return out (rows, heads, m, head_dim) and lse (rows, heads, m) of places in their order, (.., m)."""
        # Keys of length one: their mean square is one, up to what keeps a zero from being divided by.
        k = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6) * self.head_dim**-0.5
        asking = self.in_chunks(place)
        there = None
        if present is not None:
            there = present[:, None].expand(-1, place.shape[1], -1)
            there = there.gather(2, place.expand(present.shape[0], -1, -1))
            there = self.around(self.in_chunks(there))
        out, lse = attend_in_chunks(
            self.in_chunks(q),
            self.around(self.in_chunks(k)),
            self.around(self.in_chunks(v)),
            asking,
            self.around(asking),
            there,
            causal=self.causal,
            apart=True,
            dropout=self.dropout,
        )
        return out.flatten(2, 3), lse.flatten(2, 3)

"""Big Bird's attention: blocks see their neighbours, the text's first and last block, and some at random.

Zaheer et al. 2020, section 2 and appendix A: block-wise windows, global blocks of the text itself, random blocks. The
first and the last block see everything. A block that is drawn though it is seen already counts twice, as in the
published models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.layers.pattern_attention import PatternAttention, seen_by_all, side_by_side
from memtx.layers.reading import Reading
from memtx.ops.attention.dispatch import Backend, segment_attention
from memtx.ops.random_blocks import draw
from memtx.ops.visibility import Pattern, Section, Visibility


class BlockAttention(PatternAttention):
    """Windows of three blocks, two global blocks, and random blocks.

    Texts of at most ``(5 + 2 * random_blocks) * size`` tokens are read with everyone seeing everyone, as published.

    Args:
        dim: width of the hidden states.
        heads: how many.
        layer: the layer's number, from 0.
        size: tokens a block.
        random_blocks: how many each block of queries sees.
        longest: tokens of the longest text that the model is for (see :func:`memtx.ops.random_blocks.draw`).
        seed: of the random blocks; the layer's number by default, as published.
        bias: whether queries, keys and values have biases.
        dropout: of attention weights.
        backend: of the attention operation.

    Raises:
        MemtxError: a number is out of range.
    """

    knows_random_blocks = True

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int = 0,
        size: int = 64,
        random_blocks: int = 3,
        longest: int = 4096,
        seed: int | None = None,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(dim, heads, layer, bias=bias, dropout=dropout, backend=backend)
        if size < 1 or random_blocks < 0:
            raise MemtxError(
                f"Blocks are of {size} tokens and {random_blocks} are drawn.", "Give at least 1 and at least 0."
            )
        self.size = size
        self.random_blocks = random_blocks
        self.longest = longest
        self.seed = layer if seed is None else seed

    def attend(self, x: Tensor, reading: Reading) -> Tensor:
        """Return the heads' results side by side, (rows, length, dim), zero at padding, of x (rows, length, dim)."""
        q, k, v = (self.in_heads(part(x)) for part in (self.query, self.key, self.value))
        if reading.length <= (5 + 2 * self.random_blocks) * self.size:
            seen = seen_by_all(reading, reading.length)
            return side_by_side(segment_attention(q, k, v, seen, dropout=self.dropout, backend=self.backend))
        whole = reading.once(("whole blocks", self.size), lambda: self._whole(reading))
        size, length = self.size, whole.length
        q, k, v = (F.pad(part, (0, 0, 0, length - reading.length)) for part in (q, k, v))
        # The two global blocks side by side, before all others.
        q, k, v = (torch.cat([p[:, :, :size], p[:, :, -size:], p[:, :, size:-size]], dim=2) for p in (q, k, v))
        everything = reading.once(("ends", self.size), lambda: self._for_ends(whole))
        ends = segment_attention(
            q[:, :, : 2 * size], k, v, everything, dropout=self.dropout, backend=self.backend
        )  # (rows, heads, 2 * size, head_dim)
        settings = ("blocks", self.size, self.heads, self.layer, self.seed, self.random_blocks, self.longest)
        others = reading.once(settings, lambda: self._visibility(whole, reading.random_blocks.get(self.layer)))
        middle = segment_attention(q[:, :, 2 * size :], k, v, others, dropout=self.dropout, backend=self.backend)
        parts = [side_by_side(part) for part in (ends[:, :, :size], middle, ends[:, :, size:])]
        out = torch.cat(parts, dim=1)[:, : reading.length]
        return out if reading.present is None else out.masked_fill(~reading.present[..., None], 0.0)

    def _whole(self, reading: Reading) -> Reading:
        """Return the reading of whole blocks: padded, global blocks first."""
        more = -reading.length % self.size
        present = reading.present
        if present is None and more == 0:
            return reading
        if present is None:
            present = torch.ones(1, reading.length, dtype=torch.bool, device=reading.device)
        present = F.pad(present, (0, more))
        size = self.size
        present = torch.cat([present[:, :size], present[:, -size:], present[:, size:-size]], dim=1)
        return Reading(reading.length + more, reading.device, present)

    def _for_ends(self, whole: Reading) -> Visibility:
        return seen_by_all(whole, 2 * self.size)

    def _visibility(self, whole: Reading, given: Tensor | None) -> Visibility:
        """Return what the blocks between the ends see of [first | last | those between]."""
        size, queries = self.size, whole.length - 2 * self.size
        there = whole.present
        if there is None:
            there = torch.ones(1, whole.length, dtype=torch.bool, device=whole.device)
        block = torch.arange(queries, device=whole.device) // size
        ends = torch.zeros(2 * size, dtype=torch.int64, device=whole.device)
        born = torch.cat([ends, (block - 1) * size]).expand_as(there)
        expires = torch.cat([ends + queries, (block + 2) * size]).expand_as(there)
        # An end of life before its beginning is never seen.
        expires = torch.where(there, expires, -queries)
        sections = (Section(2 * size), Section(queries, -size, size, 2 * size + 1, grain=size))
        blocks = self._blocks(whole, given)
        if blocks.shape[-1] == 0:
            return Visibility(born, expires, queries, sections)
        pattern = Pattern(
            torch.zeros_like(expires), torch.where(there, queries, 0), blocks=blocks, size=size, repeats=True
        )
        return Visibility(born, expires, queries, sections, pattern)

    def _blocks(self, whole: Reading, given: Tensor | None) -> Tensor:
        """Return the table of random blocks, numbered as the keys lie."""
        blocks = whole.length // self.size
        table = given
        if table is None:
            table = draw(whole.length, self.size, self.random_blocks, self.heads, longest=self.longest, seed=self.seed)
        if table.dim() != 3 or table.shape[0] not in (1, self.heads) or table.shape[1] != blocks - 2:
            raise MemtxError(
                f"random_blocks of layer {self.layer} is {tuple(table.shape)}, expected "
                f"({self.heads}, {blocks - 2}, any).",
                "Give the blocks that each block of queries but the first and the last sees.",
            )
        if table.is_floating_point() or (table.numel() and not 0 <= int(table.min()) <= int(table.max()) < blocks):
            raise MemtxError(
                f"random_blocks of layer {self.layer} names blocks that are not there.", f"Give 0 to {blocks - 1}."
            )
        table = table.to(whole.device, torch.int64)
        return torch.where(table == 0, 0, torch.where(table == blocks - 1, 1, table + 1))

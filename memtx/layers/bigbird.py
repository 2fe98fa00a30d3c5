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
from memtx.layers.encoder_attention import EncoderAttention, full_visibility, merge_heads
from memtx.layers.encoder_inputs import EncoderInputs
from memtx.ops.attention.dispatch import AttentionBackend, segment_attention
from memtx.ops.attention.mask import KeyRange, SparsePattern, Visibility
from memtx.ops.attention.sparse import sample_random_blocks


class BigBirdAttention(EncoderAttention):
    """Windows of three blocks, two global blocks, and random blocks.

    Texts of at most ``(5 + 2 * num_random_blocks) * block_size`` tokens are read with everyone seeing everyone, as
    published.

    Args:
        dim: width of the hidden states.
        heads: how many.
        layer_index: the layer's number, from 0.
        block_size: tokens a block.
        num_random_blocks: how many each block of queries sees.
        max_length: tokens of the longest text that the model is for (see
            :func:`memtx.ops.attention.sparse.sample_random_blocks`).
        seed: of the random blocks; the layer's number by default, as published.
        bias: whether queries, keys and values have biases.
        dropout: of attention weights.
        backend: of the attention operation.

    Raises:
        MemtxError: a number is out of range.
    """

    supports_random_blocks = True

    def __init__(
        self,
        dim: int,
        heads: int,
        layer_index: int = 0,
        block_size: int = 64,
        num_random_blocks: int = 3,
        max_length: int = 4096,
        seed: int | None = None,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        backend: AttentionBackend = "auto",
    ) -> None:
        super().__init__(dim, heads, layer_index, bias=bias, dropout=dropout, backend=backend)
        if block_size < 1 or num_random_blocks < 0:
            raise MemtxError(
                f"Blocks are of {block_size} tokens and {num_random_blocks} are drawn.",
                "Give at least 1 and at least 0.",
            )
        self.block_size = block_size
        self.num_random_blocks = num_random_blocks
        self.max_length = max_length
        self.seed = layer_index if seed is None else seed

    def attend(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the heads' results side by side, (rows, length, dim), zero at padding, of x (rows, length, dim)."""
        q, k, v = (self.split_heads(part(x)) for part in (self.query, self.key, self.value))
        if inputs.length <= (5 + 2 * self.num_random_blocks) * self.block_size:
            seen = full_visibility(inputs, inputs.length)
            return merge_heads(segment_attention(q, k, v, seen, dropout=self.dropout, backend=self.backend)[0])
        whole = inputs.memo(("whole blocks", self.block_size), lambda: self._pad_to_blocks(inputs))
        size, length = self.block_size, whole.length
        q, k, v = (F.pad(part, (0, 0, 0, length - inputs.length)) for part in (q, k, v))
        # The two global blocks side by side, before all others.
        q, k, v = (torch.cat([p[:, :, :size], p[:, :, -size:], p[:, :, size:-size]], dim=2) for p in (q, k, v))
        everything = inputs.memo(("ends", self.block_size), lambda: self._end_block_visibility(whole))
        ends, _ = segment_attention(
            q[:, :, : 2 * size], k, v, everything, dropout=self.dropout, backend=self.backend
        )  # (rows, heads, 2 * size, head_dim)
        settings = (
            "blocks",
            self.block_size,
            self.heads,
            self.layer_index,
            self.seed,
            self.num_random_blocks,
            self.max_length,
        )
        others = inputs.memo(
            settings, lambda: self._middle_visibility(whole, inputs.random_blocks.get(self.layer_index))
        )
        middle, _ = segment_attention(q[:, :, 2 * size :], k, v, others, dropout=self.dropout, backend=self.backend)
        parts = [merge_heads(part) for part in (ends[:, :, :size], middle, ends[:, :, size:])]
        out = torch.cat(parts, dim=1)[:, : inputs.length]
        return out if inputs.attention_mask is None else out.masked_fill(~inputs.attention_mask[..., None], 0.0)

    def _pad_to_blocks(self, inputs: EncoderInputs) -> EncoderInputs:
        """Return the reading of whole blocks: padded, global blocks first."""
        more = -inputs.length % self.block_size
        present = inputs.attention_mask
        if present is None and more == 0:
            return inputs
        if present is None:
            present = torch.ones(1, inputs.length, dtype=torch.bool, device=inputs.device)
        present = F.pad(present, (0, more))
        size = self.block_size
        present = torch.cat([present[:, :size], present[:, -size:], present[:, size:-size]], dim=1)
        return EncoderInputs(inputs.length + more, inputs.device, present)

    def _end_block_visibility(self, padded: EncoderInputs) -> Visibility:
        return full_visibility(padded, 2 * self.block_size)

    def _middle_visibility(self, padded: EncoderInputs, random_blocks: Tensor | None) -> Visibility:
        """Return what the blocks between the ends see of [first | last | those between]."""
        size, queries = self.block_size, padded.length - 2 * self.block_size
        there = padded.attention_mask
        if there is None:
            there = torch.ones(1, padded.length, dtype=torch.bool, device=padded.device)
        block = torch.arange(queries, device=padded.device) // size
        ends = torch.zeros(2 * size, dtype=torch.int64, device=padded.device)
        born = torch.cat([ends, (block - 1) * size]).expand_as(there)
        expires = torch.cat([ends + queries, (block + 2) * size]).expand_as(there)
        # An end of life before its beginning is never seen.
        expires = torch.where(there, expires, -queries)
        sections = (KeyRange(2 * size), KeyRange(queries, -size, size, 2 * size + 1, group_size=size))
        blocks = self._random_block_table(padded, random_blocks)
        if blocks.shape[-1] == 0:
            return Visibility(born, expires, queries, sections)
        pattern = SparsePattern(
            torch.zeros_like(expires),
            torch.where(there, queries, 0),
            random_blocks=blocks,
            block_size=size,
            count_duplicates=True,
        )
        return Visibility(born, expires, queries, sections, pattern)

    def _random_block_table(self, padded: EncoderInputs, random_blocks: Tensor | None) -> Tensor:
        """Return the table of random blocks, numbered as the keys lie."""
        blocks = padded.length // self.block_size
        table = random_blocks
        if table is None:
            table = sample_random_blocks(
                padded.length,
                self.block_size,
                self.num_random_blocks,
                self.heads,
                max_length=self.max_length,
                seed=self.seed,
            )
        if table.dim() != 3 or table.shape[0] not in (1, self.heads) or table.shape[1] != blocks - 2:
            raise MemtxError(
                f"random_blocks of layer {self.layer_index} is {tuple(table.shape)}, expected "
                f"({self.heads}, {blocks - 2}, any).",
                "Give the blocks that each block of queries but the first and the last sees.",
            )
        if table.is_floating_point() or (table.numel() and not 0 <= int(table.min()) <= int(table.max()) < blocks):
            raise MemtxError(
                f"random_blocks of layer {self.layer_index} names blocks that are not there.",
                f"Give 0 to {blocks - 1}.",
            )
        table = table.to(padded.device, torch.int64)
        return torch.where(table == 0, 0, torch.where(table == blocks - 1, 1, table + 1))

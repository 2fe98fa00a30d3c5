"""BigBird's block-sparse attention: neighboring blocks, the first and last block, and random blocks.

Zaheer et al. 2020, section 2 and appendix A: sliding windows of blocks, two global blocks of the text itself, and
random blocks. The first and last block see everything. A random block that is visible already counts twice, as in the
published models.

The published library (``transformers``) draws random blocks in training only. In eval mode each of them is the first
block, which thus counts ``1 + num_random_blocks`` times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least
from memtx.layers.encoder_attention import EncoderAttention, EncoderInputs, full_visibility
from memtx.memory.parts import merge_heads
from memtx.ops.attention.dispatch import AttentionBackend
from memtx.ops.attention.mask import KeyRange, SparsePattern, Visibility
from memtx.ops.attention.sparse import sample_random_blocks


class BigBirdAttention(EncoderAttention):
    """Windows of three blocks, two global blocks and random blocks.

    Texts of at most ``(5 + 2 * num_random_blocks) * block_size`` tokens get full attention, as published. Arguments not
    listed are those of :class:`EncoderAttention`.

    Args:
        block_size: Tokens per block.
        num_random_blocks: Random blocks that each block of queries sees.
        max_length: Longest text that the model is for, in tokens (see
            :func:`memtx.ops.attention.sparse.sample_random_blocks`).
        seed: Seed of the random blocks. Defaults to the layer's index, as published.
        sample_in_eval: If True, random blocks are drawn in eval mode too, the same as in training. Defaults to False,
            as published.

    Raises:
        MemtxError: A number is out of range.
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
        sample_in_eval: bool = False,
        *,
        bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        backend: AttentionBackend = "auto",
    ) -> None:
        super().__init__(dim, heads, layer_index, bias=bias, out_bias=out_bias, dropout=dropout, backend=backend)
        check_at_least(1, block_size=block_size)
        check_at_least(0, num_random_blocks=num_random_blocks)
        self.block_size = block_size
        self.num_random_blocks = num_random_blocks
        self.max_length = max_length
        self.seed = layer_index if seed is None else seed
        self.sample_in_eval = sample_in_eval

    def attend(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the attention outputs of x ``(batch, length, dim)``, all heads concatenated; zero at padding."""
        q, k, v = self.project(x)
        size = self.block_size
        if inputs.length <= (5 + 2 * self.num_random_blocks) * size:
            return merge_heads(self.attend_visible(q, k, v, full_visibility(inputs, inputs.length)))
        padded = inputs.memo(("padded to blocks", size), lambda: self._pad_to_blocks(inputs))
        padding = padded.length - inputs.length
        q, k, v = (self._global_blocks_first(F.pad(part, (0, 0, 0, padding))) for part in (q, k, v))
        ends = self.attend_visible(q[:, :, : 2 * size], k, v, full_visibility(padded, 2 * size))
        is_sampled = self.training or self.sample_in_eval
        random_settings = (self.heads, self.layer_index, self.seed, self.num_random_blocks, self.max_length, is_sampled)
        middle_visibility = inputs.memo(
            ("middle blocks", size, *random_settings),
            lambda: self._middle_visibility(padded, inputs.random_blocks.get(self.layer_index)),
        )
        middle = self.attend_visible(q[:, :, 2 * size :], k, v, middle_visibility)
        parts = [merge_heads(part) for part in (ends[:, :, :size], middle, ends[:, :, size:])]
        return inputs.zero_padding(torch.cat(parts, dim=1)[:, : inputs.length])

    def _global_blocks_first(self, x: Tensor) -> Tensor:
        """Move the last block of x ``(..., length, width)`` behind the first."""
        size = self.block_size
        return torch.cat([x[..., :size, :], x[..., -size:, :], x[..., size:-size, :]], dim=-2)

    def _pad_to_blocks(self, inputs: EncoderInputs) -> EncoderInputs:
        """Return the inputs padded to whole blocks, global blocks first."""
        padding = -inputs.length % self.block_size
        if inputs.attention_mask is None and padding == 0:
            return inputs
        mask = self._global_blocks_first(F.pad(inputs.present, (0, padding))[..., None])[..., 0]
        return EncoderInputs(inputs.length + padding, inputs.device, mask)

    def _middle_visibility(self, padded: EncoderInputs, random_blocks: Tensor | None) -> Visibility:
        """Return the visibility of [first | last | middle blocks] for the middle blocks."""
        size, num_queries = self.block_size, padded.length - 2 * self.block_size
        mask = padded.present
        block = torch.arange(num_queries, device=padded.device) // size
        ends = torch.zeros(2 * size, dtype=torch.int64, device=padded.device)
        visible_from = torch.cat([ends, (block - 1) * size]).expand_as(mask)
        visible_until = torch.cat([ends + num_queries, (block + 2) * size]).expand_as(mask)
        # A key whose visibility ends before it starts is never seen.
        visible_until = torch.where(mask, visible_until, -num_queries)
        key_ranges = (KeyRange(2 * size), KeyRange(num_queries, -size, size, 2 * size + 1, group_size=size))
        blocks = self._random_block_table(padded, random_blocks)
        pattern = None
        if blocks.shape[-1]:
            pattern = SparsePattern(
                torch.zeros_like(visible_until),
                torch.where(mask, num_queries, 0),
                random_blocks=blocks,
                block_size=size,
                count_duplicates=True,
            )
        return Visibility(visible_from, visible_until, num_queries, key_ranges, pattern)

    def _random_block_table(self, padded: EncoderInputs, random_blocks: Tensor | None) -> Tensor:
        """Return the random blocks of each query block, numbered with the global blocks first."""
        num_blocks = padded.length // self.block_size
        table = random_blocks
        if table is None and not (self.training or self.sample_in_eval):
            table = torch.zeros(1, num_blocks - 2, self.num_random_blocks, dtype=torch.int64)
        if table is None:
            sizes = (padded.length, self.block_size, self.num_random_blocks, self.heads)
            table = sample_random_blocks(*sizes, max_length=self.max_length, seed=self.seed)
        name = f"random_blocks of layer {self.layer_index}"
        if table.dim() != 3 or table.shape[0] not in (1, self.heads) or table.shape[1] != num_blocks - 2:
            raise MemtxError(
                f"{name} has shape {tuple(table.shape)}, expected ({self.heads}, {num_blocks - 2}, any).",
                "Give the blocks that each block of queries except the first and the last sees.",
            )
        if table.is_floating_point() or (table.numel() and not 0 <= int(table.min()) <= int(table.max()) < num_blocks):
            raise MemtxError(f"{name} contains blocks that do not exist.", f"Give integers from 0 to {num_blocks - 1}.")
        table = table.to(padded.device, torch.int64)
        return torch.where(table == 0, 0, torch.where(table == num_blocks - 1, 1, table + 1))

"""Longformer's attention: a sliding window for all tokens, and global tokens that see all and are seen by all.

Beltagy, Peters and Cohan 2020, section 3.1. Global tokens have query, key and value projections of their own for what
they see; other tokens see them like any other token. A dilated window keeps every d-th neighbor, so the tokens fall
into d sequences that do not see each other, each with a plain window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least
from memtx.layers.encoder_attention import EncoderAttention, EncoderInputs, full_visibility
from memtx.memory.parts import merge_heads, split_heads
from memtx.ops.attention.dilation import fold_dilation, unfold_dilation
from memtx.ops.attention.dispatch import AttentionBackend
from memtx.ops.attention.mask import KeyRange, SparsePattern, Visibility
from memtx.ops.cpu.linear import Linear
from memtx.segment import INFINITE_OFFSET


class LongformerAttention(EncoderAttention):
    """Sliding windows and global tokens; arguments not listed are those of :class:`EncoderAttention`.

    Args:
        window: Neighbors visible besides the token itself, half of them on each side; even.
        dilation: Distance between neighbors.
        num_random_tokens: Random tokens that each token sees in addition, per head (BigBird, Zaheer et al. 2020,
            section 2). They depend only on ``seed``, the layer and the length.
        seed: Seed of the random tokens.

    Raises:
        MemtxError: window is not even and positive, another number is out of range, or random tokens are combined with
            a dilated window.
    """

    supports_global_attention = True

    def __init__(
        self,
        dim: int,
        heads: int,
        layer_index: int = 0,
        window: int = 512,
        dilation: int = 1,
        num_random_tokens: int = 0,
        seed: int = 0,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        backend: AttentionBackend = "auto",
    ) -> None:
        super().__init__(dim, heads, layer_index, bias=bias, dropout=dropout, backend=backend)
        if window < 2 or window % 2:
            raise MemtxError(f"window is {window}.", "Give an even number of at least 2, half of it for each side.")
        check_at_least(1, dilation=dilation)
        check_at_least(0, num_random_tokens=num_random_tokens)
        if num_random_tokens and dilation > 1:
            raise MemtxError(
                f"num_random_tokens ({num_random_tokens}) cannot be combined with dilation ({dilation}).",
                "Set num_random_tokens to 0 or dilation to 1.",
            )
        self.window = window
        self.dilation = dilation
        self.num_random_tokens = num_random_tokens
        self.seed = seed
        self.global_query = Linear(dim, dim, bias=bias)
        self.global_key = Linear(dim, dim, bias=bias)
        self.global_value = Linear(dim, dim, bias=bias)

    def attend(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the attention outputs of x ``(batch, length, dim)``, all heads concatenated; zero at padding."""
        q, k, v = self.project(x)
        q = fold_dilation(q, self.dilation)
        k, v = self._prepend_global_keys(k, inputs), self._prepend_global_keys(v, inputs)
        random_settings = (self.heads, self.layer_index, self.seed) if self.num_random_tokens else None
        settings = ("window", self.window, self.dilation, random_settings)
        visibility = inputs.memo(settings, lambda: self._visibility(inputs, x.shape[0]))
        attended = unfold_dilation(self.attend_visible(q, k, v, visibility), self.dilation)
        out = inputs.zero_padding(merge_heads(attended[:, :, : inputs.length]))
        if inputs.global_indices is None:
            return out
        return self._apply_global_attention(out, x, inputs, inputs.global_indices)

    def within_window(self, distance: Tensor) -> Tensor | None:
        """Return True within the window; None if there are random tokens."""
        if self.num_random_tokens:
            return None
        return (distance.abs() <= self.window // 2 * self.dilation) & (distance % self.dilation == 0)

    def _apply_global_attention(self, out: Tensor, x: Tensor, inputs: EncoderInputs, global_indices: Tensor) -> Tensor:
        """Return out with the outputs of global tokens replaced by their global attention."""
        exists = global_indices >= 0
        stream = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(global_indices)
        q = split_heads(self.global_query(x[stream, global_indices.clamp(min=0)]), self.heads)
        k, v = (split_heads(proj(x), self.heads) for proj in (self.global_key, self.global_value))
        attended = merge_heads(self.attend_visible(q, k, v, full_visibility(inputs, global_indices.shape[1])))
        return out.index_put((stream[exists], global_indices[exists]), attended[exists])

    def _prepend_global_keys(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the keys (or values) of each dilated sequence, preceded by those of the global tokens."""
        folded = fold_dilation(x, self.dilation)
        if inputs.global_indices is None:
            return folded
        index = inputs.global_indices.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return torch.cat([x.gather(2, index).repeat_interleave(self.dilation, dim=0), folded], dim=2)

    def _visibility(self, inputs: EncoderInputs, batch_size: int) -> Visibility:
        """Return the visibility of [global tokens | text] in each dilated sequence."""
        length, half = inputs.length, self.window // 2
        # Without dilation one mask serves all texts; each dilated sequence ends at its own offset.
        in_window = inputs.present if self.dilation == 1 else inputs.present.expand(batch_size, -1)
        if inputs.global_indices is not None:
            # Global tokens precede the text's keys and must be seen only once.
            in_window = F.pad(in_window.expand(batch_size, -1), (0, 1))
            index = torch.where(inputs.global_indices < 0, length, inputs.global_indices)
            in_window = in_window.scatter(1, index, False)[:, :length]
        in_window = fold_dilation(in_window[:, None, :, None], self.dilation)[:, 0, :, 0]
        num_queries = in_window.shape[1]
        offset = torch.arange(num_queries, device=inputs.device).expand_as(in_window)
        visible_from = offset - half
        visible_until = torch.where(in_window, offset + half + 1, -INFINITE_OFFSET)
        key_ranges: tuple[KeyRange, ...] = (KeyRange(num_queries, -half, 1, 2 * half + 1),)
        num_global = 0
        if inputs.global_indices is not None:
            exists = (inputs.global_indices >= 0).repeat_interleave(self.dilation, dim=0)
            num_global = exists.shape[1]
            global_until = torch.where(exists, num_queries, 0)
            visible_from = torch.cat([torch.zeros_like(global_until), visible_from], dim=1)
            visible_until = torch.cat([global_until, visible_until], dim=1)
            key_ranges = (KeyRange(num_global), *key_ranges)
        pattern = self._random_pattern(inputs, in_window, num_global)
        return Visibility(visible_from, visible_until, num_queries, key_ranges, pattern)

    def _random_pattern(self, inputs: EncoderInputs, window_mask: Tensor, num_global_keys: int) -> SparsePattern | None:
        """Return the random tokens as random blocks of one key, without global tokens and padding."""
        if not self.num_random_tokens:
            return None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.layer_index)
        blocks = torch.randint(inputs.length, (self.heads, inputs.length, self.num_random_tokens), generator=generator)
        visible_until = F.pad(torch.where(window_mask, inputs.length, 0), (num_global_keys, 0))
        return SparsePattern(
            torch.zeros_like(visible_until),
            visible_until,
            random_blocks=blocks.to(inputs.device),
            block_size=1,
            first_key=num_global_keys,
        )

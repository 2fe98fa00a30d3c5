"""Longformer's attention: each token sees a window of its neighbours, global tokens see all and are seen by all.

Beltagy, Peters and Cohan 2020, section 3.1. Global tokens ask with projections of their own, of the asking and of
what they see; tokens that are not global see them as they see any other. A dilated window keeps every d-th
neighbour, so the tokens fall into d texts that do not see each other, and each is a text with a plain window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.layers.encoder_attention import EncoderAttention, full_visibility, merge_heads
from memtx.layers.encoder_inputs import EncoderInputs
from memtx.ops.attention.dispatch import AttentionBackend, segment_attention
from memtx.ops.attention.mask import KeyRange, SparsePattern, Visibility
from memtx.ops.cpu.linear import Linear
from memtx.segment import INFINITE_OFFSET


class LongformerAttention(EncoderAttention):
    """Windows and global tokens.

    Args:
        dim: width of the hidden states.
        heads: how many.
        layer_index: the layer's number, from 0.
        window: neighbours seen, half of them before the token and half after it, besides the token itself; even.
        dilation: distance from one neighbour to the next.
        num_random_tokens: random tokens that each head of each token sees as well (Big Bird's article, Zaheer et al.
            2020, section 2); they depend on ``seed``, the layer and the text's length alone.
        seed: of the random links.
        bias: whether queries, keys and values have biases.
        dropout: of attention weights.
        backend: of the attention operation.

    Raises:
        MemtxError: the window is not even and positive, another number is out of range, or random links are asked
            for beside a dilated window.
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
            raise MemtxError(f"window is {window}, expected an even number from 2 on.", "Half of it is on each side.")
        if dilation < 1 or num_random_tokens < 0:
            raise MemtxError(
                f"dilation is {dilation}, num_random_tokens is {num_random_tokens}.", "Give at least 1 and at least 0."
            )
        if num_random_tokens and dilation > 1:
            raise MemtxError("Random links are not drawn beside a dilated window.", "Choose one of the two.")
        self.window = window
        self.dilation = dilation
        self.num_random_tokens = num_random_tokens
        self.seed = seed
        self.global_query = Linear(dim, dim, bias=bias)
        self.global_key = Linear(dim, dim, bias=bias)
        self.global_value = Linear(dim, dim, bias=bias)

    def attend(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the heads' results side by side, (rows, length, dim), zero at padding, of x (rows, length, dim)."""
        q, k, v = (self.split_heads(part(x)) for part in (self.query, self.key, self.value))
        q, k, v = self._fold_dilation(q), self._prepend_global_keys(k, inputs), self._prepend_global_keys(v, inputs)
        settings = (
            "window",
            self.window,
            self.dilation,
            (self.heads, self.layer_index, self.seed) if self.num_random_tokens else None,
        )
        visibility = inputs.memo(settings, lambda: self._visibility(inputs, x.shape[0]))
        out, _ = segment_attention(q, k, v, visibility, dropout=self.dropout, backend=self.backend)
        out = merge_heads(self._unfold_dilation(out)[:, :, : inputs.length])
        if inputs.attention_mask is not None:
            out = out.masked_fill(~inputs.attention_mask[..., None], 0.0)
        return (
            out
            if inputs.global_indices is None
            else self._apply_global_attention(out, x, inputs, inputs.global_indices)
        )

    def within_window(self, distance: Tensor) -> Tensor | None:
        """Return whether a window holds both; None where random links are seen as well."""
        if self.num_random_tokens:
            return None
        return (distance.abs() <= self.window // 2 * self.dilation) & (distance % self.dilation == 0)

    def _apply_global_attention(self, out: Tensor, x: Tensor, inputs: EncoderInputs, global_indices: Tensor) -> Tensor:
        """Return out with what global tokens see in their places."""
        there = global_indices >= 0
        rows = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(global_indices)
        q = self.split_heads(self.global_query(x[rows, global_indices.clamp(min=0)]))
        k, v = (self.split_heads(part(x)) for part in (self.global_key, self.global_value))
        seen = full_visibility(inputs, global_indices.shape[1])
        seeing = merge_heads(segment_attention(q, k, v, seen, dropout=self.dropout, backend=self.backend)[0])
        return out.index_put((rows[there], global_indices[there]), seeing[there])

    def _prepend_global_keys(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the keys of each dilated text, those of the global tokens first."""
        folded = self._fold_dilation(x)
        if inputs.global_indices is None:
            return folded
        index = inputs.global_indices.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return torch.cat([x.gather(2, index).repeat_interleave(self.dilation, dim=0), folded], dim=2)

    def _fold_dilation(self, x: Tensor) -> Tensor:
        """(rows, heads, n, width) -> (rows * dilation, heads, n / dilation rounded up, width)."""
        if self.dilation == 1:
            return x
        x = nn.functional.pad(x, (0, 0, 0, -x.shape[2] % self.dilation))
        x = x.view(*x.shape[:2], -1, self.dilation, x.shape[3])  # (rows, heads, places, dilation, width)
        return x.permute(0, 3, 1, 2, 4).flatten(0, 1)

    def _unfold_dilation(self, x: Tensor) -> Tensor:
        if self.dilation == 1:
            return x
        x = x.view(-1, self.dilation, *x.shape[1:])  # (rows, dilation, heads, places, width)
        return x.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def _visibility(self, inputs: EncoderInputs, batch_size: int) -> Visibility:
        """Return who sees whom among [global tokens | the text], of each dilated text."""
        length = inputs.length
        # One for all texts where nothing is dilated; each dilated text of the batch has its own end.
        shared = 1 if self.dilation == 1 else batch_size
        windowed = torch.ones(shared, length, dtype=torch.bool, device=inputs.device)
        if inputs.attention_mask is not None:
            windowed = inputs.attention_mask
        if inputs.global_indices is not None:
            # A global token stands before the text's keys, and is to be seen once.
            windowed = nn.functional.pad(windowed.expand(batch_size, -1), (0, 1))
            place = torch.where(inputs.global_indices < 0, length, inputs.global_indices)
            windowed = windowed.scatter(1, place, False)[:, :length]
        windowed = self._fold_dilation(windowed[:, None, :, None])[:, 0, :, 0]
        tick = torch.arange(windowed.shape[1], device=inputs.device).expand_as(windowed)
        half = self.window // 2
        born, expires = tick - half, torch.where(windowed, tick + half + 1, -INFINITE_OFFSET)
        section = KeyRange(windowed.shape[1], -half, 1, 2 * half + 1)
        if inputs.global_indices is None:
            return Visibility(born, expires, windowed.shape[1], (section,), self._random_pattern(inputs, windowed, 0))
        there = (inputs.global_indices >= 0).repeat_interleave(self.dilation, dim=0)
        ends = torch.where(there, windowed.shape[1], 0)
        born = torch.cat([torch.zeros_like(ends), born], dim=1)
        expires = torch.cat([ends, expires], dim=1)
        sections = (KeyRange(ends.shape[1]), section)
        return Visibility(
            born, expires, windowed.shape[1], sections, self._random_pattern(inputs, windowed, ends.shape[1])
        )

    def _random_pattern(self, inputs: EncoderInputs, window_mask: Tensor, num_global_keys: int) -> SparsePattern | None:
        """Return the random links as blocks of one key; global tokens and padding are none of them."""
        if not self.num_random_tokens:
            return None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.layer_index)
        blocks = torch.randint(inputs.length, (self.heads, inputs.length, self.num_random_tokens), generator=generator)
        ends = torch.where(window_mask, inputs.length, 0)
        ends = torch.cat([ends.new_zeros(ends.shape[0], num_global_keys), ends], dim=1)
        return SparsePattern(
            torch.zeros_like(ends),
            ends,
            random_blocks=blocks.to(inputs.device),
            block_size=1,
            first_key=num_global_keys,
        )

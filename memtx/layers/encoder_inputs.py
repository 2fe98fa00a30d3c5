"""Inputs of an encoder's layers: the masks of a batch of whole texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memtx.memo import Memo


@dataclass(frozen=True)
class EncoderInputs(Memo):
    """The masks of one call of an encoder.

    Attributes:
        length: Length of the batch.
        device: Device of the tensors.
        attention_mask: True for tokens, False for padding, ``(batch, length)`` bool. None if there is no padding.
        global_indices: Positions of global tokens, which see all tokens and are seen by all, ``(batch, n)`` int64; -1
            fills up shorter rows. None if there are none.
        random_blocks: Random blocks by layer index, (1 or heads, query blocks, r) int64, used instead of sampled ones.
    """

    length: int
    device: torch.device
    attention_mask: Tensor | None = None
    global_indices: Tensor | None = None
    random_blocks: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def from_masks(
        cls,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        random_blocks: Mapping[int, Tensor] | None = None,
    ) -> EncoderInputs:
        """Create the inputs from masks in the conventions of the ``transformers`` library.

        Args:
            tokens: Token ids, ``(batch, length)``.
            attention_mask: 0 for padding, 1 for a token, 2 for a global token, ``(batch, length)``.
            global_attention_mask: 1 for a global token, ``(batch, length)``; padding is never global.
            random_blocks: As in the class.
        """
        present = is_global = global_indices = None
        if attention_mask is not None:
            present, is_global = attention_mask > 0, attention_mask > 1
        if global_attention_mask is not None:
            marked = global_attention_mask > 0
            is_global = marked if is_global is None else is_global | marked
        if present is not None and bool(present.all()):
            present = None
        if is_global is not None:
            is_global = is_global if present is None else is_global & present
            if most := int(is_global.sum(1).max()):
                # A stable sort puts the positions of global tokens first, in order.
                first = torch.argsort(~is_global, dim=1, stable=True)[:, :most]
                global_indices = torch.where(is_global.gather(1, first), first, -1)
        return cls(tokens.shape[1], tokens.device, present, global_indices, random_blocks or {})

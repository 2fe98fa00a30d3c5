"""What an encoder's layers know of the texts they read: which places hold a token, and which tokens are global."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memtx.memo import Memo


@dataclass(frozen=True)
class EncoderInputs(Memo):
    """One call of an encoder: whole texts, read both ways.

    Attributes:
        length: places a row.
        device: of the tensors.
        attention_mask: (rows, length) bool, where a token is and no padding; None for everywhere.
        global_indices: (rows, n) int64, places of global tokens, which see all and are seen by all; -1 fills a row that
            has fewer. None where no row has any.
        random_blocks: layer -> (1 or heads, query blocks, r) int64, in place of blocks that a layer would draw.
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
        """Return the reading of masks as the ``transformers`` library takes them.

        Args:
            tokens: (rows, length).
            attention_mask: (rows, length), 0 for padding, 1 for a token, 2 for a global one.
            global_attention_mask: (rows, length), 1 for a global token; padding is never global.
            random_blocks: as in the class.
        """
        present, asked = None, None
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            present = attention_mask > 0
        marked = None if attention_mask is None else attention_mask > 1
        if global_attention_mask is not None:
            given = global_attention_mask > 0
            marked = given if marked is None else marked | given
        if marked is not None:
            marked = marked if present is None else marked & present
            if most := int(marked.sum(1).max()):
                place = torch.arange(tokens.shape[1], device=tokens.device)
                # Places of marked tokens first, in order; a stable sort of what is not marked.
                first = torch.argsort(~marked, dim=1, stable=True)[:, :most]
                asked = torch.where(marked.gather(1, first), place[first], -1)
        if present is not None and bool(present.all()):
            present = None
        return cls(tokens.shape[1], tokens.device, present, asked, random_blocks or {})

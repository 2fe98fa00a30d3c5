"""Reformer as a recurrent language model: reading, sessions and generation by whole calls.

The state holds the tokens of the open block, which is as long as the table of positions, and every call reads them
again. So a call costs as much as reading its block at once, and nothing is cached by bucket: with LSH attention, the
output at a token depends on how the tokens before it fill the chunks of its bucket, which a later token changes.
Results therefore depend on the lengths of the calls. A text that is longer than a block continues in a fresh one, as
Reformer is trained.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least
from memtx.layers.reformer import LSHAttention
from memtx.models.recurrent_lm import MemoryOutput
from memtx.models.reformer import Reformer
from memtx.models.validation import check_segment, check_token_ids
from memtx.ops.cross_entropy import IGNORE_INDEX
from memtx.state import MemoryState


class RecurrentReformer(nn.Module):
    """The protocol of :class:`memtx.models.recurrent_lm.RecurrentLanguageModel` for a causal Reformer.

    Layers that draw new hashes in every call use the seed 0 instead, so that equal texts give equal results.

    Args:
        reformer: Causal model with an output projection.

    Raises:
        MemtxError: The model is bidirectional or has no output projection.
    """

    hf_origin = None

    def __init__(self, reformer: Reformer) -> None:
        super().__init__()
        attentions = [module for module in reformer.modules() if hasattr(module, "causal")]
        if reformer.head is None or not all(attention.causal for attention in attentions):
            message = "This Reformer is no causal language model with an output projection."
            raise MemtxError(message, "Give one that is trained with configs/reformer-clm.yaml.")
        for attention in attentions:
            if isinstance(attention, LSHAttention) and attention.seed is None:
                attention.seed = 0
        self.reformer = reformer
        self.vocab_size, self.block_length = reformer.vocab_size, reformer.positions.max_length

    @property
    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights; a state belongs to the model of equal fingerprint."""
        return self.reformer.fingerprint

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MemoryState:
        """Return the state of ``batch_size`` fresh streams, which has no floating-point numbers."""
        check_at_least(1, batch_size=batch_size)
        device = device or self.reformer.embedding.weight.device
        tokens = torch.zeros(batch_size, self.block_length, dtype=torch.int64, device=device)
        return MemoryState(torch.zeros(batch_size, dtype=torch.int64, device=device), ((tokens,),))

    def forward(
        self,
        tokens: Tensor,
        state: MemoryState | None = None,
        *,
        document_starts: Tensor | None = None,
        labels: Tensor | None = None,
        return_hidden_states: bool = False,
    ) -> MemoryOutput:
        """Read one segment, as :meth:`memtx.MemoryTransformer.forward` does; a stream at a time.

        With ``return_hidden_states``, the last hidden states alone are returned, ``(batch, length, 2 dim)``.
        """
        check_token_ids("tokens", tokens)
        batch_size, length = tokens.shape
        check_segment(batch_size, length, state, document_starts=document_starts, labels=labels)
        state = self.init_state(len(tokens)) if state is None else state
        outputs, blocks, positions = [], [], []
        for index, stream in enumerate(tokens):
            begins = set() if document_starts is None else set(document_starts[index].nonzero().flatten().tolist())
            position, block = int(state.position[index]), state.layers[0][0][index]
            used, hidden = position % self.block_length, []
            for start, end in self._parts(position, len(stream), begins):
                position = 0 if start in begins else position
                used = position % self.block_length
                part = torch.cat([block[:used], stream[start:end]])
                hidden.append(self.reformer(part[None]).last_hidden_state[0, used:])
                block = F.pad(part, (0, self.block_length - len(part)))
                position += end - start
            outputs.append(torch.cat(hidden))
            blocks.append(block)
            positions.append(position)
        x = torch.stack(outputs)
        assert self.reformer.head is not None
        logits = self.reformer.head(x)
        next_state = MemoryState(torch.tensor(positions, device=tokens.device), ((torch.stack(blocks),),))
        hidden_states = (x,) if return_hidden_states else None
        if labels is None:
            return MemoryOutput(logits, hidden_states, next_state, None, None, None, {})
        logits = logits.transpose(1, 2).to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
        loss = nll.sum() / (labels != IGNORE_INDEX).sum().clamp(min=1)
        return MemoryOutput(None, hidden_states, next_state, loss, loss, nll.detach(), {})

    def _parts(self, position: int, length: int, begins: set[int]) -> Iterator[tuple[int, int]]:
        """Yield the first token and the end of each part of a segment that lies in one document and one block."""
        start = 0
        while start < length:
            position = 0 if start in begins else position
            next_start = min((index for index in begins if index > start), default=length)
            end = min(length, next_start, start + self.block_length - position % self.block_length)
            yield start, end
            position, start = position + end - start, end

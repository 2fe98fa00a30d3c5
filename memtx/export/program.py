"""One segment of a language model as a program of ``torch.export``, with the state as named inputs and outputs."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from memtx.errors import MemtxError, check_at_least
from memtx.layers.lm_head import NoHead
from memtx.memory.memory_tokens import TokenMemory
from memtx.memory.rmt import SegmentMemory
from memtx.models.memory_transformer import MemoryTransformer

NamedState = dict[str, Tensor]
"""The tensors of a state by the names of :meth:`memtx.state.MemoryState.named_tensors`; zeros for fresh streams."""


class SegmentStep(nn.Module):
    """A model whose state is a flat dictionary.

    Args:
        model: The model.
    """

    def __init__(self, model: MemoryTransformer) -> None:
        super().__init__()
        self.model = model
        state = model.init_state(1, device="meta")
        self.names, self.structure = list(state.named_tensors()), pytree.tree_structure(state)

    def forward(self, tokens: Tensor, document_starts: Tensor, state: NamedState) -> tuple[Tensor, NamedState]:
        """Read one segment and return the logits, ``(batch, length, vocab)``, and the next state.

        Args:
            tokens: ``(batch, length)`` int64.
            document_starts: ``(batch, length)`` bool, True where a document begins.
            state: State of the previous call.
        """
        nested = pytree.tree_unflatten([state[name] for name in self.names], self.structure)
        output = self.model(tokens, nested, document_starts=document_starts)
        assert output.logits is not None
        return output.logits, output.state.named_tensors()


def export_step(model: nn.Module, segment_length: int, batch_size: int = 1) -> ExportedProgram:
    """Return the program of :class:`SegmentStep` for segments of a fixed length, in float32.

    It holds torch's own operators only, so ``torch.export.save`` writes it for machines without memtx.

    Args:
        model: A memory transformer; it is not changed.
        segment_length: Tokens per segment.
        batch_size: Number of streams.

    Raises:
        MemtxError: The model is of another kind, or a part of it decides by values which operators to run.
    """
    check_at_least(1, segment_length=segment_length, batch_size=batch_size)
    if not isinstance(model, MemoryTransformer):
        message = f"{type(model).__name__} cannot be exported: it does not read segments with a state."
        raise MemtxError(message, "Give a language model: a MemoryTransformer or a TransformerXL.")
    _check_parts(model, segment_length)
    if model.training or any(x.dtype != torch.float32 for x in model.parameters()):
        model = copy.deepcopy(model).float().eval()
    tokens = torch.zeros(batch_size, segment_length, dtype=torch.int64)
    # Copied, since a fresh state may hold one tensor under two names, which would become one input.
    state = {name: leaf.clone() for name, leaf in model.init_state(batch_size).named_tensors().items()}
    with torch.no_grad(), _name_the_part():
        return torch.export.export(SegmentStep(model), (tokens, tokens.bool(), state))


def _check_parts(model: MemoryTransformer, segment_length: int) -> None:
    """Raise MemtxError if the model has no logits, or a memory cuts segments where its intervals end."""
    if isinstance(model.head, NoHead):
        raise MemtxError("The model has no language modeling head to export.", "Export one with add_lm_head.")
    memories = [memory for block in model._layers() for memory in block.attention.memories]
    for memory in memories:
        if segment_length > 1 and (memory.needs_layer_output or isinstance(memory, TokenMemory | SegmentMemory)):
            message = f"{type(memory).__name__} cuts segments where a stream's intervals end, which no program can."
            raise MemtxError(message, "Export segments of 1 token.")


@contextlib.contextmanager
def _name_the_part() -> Iterator[None]:
    """Raise MemtxError with the class of the part that cannot be exported."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch logs, and prints, the graph up to the failure
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except Exception as error:  # a failing operator raises an exception of its own
        frame, part = error.__traceback__, type(error).__name__
        while frame is not None:
            owner = frame.tb_frame.f_locals.get("self")
            if owner is not None and type(owner).__module__.partition(".")[0] != "torch":
                part = type(owner).__name__
            frame = frame.tb_next
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise MemtxError(f"{part} cannot be exported: {reason}.", "Export a model without it.") from error
    finally:
        logging.disable(disabled)

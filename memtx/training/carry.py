"""The state between batches: one for each stage, so that validation never touches what training carries."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx.errors import CheckpointError
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState


class Carry:
    """States by stage ("train", "validate", ...); no module and no buffer, so DDP never broadcasts them."""

    def __init__(self) -> None:
        self._states: dict[str, MemoryState] = {}
        self._saved: dict[str, dict[str, Tensor]] = {}
        self._marks: dict[str, MemoryState | None] = {}

    def take(self, stage: str, model: MemoryTransformer, rows: int) -> MemoryState:
        """Return the stage's state; a fresh one where there is none or the number of rows changed.

        Raises:
            CheckpointError: a restored state is not of this model, or has other rows.
        """
        if saved := self._saved.pop(stage, None):
            restored = model.init_state(rows).with_tensors(saved)
            if restored.rows != rows:
                raise CheckpointError(
                    f"The checkpoint carries the memory of {restored.rows} rows, this run has {rows}.",
                    f"Resume with data.rows={restored.rows}, or start a new run from its weights.",
                )
            self._states[stage] = restored
        kept = self._states.get(stage)
        taken = kept if kept is not None and kept.rows == rows else model.init_state(rows)
        if stage in self._marks and self._marks[stage] is None:
            self._marks[stage] = taken
        return taken

    def mark(self, stage: str) -> None:
        """Remember the state that is taken next, until the next mark."""
        self._marks[stage] = None

    def back(self, stage: str, fresh: Tensor | None = None) -> None:
        """Go on from the state that was taken at the mark.

        Args:
            stage: whose state it is.
            fresh: (rows,) bool, rows that begin fresh, beside those with a number that is not finite.
        """
        if (kept := self._marks.get(stage)) is None:
            return
        wrong = torch.zeros(kept.rows, dtype=torch.bool, device=kept.position.device)
        if fresh is not None:
            wrong |= fresh
        for leaf in pytree.tree_leaves(kept):
            if leaf.is_floating_point():
                wrong |= ~leaf.isfinite().flatten(1).all(1)
        self._states[stage] = kept.reset(wrong)

    def put(self, stage: str, state: MemoryState) -> None:
        """Keep the state for the stage's next batch."""
        self._states[stage] = state

    def forget(self, stage: str) -> None:
        """Let the stage's next batch begin fresh."""
        self._states.pop(stage, None)

    def nbytes(self, stage: str) -> int:
        """Return the bytes of the stage's state."""
        kept = self._states.get(stage)
        return 0 if kept is None else kept.nbytes

    def tensors(self, stage: str) -> dict[str, Tensor]:
        """Return the stage's tensors by key path, where they are."""
        kept = self._states.get(stage)
        return {} if kept is None else kept.tensors()

    def state_dict(self, stage: str) -> dict[str, Tensor]:
        """Return the stage's tensors by key path: what a checkpoint keeps."""
        if stage in self._saved:
            return dict(self._saved[stage])
        return {name: tensor.cpu() for name, tensor in self.tensors(stage).items()}

    def load_state_dict(self, stage: str, tensors: Mapping[str, Tensor]) -> None:
        """Restore the stage when it is next taken (the number of rows is known only then)."""
        if tensors:
            self._saved[stage] = dict(tensors)


def carry_of(module: object) -> Carry | None:
    """Return what a training module carries its states in; None where it carries none."""
    found = getattr(module, "carry", None)
    return found if isinstance(found, Carry) else None

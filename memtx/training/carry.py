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
        self._restored_tensors: dict[str, dict[str, Tensor]] = {}
        self._snapshots: dict[str, MemoryState | None] = {}

    def get_state(self, stage: str, model: MemoryTransformer, batch_size: int) -> MemoryState:
        """Return the stage's state; a fresh one where there is none or the number of rows changed.

        Raises:
            CheckpointError: a restored state is not of this model, or has other rows.
        """
        if saved := self._restored_tensors.pop(stage, None):
            restored = model.init_state(batch_size).with_named_tensors(saved)
            if restored.batch_size != batch_size:
                raise CheckpointError(
                    f"The checkpoint carries the memory of {restored.batch_size} rows, this run has {batch_size}.",
                    f"Resume with data.batch_size={restored.batch_size}, or start a new run from its weights.",
                )
            self._states[stage] = restored
        kept = self._states.get(stage)
        taken = kept if kept is not None and kept.batch_size == batch_size else model.init_state(batch_size)
        if stage in self._snapshots and self._snapshots[stage] is None:
            self._snapshots[stage] = taken
        return taken

    def snapshot(self, stage: str) -> None:
        """Remember the state that is taken next, until the next snapshot."""
        self._snapshots[stage] = None

    def rollback(self, stage: str, reset_mask: Tensor | None = None) -> None:
        """Go on from the state that was taken at the snapshot.

        Args:
            stage: whose state it is.
            reset_mask: (rows,) bool, rows that begin fresh, beside those with a number that is not finite.
        """
        if (kept := self._snapshots.get(stage)) is None:
            return
        wrong = torch.zeros(kept.batch_size, dtype=torch.bool, device=kept.position.device)
        if reset_mask is not None:
            wrong |= reset_mask
        for leaf in pytree.tree_leaves(kept):
            if leaf.is_floating_point():
                wrong |= ~leaf.isfinite().flatten(1).all(1)
        self._states[stage] = kept.reset(wrong)

    def set_state(self, stage: str, state: MemoryState) -> None:
        """Keep the state for the stage's next batch."""
        self._states[stage] = state

    def reset(self, stage: str) -> None:
        """Let the stage's next batch begin fresh."""
        self._states.pop(stage, None)

    def nbytes(self, stage: str) -> int:
        """Return the bytes of the stage's state."""
        kept = self._states.get(stage)
        return 0 if kept is None else kept.nbytes

    def named_tensors(self, stage: str) -> dict[str, Tensor]:
        """Return the stage's tensors by key path, where they are."""
        kept = self._states.get(stage)
        return {} if kept is None else kept.named_tensors()

    def state_dict(self, stage: str) -> dict[str, Tensor]:
        """Return the stage's tensors by key path: what a checkpoint keeps."""
        if stage in self._restored_tensors:
            return dict(self._restored_tensors[stage])
        return {name: tensor.cpu() for name, tensor in self.named_tensors(stage).items()}

    def load_state_dict(self, stage: str, tensors: Mapping[str, Tensor]) -> None:
        """Restore the stage when it is next taken (the number of rows is known only then)."""
        if tensors:
            self._restored_tensors[stage] = dict(tensors)


def get_carry(module: object) -> Carry | None:
    """Return what a training module carries its states in; None where it carries none."""
    found = getattr(module, "carry", None)
    return found if isinstance(found, Carry) else None

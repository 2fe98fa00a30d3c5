"""The state between batches: one for each stage, so that validation never touches what training carries."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from memtx.errors import CheckpointError
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState


class Carry:
    """States by stage ("train", "validate", ...); no module and no buffer, so DDP never broadcasts them."""

    def __init__(self) -> None:
        self._states: dict[str, MemoryState] = {}
        self._saved: dict[str, dict[str, Tensor]] = {}

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
        return kept if kept is not None and kept.rows == rows else model.init_state(rows)

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

    def state_dict(self, stage: str) -> dict[str, Tensor]:
        """Return the stage's tensors by key path: what a checkpoint keeps."""
        if stage in self._saved:
            return dict(self._saved[stage])
        kept = self._states.get(stage)
        return {} if kept is None else {name: tensor.cpu() for name, tensor in kept.tensors().items()}

    def load_state_dict(self, stage: str, tensors: Mapping[str, Tensor]) -> None:
        """Restore the stage when it is next taken (the number of rows is known only then)."""
        if tensors:
            self._saved[stage] = dict(tensors)

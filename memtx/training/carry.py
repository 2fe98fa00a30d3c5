"""Memory states between batches: stored per stage, reset at random, and reassigned when a run resumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memtx.errors import CheckpointError, MemtxError
from memtx.memory.base import Memory
from memtx.models.recurrent_lm import RecurrentModel
from memtx.state import MemoryState

DEFAULT_STATE_RESET_PROB = 0.05
"""Probability of a reset for models with an unbounded memory."""


class Carry:
    """States by stage ("train", "val", ...), so that validation never touches the state of training.

    Neither a module nor a buffer, so that DDP does not broadcast them.
    """

    def __init__(self) -> None:
        self._states: dict[str, MemoryState] = {}
        self._restored_tensors: dict[str, dict[str, Tensor]] = {}
        self._snapshots: dict[str, MemoryState | None] = {}

    def get_state(self, stage: str, model: RecurrentModel, batch_size: int) -> MemoryState:
        """Return the state of the stage; a fresh one if there is none or the batch size changed.

        Raises:
            CheckpointError: A restored state belongs to another model or has another batch size.
        """
        if tensors := self._restored_tensors.pop(stage, None):
            restored = model.init_state(batch_size).with_named_tensors(tensors)
            if restored.batch_size != batch_size:
                raise CheckpointError(
                    f"The checkpoint holds the memory of {restored.batch_size} streams, this run has {batch_size}.",
                    f"Resume with data.batch_size={restored.batch_size}, or start a new run from its weights.",
                )
            self._states[stage] = restored
        state = self._states.get(stage)
        if state is None or state.batch_size != batch_size:
            state = model.init_state(batch_size)
        if stage in self._snapshots and self._snapshots[stage] is None:
            self._snapshots[stage] = state
        return state

    def set_state(self, stage: str, state: MemoryState) -> None:
        """Store the state for the next batch of the stage."""
        self._states[stage] = state

    def reset(self, stage: str) -> None:
        """Drop the state of the stage, a restored one too."""
        self._states.pop(stage, None)
        self._restored_tensors.pop(stage, None)

    def snapshot(self, stage: str) -> None:
        """Remember the state that :meth:`get_state` returns next, until the next snapshot."""
        self._snapshots[stage] = None

    def rollback(self, stage: str, reset_mask: Tensor | None = None) -> None:
        """Go back to the state of the snapshot, with some streams reset.

        These are the ones in ``reset_mask``, ``(batch,)`` bool, and those with a non-finite state.
        """
        if (state := self._snapshots.get(stage)) is None:
            return
        mask = torch.zeros(state.batch_size, dtype=torch.bool, device=state.position.device)
        if reset_mask is not None:
            mask |= reset_mask
        for leaf in pytree.tree_leaves(state):
            if leaf.is_floating_point():
                mask |= ~leaf.isfinite().flatten(1).all(1)
        self._states[stage] = state.reset(mask)

    def states(self) -> dict[str, MemoryState]:
        """Return the state of each stage; a state is a value, so this is a snapshot."""
        return dict(self._states)

    def restore_states(self, states: Mapping[str, MemoryState]) -> None:
        """Go back to what :meth:`states` returned."""
        self._states = dict(states)

    def nbytes(self, stage: str) -> int:
        """Return the size of the stage's state in bytes."""
        state = self._states.get(stage)
        return 0 if state is None else state.nbytes

    def named_tensors(self, stage: str) -> dict[str, Tensor]:
        """Return the stage's tensors by key path, on their device."""
        state = self._states.get(stage)
        return {} if state is None else state.named_tensors()

    def state_dict(self, stage: str) -> dict[str, Tensor]:
        """Return the stage's tensors by key path on the CPU, for a checkpoint."""
        if stage in self._restored_tensors:
            return dict(self._restored_tensors[stage])
        return {name: tensor.cpu() for name, tensor in self.named_tensors(stage).items()}

    def load_state_dict(self, stage: str, tensors: Mapping[str, Tensor]) -> None:
        """Restore the stage at the next :meth:`get_state`, which knows the batch size."""
        self.reset(stage)
        if tensors:
            self._restored_tensors[stage] = dict(tensors)


def get_carry(module: object) -> Carry | None:
    """Return the carry of a training module; None if it has none."""
    carry = getattr(module, "carry", None)
    return carry if isinstance(carry, Carry) else None


class StateReset:
    """Random resets of streams at the start of a training step.

    Args:
        model: Model that is trained.
        prob: Probability that a stream is reset. None means 0.05 if a memory of the model is ``unbounded``, else 0.

    Raises:
        MemtxError: ``prob`` is not between 0 and 1.
    """

    def __init__(self, model: nn.Module, prob: float | None = None) -> None:
        if prob is not None and not 0.0 <= prob <= 1.0:
            raise MemtxError(f"state_reset_prob is {prob}, expected a probability from 0 to 1.", "Change it.")
        unbounded = any(isinstance(module, Memory) and module.unbounded for module in model.modules())
        self.prob = prob if prob is not None else DEFAULT_STATE_RESET_PROB * unbounded

    def __call__(self, state: MemoryState, *, seed: int, rank: int = 0, world_size: int = 1) -> MemoryState:
        """Return the state with some streams fresh; the choice depends on the seed and the global batch size alone."""
        if not self.prob:
            return state
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(world_size * state.batch_size, generator=generator)
        mask = uniform[rank * state.batch_size :][: state.batch_size] < self.prob
        return state.reset(mask) if mask.any() else state


@runtime_checkable
class ResumableStreams(Protocol):
    """A data loader of streams that counts its batches.

    torch's DataLoader also has a ``batch_size``, which need not be the number of streams; it has no ``position``.

    Attributes:
        batch_size: Streams of this process.
        position: Batches read so far.
    """

    batch_size: int
    position: int


def restore_rank_state(
    rank_states: Sequence[Mapping[str, Tensor]], dataloader: object, rank: int, world_size: int
) -> Mapping[str, Tensor]:
    """Return the tensors that a process resumes with, out of those of all processes of the checkpoint.

    Raises:
        CheckpointError: The number of processes changed, and the training data is no :class:`ResumableStreams`.
    """
    if isinstance(dataloader, ResumableStreams):
        return reassign_streams(rank_states, dataloader.batch_size, rank)
    if len(rank_states) != world_size:
        raise CheckpointError(
            f"The checkpoint is from {len(rank_states)} processes, this run has {world_size}, and its data loader does "
            "not tell its number of streams.",
            f"Resume with {len(rank_states)} processes, or start a new run from its weights.",
        )
    return rank_states[rank]


def reassign_streams(rank_states: Sequence[Mapping[str, Tensor]], batch_size: int, rank: int) -> dict[str, Tensor]:
    """Return the state of a process's streams after the batch size or the number of processes changed.

    Streams are numbered across processes, and the first ones continue, as their documents do in
    :meth:`memtx.data.streams.EndlessStreamPlan.reassign`.

    Args:
        rank_states: State of each saving process: tensors by key path, each ``(batch, ...)``; empty without a state.
        batch_size: Streams of this process now.
        rank: Rank of this process; its streams are ``rank * batch_size`` and on.

    Returns:
        Tensors ``(batch_size, ...)``, zero (fresh) for streams that the checkpoint did not have; empty if no process
        had a state.

    Raises:
        CheckpointError: The states of the processes have different tensors.
    """
    states = [state for state in rank_states if state]
    if not states:
        return {}
    if any(state.keys() != states[0].keys() or not all(leaf.dim() for leaf in state.values()) for state in states):
        raise CheckpointError("The checkpoint's processes have different memories.", "Restore it from a copy.")
    first, result = rank * batch_size, {}
    for name in states[0]:
        # Only the needed streams are copied: many processes may have saved many.
        start, parts = 0, []
        for leaf in (state[name] for state in states):
            low, high = max(first - start, 0), min(first + batch_size - start, len(leaf))
            parts += [leaf[low:high]] if low < high else []
            start += len(leaf)
        missing = batch_size - max(0, min(batch_size, start - first))
        if missing:
            parts.append(states[0][name].new_zeros((missing, *states[0][name].shape[1:])))
        result[name] = torch.cat(parts)
    return result

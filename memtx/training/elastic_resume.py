"""A run that goes on with other rows or processes: whose memory goes where, and how much is left of the epoch.

Who reads which document is the data's to say (:meth:`memtx.data.streams.EndlessStreamPlan.reassign`): there the rows of
all processes are numbered through, and the first ones go on where they were. So does here what they carry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor

from memtx.errors import CheckpointError


def reassign_streams(rank_states: Sequence[Mapping[str, Tensor]], batch_size: int, rank: int) -> dict[str, Tensor]:
    """Return what a process's rows carry, out of what those of all processes of the checkpoint carried.

    Args:
        rank_states: of each process that saved, its state's tensors by key path, each (its rows, ...); empty ones
            carried nothing.
        batch_size: of this process now.
        rank: this process; its rows are ``rank * batch_size`` and on.

    Returns:
        Tensors of (rows, ...); rows that the checkpoint did not have are fresh, which is zero. Empty where nothing was
        carried.

    Raises:
        CheckpointError: the processes carried different things.
    """
    carried = [one for one in rank_states if one]
    if not carried:
        return {}
    if any(one.keys() != carried[0].keys() or not all(leaf.dim() for leaf in one.values()) for one in carried):
        raise CheckpointError("The checkpoint's processes carried different memories.", "Restore it from a copy.")
    own = {}
    for name in carried[0]:
        leaves = [one[name] for one in carried]
        first, before = rank * batch_size, sum(len(leaf) for leaf in leaves)
        # Only what is needed is copied: the rows of many processes may be many.
        at, parts = 0, []
        for leaf in leaves:
            low, high = max(first - at, 0), min(first + batch_size - at, len(leaf))
            parts += [leaf[low:high]] if low < high else []
            at += len(leaf)
        missing = batch_size - max(0, min(batch_size, before - first))
        if missing:
            parts.append(leaves[0].new_zeros((missing, *leaves[0].shape[1:])))
        own[name] = torch.cat(parts)
    return own


def sync_batch_progress(trainer: pl.Trainer) -> None:
    """Let the trainer count this epoch's batches as its data does, where a resume changed how many it has."""
    loader = trainer.train_dataloader
    position = getattr(loader, "position", None)
    if loader is None or not isinstance(position, int):
        return
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    # A checkpoint of an epoch's last batch: Lightning has not turned the page yet, the data has.
    now = position % len(loader) or (len(loader) if current.ready else 0)
    shift = now - current.ready
    for name in ("ready", "started", "processed", "completed"):
        setattr(current, name, getattr(current, name) + shift)

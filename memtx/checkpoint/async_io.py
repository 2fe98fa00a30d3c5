"""Checkpoints that are written while training goes on: copied to memory first, then a thread writes the copy."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx.checkpoint.training import AtomicCheckpointIO

MAX_PENDING = 2
"""Checkpoints that may wait to be written: at a validation there are two, the best and the last."""


def copy_to_cpu(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of all that a checkpoint holds, tensors in the CPU's memory, shared memory copied once.

    Nothing that training does afterwards changes it.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}
    for tensor in pytree.tree_leaves(checkpoint):
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            continue
        held = tensor.untyped_storage()
        if (key := held._cdata) not in storages:
            storages[key] = held.clone() if held.device.type == "cpu" else held.cpu()
        place = (tensor.storage_offset(), tensor.shape, tensor.stride())
        copies[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(storages[key], *place)
    # What is already copied stands in deepcopy's own record; dicts, lists and the rest it copies itself.
    made: dict[str, Any] = copy.deepcopy(checkpoint, copies)
    return made


class AsyncAtomicCheckpointIO(AtomicCheckpointIO):
    """Copies a checkpoint to the CPU's memory and lets a thread write it, so that training waits for the copy alone.

    A crash before it is written leaves the one that was there, and the process does not end before it is. What went
    wrong in the thread is raised by the next save, and at the latest when the run ends; nothing that was to follow
    is done then, so that the best checkpoint is not removed for one that is not there. Two copies at most wait to be
    written, each of the checkpoint's size.
    """

    def __init__(self) -> None:
        super().__init__()
        self._executor: ThreadPoolExecutor | None = None
        self._pending_saves: list[Future[None]] = []
        self._error: BaseException | None = None

    def _submit(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        if self._executor is None:
            # Not a daemon: the interpreter waits for it, whatever ends the run.
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        return self._executor.submit(self._run, function, *arguments)

    def _run(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._error is None:
            try:
                function(*arguments)
            except BaseException as error:
                self._error = error

    def _raise_pending_error(self) -> None:
        if self._error is None:
            return
        # What was to follow is passed over before the error is forgotten.
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
        error, self._error = self._error, None
        raise error

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Copy ``checkpoint`` and return; it is written whole, or what was there stays.

        Raises:
            MemtxError: a checkpoint before could not be written.
        """
        self._pending_saves = [one for one in self._pending_saves if not one.done()]
        if len(self._pending_saves) == MAX_PENDING:
            self._pending_saves.pop(0).result()
        self._raise_pending_error()
        self._pending_saves.append(self._submit(super().save_checkpoint, copy_to_cpu(checkpoint), path))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, after all that was given is written.

        Raises:
            CheckpointError: missing, damaged, or not such a file.
        """
        self.teardown()
        return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, after what was given before is written: it may be what the new one replaces."""
        self._submit(super().remove_checkpoint, path)

    def run_after_writes(self, callback: Callable[[], None]) -> None:
        """Call a function when all that was given is written, unless that failed."""
        self._submit(callback)

    def teardown(self) -> None:
        """Write what is left, and end the thread.

        Raises:
            MemtxError: it could not be written.
        """
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
        self._raise_pending_error()

"""Checkpoints written while training continues: copied to memory first, then written by a thread."""

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
"""Number of checkpoints that may wait to be written: after a validation there are two, the best and the last."""


def copy_to_cpu(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a deep copy with all tensors on the CPU; tensors that share memory share it in the copy."""
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}
    for tensor in pytree.tree_leaves(checkpoint):
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            continue
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in storages:
            storages[key] = storage.clone() if storage.device.type == "cpu" else storage.cpu()
        geometry = (tensor.storage_offset(), tensor.shape, tensor.stride())
        copies[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(storages[key], *geometry)
    # deepcopy takes copies from its memo and copies the containers itself.
    return copy.deepcopy(checkpoint, copies)


class AsyncAtomicCheckpointIO(AtomicCheckpointIO):
    """Copies a checkpoint to the CPU's memory and writes it in a thread, so that training waits only for the copy.

    A crash leaves the previous checkpoint, and the process does not exit before everything is written. An error in the
    thread is raised by the next save or at the end of the run; operations queued after it are skipped, so that the best
    checkpoint is never removed for a missing one. At most two copies wait, each of the checkpoint's size.
    """

    def __init__(self) -> None:
        super().__init__()
        self._executor: ThreadPoolExecutor | None = None
        self._pending_saves: list[Future[None]] = []
        self._error: BaseException | None = None

    def _submit(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        if self._executor is None:
            # The interpreter joins the executor's thread however the run ends.
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        return self._executor.submit(self._run, function, *arguments)

    def _run(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._error is None:
            try:
                function(*arguments)
            except BaseException as error:
                self._error = error

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Copy ``checkpoint`` and return; raises MemtxError if an earlier checkpoint could not be written."""
        self._pending_saves = [save for save in self._pending_saves if not save.done()]
        if len(self._pending_saves) == MAX_PENDING:
            self._pending_saves.pop(0).result()
        if self._error is not None:
            self.teardown()
        self._pending_saves.append(self._submit(super().save_checkpoint, copy_to_cpu(checkpoint), path))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint after all pending writes."""
        self.teardown()
        return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint after all pending writes, one of which may replace it."""
        self._submit(super().remove_checkpoint, path)

    def run_after_writes(self, callback: Callable[[], None]) -> None:
        """Call a function after all pending writes, unless one fails."""
        self._submit(callback)

    def teardown(self) -> None:
        """Finish all pending writes and end the thread; raises MemtxError if a checkpoint could not be written."""
        if self._executor is not None:
            # Queued operations are skipped before the error is cleared.
            self._executor.shutdown(wait=True)
            self._executor = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

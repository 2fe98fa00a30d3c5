"""Weights, gradients and optimiser shared out over all processes (FSDP2; ZeRO, Rajbhandari et al. 2020, section 5).

``--trainer.strategy fsdp2`` is Lightning's ModelParallelStrategy with all processes on data, and with checkpoints that
are whole or not there. Each block is gathered while it computes; what stands outside the blocks, embedding and head
among it, is gathered for the whole step, so that tied weights are one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from memtx import files
from memtx.checkpoint import pretrained, sharded
from memtx.errors import CheckpointError, MemtxError


def shard_model(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Share a model's parameters out over all processes of a mesh, those of each block together.

    Args:
        model: changed in place; rank 0's numbers count.
        mesh: of any shape: every process reads its own texts.
        device: of this process.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):
        return
    for parameter in model.parameters():
        whole = parameter.detach().to(device)
        distributed.broadcast(whole, src=0)
        parameter.data.copy_(whole)
    flat = mesh if mesh.ndim == 1 else mesh._flatten()
    for block in _shardable_blocks(model):
        fully_shard(block, mesh=flat)
    fully_shard(model, mesh=flat)


def _shardable_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that are called as modules: only around a call are parameters gathered."""
    for module in model.modules():
        blocks = getattr(module, "blocks", None)
        # Where there are memory tokens, a part of each layer is called by itself.
        if isinstance(blocks, nn.ModuleList) and getattr(module, "memory_tokens", None) is None:
            yield from (block for block in blocks if type(block).forward is not nn.Module.forward)


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, for memtx.

    A checkpoint is a folder: see :mod:`memtx.checkpoint.sharded`. It is written under another name, synced and renamed.

    Args:
        process_group_backend: "nccl", "gloo"; None for the device's usual one.
    """

    strategy_name = "fsdp2"

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        """Put every process on data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write every process's share; the folder appears whole, or what was there stays.

        Raises:
            MemtxError: it cannot be written.
        """
        path = Path(self.broadcast(filepath))
        temporary = Path(self.broadcast(files.temporary_path(path)))
        shared = {"state_dict": checkpoint.pop("state_dict")}
        shared |= {f"optimizer_{n}": one for n, one in enumerate(checkpoint.pop("optimizer_states", []))}
        from torch.distributed.checkpoint.state_dict_saver import save

        try:
            # Also where only some processes fail: torch tells all of them.
            save(shared, checkpoint_id=temporary)
            failed = self._commit(temporary, path, checkpoint)
        except Exception as error:
            failed = str(error)
        if failed:
            if self.is_global_zero:
                shutil.rmtree(temporary, ignore_errors=True)
            raise MemtxError(
                f"'{path}' could not be written: {' '.join(failed.split())[-200:]}.",
                "Check the folder, its permissions and the free space.",
            )

    def _commit(self, temporary: Path, path: Path, metadata: dict[str, Any]) -> str:
        """Sign the folder and put it in its place; returns what went wrong, on all processes."""
        own, failed = {}, ""
        try:
            own = {one.name: files.checksum(one) for one in temporary.glob(f"__{self.global_rank}_*")}
        except OSError as error:
            failed = str(error)
        told = [(own, failed)] * self.world_size
        distributed.all_gather_object(told, (own, failed))
        parts, failed = [one for one, _ in told], "".join(why for _, why in told)
        if self.is_global_zero and not failed:
            try:
                with files.atomic_open(temporary / sharded.META_FILE) as handle:
                    torch.save(metadata, handle)
                rest = {
                    name: files.checksum(temporary / name) for name in (sharded.META_FILE, sharded.DCP_METADATA_FILE)
                }
                sharded.write_checksums(temporary, {name: one for part in (*parts, rest) for name, one in part.items()})
                files.replace(temporary, path)
            except (MemtxError, OSError) as error:
                failed = str(error)
        return str(self.broadcast(failed))

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read this process's share, or its part of a checkpoint that is one file.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        from torch.distributed.checkpoint import state_dict

        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        if not sharded.is_sharded(path):
            content = pretrained.read_checkpoint(path)
            whole = state_dict.StateDictOptions(full_state_dict=True)
            state_dict.set_model_state_dict(self.model, content["state_dict"], options=whole)
            for optimizer, kept in zip(self.optimizers, content.get("optimizer_states", ()), strict=False):
                state_dict.set_optimizer_state_dict(
                    self.model,
                    optimizer,
                    sharded.optimizer_state_by_name(kept, self._parameter_names(optimizer)),
                    options=whole,
                )
            return content
        self._verify(path)
        weights = {"state_dict": state_dict.get_model_state_dict(self.model)}
        sharded.load_into(path, weights)
        state_dict.set_model_state_dict(self.model, weights["state_dict"])
        for number, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{number}"
            kept = {name: state_dict.get_optimizer_state_dict(self.model, optimizer)}
            sharded.load_into(path, kept)
            state_dict.set_optimizer_state_dict(self.model, optimizer, kept[name])
        return sharded.read_metadata(path)

    def _verify(self, path: Path) -> None:
        """Let one process read the whole folder, and all of them know."""
        wrong: tuple[str, str] | None = None
        if self.is_global_zero:
            try:
                sharded.verify_checksums(path)
            except CheckpointError as error:
                wrong = (error.message, error.hint)
        if (told := self.broadcast(wrong)) is not None:
            raise CheckpointError(*told)

    def _parameter_names(self, optimizer: Optimizer) -> list[str]:
        """Return the names of an optimiser's parameters, in the order in which it numbers them."""
        assert self.model is not None
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, of either kind."""
        if self.is_global_zero:
            files.remove(Path(filepath))


StrategyRegistry.register(
    FullyShardedStrategy.strategy_name,
    FullyShardedStrategy,
    description="Fully sharded data parallel (FSDP2), checkpoints whole or not there",
)


def configure_sharding(module: pl.LightningModule, model: nn.Module) -> None:
    """Share a module's model out, where its strategy is one that asks the module to.

    Raises:
        MemtxError: the strategy's checkpoints could be left in pieces.
    """
    if module.device_mesh is None:
        return
    strategy = module.trainer.strategy
    if not isinstance(strategy, FullyShardedStrategy):
        raise MemtxError(
            f"trainer.strategy is {type(strategy).__name__}, whose checkpoints a crash can leave in pieces.",
            "Give fsdp2: it is ModelParallelStrategy with checkpoints that are whole or not there.",
        )
    shard_model(model, module.device_mesh, strategy.root_device)

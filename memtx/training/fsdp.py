"""Weights, gradients and optimizer states sharded over all processes (FSDP2; ZeRO, Rajbhandari et al. 2020, section 5).

``--trainer.strategy fsdp2`` is Lightning's ModelParallelStrategy with data parallelism only and atomic checkpoints.
Each block is gathered while it computes. Modules outside the blocks, such as embedding and head, are gathered for the
whole step, so that tied weights stay one tensor.
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
    """Shard a model in place, with the weights of rank 0, block by block over all processes of a mesh of any shape."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):
        return
    for parameter in model.parameters():
        weights = parameter.detach().to(device)
        distributed.broadcast(weights, src=0)
        parameter.data.copy_(weights)
    flat_mesh = mesh if mesh.ndim == 1 else mesh._flatten()
    for block in _shardable_blocks(model):
        fully_shard(block, mesh=flat_mesh)
    fully_shard(model, mesh=flat_mesh)


def _shardable_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that are called as modules, because parameters are gathered only around a call."""
    for module in model.modules():
        blocks = getattr(module, "blocks", None)
        # With memory tokens, parts of a layer are called separately.
        if isinstance(blocks, nn.ModuleList) and getattr(module, "memory_tokens", None) is None:
            yield from (block for block in blocks if type(block).forward is not nn.Module.forward)


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 with atomic checkpoints.

    A checkpoint is a folder, see :mod:`memtx.checkpoint.sharded`, written under another name, synced and renamed.

    Args:
        process_group_backend: "nccl" or "gloo". None means the device's default.
    """

    strategy_name = "fsdp2"

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        """Use every process for data parallelism."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write the shards of every process completely, or raise MemtxError and keep the previous folder."""
        path = Path(self.broadcast(filepath))
        temporary = Path(self.broadcast(files.temporary_path(path)))
        tensors = {"state_dict": checkpoint.pop("state_dict")}
        tensors |= {f"optimizer_{n}": state for n, state in enumerate(checkpoint.pop("optimizer_states", []))}
        from torch.distributed.checkpoint.state_dict_saver import save

        try:
            # Raises on all processes if one of them fails.
            save(tensors, checkpoint_id=temporary)
            failure = self._commit(temporary, path, checkpoint)
        except Exception as error:
            failure = str(error)
        if failure:
            if self.is_global_zero:
                shutil.rmtree(temporary, ignore_errors=True)
            raise MemtxError(
                f"'{path}' could not be written: {' '.join(failure.split())[-200:]}.",
                "Check the folder, its permissions and the free space.",
            )

    def _commit(self, temporary: Path, path: Path, metadata: dict[str, Any]) -> str:
        """Add metadata and checksums, rename the folder, and return the error of any process, or an empty string."""
        checksums, failure = {}, ""
        try:
            checksums = {file.name: files.checksum(file) for file in temporary.glob(f"__{self.global_rank}_*")}
        except OSError as error:
            failure = str(error)
        results = [(checksums, failure)] * self.world_size
        distributed.all_gather_object(results, (checksums, failure))
        failure = "".join(text for _, text in results)
        if self.is_global_zero and not failure:
            try:
                with files.atomic_open(temporary / sharded.META_FILE) as handle:
                    torch.save(metadata, handle)
                names = (sharded.META_FILE, sharded.DCP_METADATA_FILE)
                checksums = {name: files.checksum(temporary / name) for name in names}
                for rank_checksums, _ in results:
                    checksums |= rank_checksums
                sharded.write_checksums(temporary, checksums)
                files.replace(temporary, path)
            except (MemtxError, OSError) as error:
                failure = str(error)
        return str(self.broadcast(failure))

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read this process's shards, of a folder or a file; raises CheckpointError if damaged or of another model."""
        from torch.distributed.checkpoint import state_dict

        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        if not sharded.is_sharded(path):
            content = pretrained.read_checkpoint(path)
            options = state_dict.StateDictOptions(full_state_dict=True)
            state_dict.set_model_state_dict(self.model, content["state_dict"], options=options)
            for optimizer, saved in zip(self.optimizers, content.get("optimizer_states", ()), strict=False):
                by_name = sharded.optimizer_state_by_name(saved, self._parameter_names(optimizer))
                state_dict.set_optimizer_state_dict(self.model, optimizer, by_name, options=options)
            return content
        self._verify(path)
        weights = {"state_dict": state_dict.get_model_state_dict(self.model)}
        sharded.load_into(path, weights)
        state_dict.set_model_state_dict(self.model, weights["state_dict"])
        for number, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{number}"
            states = {name: state_dict.get_optimizer_state_dict(self.model, optimizer)}
            sharded.load_into(path, states)
            state_dict.set_optimizer_state_dict(self.model, optimizer, states[name])
        return sharded.read_metadata(path)

    def _verify(self, path: Path) -> None:
        """Check the folder on one process and raise on all of them."""
        failure: tuple[str, str] | None = None
        if self.is_global_zero:
            try:
                sharded.verify_checksums(path)
            except CheckpointError as error:
                failure = (error.message, error.hint)
        if (failure := self.broadcast(failure)) is not None:
            raise CheckpointError(*failure)

    def _parameter_names(self, optimizer: Optimizer) -> list[str]:
        """Return the names of an optimizer's parameters in the order of its indices."""
        assert self.model is not None
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, sharded or not."""
        if self.is_global_zero:
            files.remove(Path(filepath))


StrategyRegistry.register(
    FullyShardedStrategy.strategy_name,
    FullyShardedStrategy,
    description="Fully sharded data parallel (FSDP2) with atomic checkpoints",
)


def configure_sharding(module: pl.LightningModule, model: nn.Module) -> None:
    """Shard the model if the module's strategy asks for it; raises MemtxError if its checkpoints are not atomic."""
    if module.device_mesh is None:
        return
    strategy = module.trainer.strategy
    if not isinstance(strategy, FullyShardedStrategy):
        raise MemtxError(
            f"The checkpoints of trainer.strategy {type(strategy).__name__} are incomplete after a crash.",
            "Use fsdp2, which is ModelParallelStrategy with atomic checkpoints.",
        )
    shard_model(model, module.device_mesh, strategy.root_device)

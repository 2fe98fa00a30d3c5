"""A module, books and a trainer, all tiny, and a callback that writes down what a run did."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from memtx.checkpoint.training import AtomicCheckpointIO
from memtx.data.books import BookDataModule
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.language import LanguageModule
from memtx.training.optimizers import WarmupCosine
from tests.commands.runs import write_books

SEGMENT = 8


def memory(**options: Any) -> Any:
    return partial(CompressedMemory, **({"window": 6, "compression_rate": 2, "num_entries": 3} | options))


def model(vocab_size: int = 257, **options: Any) -> MemoryTransformer:
    settings: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "memories": (memory(),)}
    return MemoryTransformer(vocab_size, **(settings | options))


def sgd(params: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def module(seed: int = 0, *, dropout: float = 0.1, compile: bool = False, **options: Any) -> LanguageModule:
    seed_everything(seed, verbose=False)
    settings: dict[str, Any] = {"optimizer": adam, "scheduler": partial(WarmupCosine, warmup_steps=2)}
    make: Callable[[int], MemoryTransformer] = partial(
        MemoryTransformer, dim=16, depth=2, heads=2, memories=(memory(),), dropout=dropout
    )
    return LanguageModule(make, segment_length=SEGMENT, compile=compile, **(settings | options))


def data(root: Path, **options: Any) -> BookDataModule:
    if not (root / "books").exists():
        write_books(root / "books")
    settings: dict[str, Any] = {"batch_size": 2, "segment_length": SEGMENT, "bptt_segments": 2, "num_workers": 1}
    return BookDataModule(str(root / "books"), cache_dir=str(root / "cache"), **(settings | options))


def trainer(root: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks),
        "default_root_dir": root,
        "plugins": [AtomicCheckpointIO()],
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **(settings | options))


class Record(pl.Callback):
    """Every batch's loss and every validation's figures by the batches read so far, to the last bit."""

    def __init__(self) -> None:
        self.losses: dict[int, str] = {}
        self.results: dict[int, dict[str, str]] = {}

    @staticmethod
    def _batches(trainer: pl.Trainer) -> int:
        return trainer.fit_loop.epoch_loop.total_batch_idx

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses[self._batches(trainer)] = float(outputs["loss"]).hex()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            metrics = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
            self.results[self._batches(trainer)] = {name: float(value).hex() for name, value in metrics.items()}


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def assert_equal(tensors: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert tensors.keys() == other.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other[name]), name

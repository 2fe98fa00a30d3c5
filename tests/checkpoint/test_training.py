"""Training checkpoints: atomic, named by their step, and read without executing anything."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from memtx.checkpoint import rng
from memtx.checkpoint.pretrained import find_checkpoint, read_checkpoint
from memtx.checkpoint.training import AtomicCheckpointIO, BestCheckpoint
from memtx.cli.errors import EXIT_INTERRUPTED
from memtx.errors import CheckpointError, MemtxError
from memtx.training.callbacks.interrupt import StopOnInterrupt
from memtx.training.callbacks.throughput import Throughput
from memtx.training.carry import Carry
from tests.commands.program import Program
from tests.commands.runs import changed
from tests.training import runs
from tests.training.small import Record, data, memory, model, module, trainer


class Unpicklable:
    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


def test_save_is_atomic(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "folder" / "a.ckpt"
    io.save_checkpoint({"step": torch.tensor(1)}, path)
    with pytest.raises(MemtxError, match="No space left"):
        io.save_checkpoint({"step": torch.arange(10_000), "then": Unpicklable()}, path)
    assert io.load_checkpoint(path)["step"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["a.ckpt"]
    io.remove_checkpoint(path)
    assert not path.exists()


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    with pytest.raises(CheckpointError, match="does not exist"):
        io.load_checkpoint(path)
    io.save_checkpoint({"weights": torch.zeros(1000)}, path)
    content = path.read_bytes()
    for size in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="not a valid checkpoint"):
            io.load_checkpoint(path)


class Evil:
    """Executes code when it is unpickled."""

    ran: list[int] = []  # noqa: RUF012

    def __reduce__(self) -> Any:
        return (Evil.ran.append, (1,))


def test_loading_executes_nothing(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    torch.save({"weights": Evil()}, path)
    # Also if the caller asks for weights_only=False.
    with pytest.raises(CheckpointError, match="not a valid checkpoint"):
        io.load_checkpoint(path, weights_only=False)
    assert Evil.ran == []


class Steps(pl.Callback):
    """Records the step of last.ckpt after each batch and its validation."""

    def __init__(self, last: Path) -> None:
        self.last = last
        self.steps: dict[int, int | None] = {}

    def _record(self, trainer: pl.Trainer) -> None:
        step = torch.load(self.last, weights_only=True)["global_step"] if self.last.exists() else None
        self.steps[trainer.global_step] = step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._record(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record(trainer)


@pytest.mark.parametrize(
    ("every", "options", "expected"),
    [
        # A checkpoint precedes the first validation, and the last step is always saved.
        (2, {"max_steps": 7, "val_check_interval": 6}, [None, None, 2, 2, 4, 4, 6, 7]),
        (None, {"max_steps": 7, "val_check_interval": 3}, [None, None, None, 3, 3, 3, 6, 7]),
        (None, {"max_steps": 5, "limit_val_batches": 0}, [None] * 5 + [5]),
        (3, {"max_steps": 5, "limit_val_batches": 0}, [None, None, None, 3, 3, 5]),
        (None, {"max_steps": 5, "limit_val_batches": 0, "limit_train_batches": 2}, [None, None, 2, 2, 4, 5]),
        # A validation within an accumulation saves the following step, not the previous one again.
        (None, {"max_steps": 4, "val_check_interval": 3, "accumulate_grad_batches": 2}, [None, None, 2, 3, 4]),
    ],
)
def test_last_checkpoint_is_from_the_last_step(
    tmp_path: Path, every: int | None, options: dict[str, Any], expected: list[int | None]
) -> None:
    folder = tmp_path / "checkpoints"
    recorded = Steps(folder / "last.ckpt")
    keep = BestCheckpoint(str(folder), every_n_train_steps=every)
    trainer(tmp_path, recorded, keep, **options).fit(module(), datamodule=data(tmp_path))
    assert [recorded.steps[step] for step in sorted(recorded.steps)] == expected


def test_best_checkpoint_has_the_best_score(tmp_path: Path) -> None:
    folder, record = tmp_path / "run" / "checkpoints", Record()
    keep = BestCheckpoint(str(folder), every_n_train_steps=1)
    # The learning rate becomes too high, so the best step is neither the first nor the last.
    run = trainer(tmp_path, record, keep, max_steps=10, val_check_interval=2)
    run.fit(
        module(scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, rise)),
        datamodule=data(tmp_path),
    )
    scores = {batch + 1: float.fromhex(metrics["val_bits_per_byte"]) for batch, metrics in record.results.items()}
    best = min(scores, key=lambda step: scores[step])
    assert best not in (2, 10)
    note = json.loads((folder / "best.json").read_text())
    assert note == {"path": f"step-{best:08d}.ckpt", "monitor": "val_bits_per_byte", "score": scores[best]}
    names = ["best.json", "earlier-00000009.ckpt", "last.ckpt", note["path"]]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert find_checkpoint(tmp_path / "run") == folder / note["path"]
    # The weights are the validated ones.
    (metrics,) = trainer(tmp_path).validate(
        module(seed=3), datamodule=data(tmp_path), ckpt_path=str(folder / note["path"]), verbose=False
    )
    assert metrics["val_bits_per_byte"] == note["score"]
    content = torch.load(folder / note["path"], weights_only=True)
    assert content["memtx"]["tokens_seen"] == best * 2 * 16


def rise(step: int) -> float:
    return 1.0 if step < 5 else 300.0


def test_invalid_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MemtxError, match="every_n_train_steps is 0"):
        BestCheckpoint(every_n_train_steps=0)


def test_another_model_is_refused(tmp_path: Path) -> None:
    keep = BestCheckpoint(str(tmp_path / "checkpoints"))
    trainer(tmp_path, keep, max_steps=1, limit_val_batches=0).fit(module(), datamodule=data(tmp_path))
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointError, match="another model: dropout differs"):
        trainer(tmp_path, max_steps=2).fit(module(dropout=0.2), datamodule=data(tmp_path), ckpt_path=last)
    with pytest.raises(CheckpointError, match="seed"):
        trainer(tmp_path, max_steps=2).fit(module(), datamodule=data(tmp_path, seed=3), ckpt_path=last)
    with pytest.raises(CheckpointError, match="was not written by memtx"):
        module().on_load_checkpoint({"state_dict": {}})
    old = read_checkpoint(last)
    old["memtx"]["model"]["version"] = 1
    with pytest.raises(CheckpointError, match="format version 1, this release reads 2"):
        module().on_load_checkpoint(old)


def test_state_is_kept_per_stage() -> None:
    reader, carry = model(), Carry()
    state = carry.get_state("train", reader, 2)
    tokens = torch.randint(0, 257, (2, 9))
    carry.set_state("train", reader(tokens, state).state.detach())
    carry.set_state("val", reader(tokens[:, :4]).state.detach())
    carry.reset("val")
    assert carry.nbytes("val") == 0
    assert carry.get_state("val", reader, 2).position.tolist() == [0, 0]
    assert carry.get_state("train", reader, 2).position.tolist() == [9, 9]
    assert carry.nbytes("train") == sum(tensor.nbytes for tensor in carry.state_dict("train").values())
    other = Carry()
    other.load_state_dict("train", carry.state_dict("train"))
    assert other.state_dict("train").keys() == carry.state_dict("train").keys()
    restored = other.get_state("train", reader, 2)
    for name, tensor in carry.state_dict("train").items():
        assert torch.equal(restored.named_tensors()[name], tensor), name
    other.load_state_dict("train", carry.state_dict("train"))
    with pytest.raises(CheckpointError, match="memory of 2 streams, this run has 3"):
        other.get_state("train", reader, 3)
    other.load_state_dict("train", carry.state_dict("train"))
    with pytest.raises(CheckpointError):
        other.get_state("train", model(memories=(memory(window=9),)), 2)


def test_random_numbers_continue_after_restore(tmp_path: Path) -> None:
    import random

    import numpy

    def draw() -> list[float]:
        return [float(torch.rand(())), random.random(), random.gauss(0, 1), float(numpy.random.rand())]

    draw()
    path = tmp_path / "states"
    torch.save(rng.get_rng_state(), path)
    first = draw()
    assert draw() != first
    rng.set_rng_state(torch.load(path, weights_only=True))
    assert draw() == first


def test_ctrl_c_saves_and_run_resumes(program: Program, tmp_path: Path) -> None:
    config = changed(("trainer", "max_steps"), 6)
    config["trainer"] |= {"accumulate_grad_batches": 2, "val_check_interval": 5}
    workdir = runs.prepare(tmp_path, config)
    assert runs.fit(program, workdir, "whole").code == 0
    for signum, strike, last in ((signal.SIGINT, 2, 3), (signal.SIGTERM, 7, 7)):
        result = runs.fit(program, workdir, "struck", strike=strike, signal=int(signum))
        assert result.code == EXIT_INTERRUPTED, result
        assert "Traceback" not in result.err
        # The optimizer step is finished, so that no accumulated gradient is lost.
        assert max(runs.losses(workdir, "struck")) == last
    assert runs.fit(program, workdir, "struck").code == 0
    assert runs.losses(workdir, "struck") == runs.losses(workdir, "whole")
    assert runs.weights(workdir, "struck") == runs.weights(workdir, "whole")


def test_signal_handlers_are_restored(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    trainer(tmp_path, StopOnInterrupt(), max_steps=1, limit_val_batches=0).fit(module(), datamodule=data(tmp_path))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    # A process that cannot handle signals still trains.
    thread = threading.Thread(target=lambda: StopOnInterrupt().on_train_start(trainer(tmp_path), module()), daemon=True)
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_speed_and_memory_are_logged(tmp_path: Path) -> None:
    language_module = module()
    run = trainer(tmp_path, Throughput(every_n_batches=2), max_steps=4, val_check_interval=3)
    run.fit(language_module, datamodule=data(tmp_path))
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged["tokens_per_second"] > 0
    assert logged["peak_memory_mib"] > 1
    assert logged["state_mib"] == pytest.approx(language_module.carry.nbytes("train") / 2**20)
    assert logged["state_mib"] > 0

"""Checkpoints: whole or not there, named for what they are, and read without running anything."""

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


def test_whole_or_not_there(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "folder" / "a.ckpt"
    io.save_checkpoint({"step": torch.tensor(1)}, path)
    with pytest.raises(MemtxError, match="No space left"):
        io.save_checkpoint({"step": torch.arange(10_000), "then": Unpicklable()}, path)
    assert io.load_checkpoint(path)["step"] == 1
    assert [one.name for one in path.parent.iterdir()] == ["a.ckpt"]
    io.remove_checkpoint(path)
    assert not path.exists()


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    with pytest.raises(CheckpointError, match="does not exist"):
        io.load_checkpoint(path)
    io.save_checkpoint({"weights": torch.zeros(1000)}, path)
    content = path.read_bytes()
    for size in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="not a whole checkpoint"):
            io.load_checkpoint(path)


class Evil:
    """Runs when it is unpickled."""

    ran: list[int] = []  # noqa: RUF012

    def __reduce__(self) -> Any:
        return (Evil.ran.append, (1,))


def test_nothing_in_it_is_run(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    torch.save({"weights": Evil()}, path)
    # Also where the caller would have trusted it.
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        io.load_checkpoint(path, weights_only=False)
    assert Evil.ran == []


class Steps(pl.Callback):
    """Which step last.ckpt is of, after each batch and its validation."""

    def __init__(self, last: Path) -> None:
        self.last = last
        self.found: dict[int, int | None] = {}

    def _look(self, trainer: pl.Trainer) -> None:
        step = torch.load(self.last, weights_only=True)["global_step"] if self.last.exists() else None
        self.found[trainer.global_step] = step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._look(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)


@pytest.mark.parametrize(
    ("every", "options", "expected"),
    [
        # With no validation yet there is one all the same; the last step is kept whatever the rhythm.
        (2, {"max_steps": 7, "val_check_interval": 6}, [None, None, 2, 2, 4, 4, 6, 7]),
        (None, {"max_steps": 7, "val_check_interval": 3}, [None, None, None, 3, 3, 3, 6, 7]),
        (None, {"max_steps": 5, "limit_val_batches": 0}, [None] * 5 + [5]),
        (3, {"max_steps": 5, "limit_val_batches": 0}, [None, None, None, 3, 3, 5]),
        (None, {"max_steps": 5, "limit_val_batches": 0, "limit_train_batches": 2}, [None, None, 2, 2, 4, 5]),
        # After two batches and a half, the step before is not written again: its successor is.
        (None, {"max_steps": 4, "val_check_interval": 3, "accumulate_grad_batches": 2}, [None, None, 2, 3, 4]),
    ],
)
def test_last_is_the_last(
    tmp_path: Path, every: int | None, options: dict[str, Any], expected: list[int | None]
) -> None:
    folder = tmp_path / "checkpoints"
    steps = Steps(folder / "last.ckpt")
    keep = BestCheckpoint(str(folder), every_n_train_steps=every)
    trainer(tmp_path, steps, keep, **options).fit(module(), datamodule=data(tmp_path))
    assert [steps.found[step] for step in sorted(steps.found)] == expected


def test_best_is_the_best(tmp_path: Path) -> None:
    folder, record = tmp_path / "run" / "checkpoints", Record()
    keep = BestCheckpoint(str(folder), every_n_train_steps=1)
    # A rate that is too high from some step on: the best is neither the first nor the last.
    run = trainer(tmp_path, record, keep, max_steps=10, val_check_interval=2)
    run.fit(module(scheduler=lambda one: torch.optim.lr_scheduler.LambdaLR(one, rise)), datamodule=data(tmp_path))
    scores = {batch + 1: float.fromhex(found["val_bits_per_byte"]) for batch, found in record.found.items()}
    best = min(scores, key=lambda step: scores[step])
    assert best not in (2, 10)
    note = json.loads((folder / "best.json").read_text())
    assert note == {"path": f"step-{best:08d}.ckpt", "monitor": "val_bits_per_byte", "score": scores[best]}
    names = ["best.json", "earlier-00000009.ckpt", "last.ckpt", note["path"]]
    assert sorted(one.name for one in folder.iterdir()) == names
    assert find_checkpoint(tmp_path / "run") == folder / note["path"]
    # The weights are those that were measured.
    (found,) = trainer(tmp_path).validate(
        module(seed=3), datamodule=data(tmp_path), ckpt_path=str(folder / note["path"]), verbose=False
    )
    assert found["val_bits_per_byte"] == note["score"]
    content = torch.load(folder / note["path"], weights_only=True)
    assert content["memtx"]["tokens_seen"] == best * 2 * 16


def rise(step: int) -> float:
    return 1.0 if step < 5 else 300.0


def test_settings_that_cannot_be(tmp_path: Path) -> None:
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
    with pytest.raises(CheckpointError, match="something else"):
        module().on_load_checkpoint({"state_dict": {}})
    old = read_checkpoint(last)
    old["memtx"]["model"]["version"] = 1
    with pytest.raises(CheckpointError, match="format version 1, this release reads 2"):
        module().on_load_checkpoint(old)


def test_memory_is_kept_by_stage() -> None:
    reader, carry = model(), Carry()
    state = carry.get_state("train", reader, 2)
    tokens = torch.randint(0, 257, (2, 9))
    carry.set_state("train", reader(tokens, state).state.detach())
    carry.set_state("val", reader(tokens[:, :4]).state.detach())
    carry.reset("val")
    assert carry.nbytes("val") == 0
    assert carry.get_state("val", reader, 2).position.tolist() == [0, 0]
    assert carry.get_state("train", reader, 2).position.tolist() == [9, 9]
    assert carry.nbytes("train") == sum(one.nbytes for one in carry.state_dict("train").values())
    other = Carry()
    other.load_state_dict("train", carry.state_dict("train"))
    assert other.state_dict("train").keys() == carry.state_dict("train").keys()
    taken = other.get_state("train", reader, 2)
    for name, tensor in carry.state_dict("train").items():
        assert torch.equal(taken.named_tensors()[name], tensor), name
    other.load_state_dict("train", carry.state_dict("train"))
    with pytest.raises(CheckpointError, match="rows"):
        other.get_state("train", reader, 3)
    other.load_state_dict("train", carry.state_dict("train"))
    with pytest.raises(CheckpointError):
        other.get_state("train", model(memories=(memory(window=9),)), 2)


def test_random_numbers_go_on(tmp_path: Path) -> None:
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


def test_ctrl_c_saves_and_goes_on(program: Program, tmp_path: Path) -> None:
    config = changed(("trainer", "max_steps"), 6)
    config["trainer"] |= {"accumulate_grad_batches": 2, "val_check_interval": 5}
    at = runs.prepare(tmp_path, config)
    assert runs.fit(program, at, "whole").code == 0
    for number, strike, last in ((signal.SIGINT, 2, 3), (signal.SIGTERM, 7, 7)):
        done = runs.fit(program, at, "struck", strike=strike, signal=int(number))
        assert done.code == EXIT_INTERRUPTED, done
        assert "Traceback" not in done.err
        # To the end of the optimiser's step, so that nothing accumulated is lost.
        assert max(runs.losses(at, "struck")) == last
    assert runs.fit(program, at, "struck").code == 0
    assert runs.losses(at, "struck") == runs.losses(at, "whole")
    assert runs.weights(at, "struck") == runs.weights(at, "whole")


def test_signals_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    trainer(tmp_path, StopOnInterrupt(), max_steps=1, limit_val_batches=0).fit(module(), datamodule=data(tmp_path))
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    # Where a process cannot listen, it trains all the same.
    thread = threading.Thread(target=lambda: StopOnInterrupt().on_train_start(trainer(tmp_path), module()), daemon=True)
    thread.start()
    thread.join()
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_speed_and_memory_are_logged(tmp_path: Path) -> None:
    taught = module()
    run = trainer(tmp_path, Throughput(every_n_batches=2), max_steps=4, val_check_interval=3)
    run.fit(taught, datamodule=data(tmp_path))
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged["tokens_per_second"] > 0
    assert logged["peak_memory_mib"] > 1
    assert logged["state_mib"] == pytest.approx(taught.carry.nbytes("train") / 2**20)
    assert logged["state_mib"] > 0

"""Phases of training: windows, batches and rates at each step, and a run that resumes in one as if it had not ended."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import seed_everything

from memtx import CompressedMemory, GrowingWindows, MemoryTransformer, MemtxError, RecurrentMemory, RetrievalMemory
from memtx.checkpoint.training import BestCheckpoint
from memtx.models.growing_windows import scale_windows
from memtx.training.callbacks.staged_training import StagedTraining
from memtx.training.language import LanguageModule
from tests.training.small import SEGMENT, Record, adam, data, trainer

WINDOWS = GrowingWindows(window=[2, 4], dilations=[1, [2]])
STAGES: dict[str, Any] = {"steps": [3, 3, 1], "batch_sizes": [2, 2, 1], "warmup_fraction": 0.5}


class Watch(pl.Callback):
    """Notes windows, batches and rates of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[int], tuple[int, ...], float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        windows = [block.attention.memory.window for block in pl_module.model._layers()]
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.steps.append((windows, (*batch.tokens.shape, pl_module.segment_length), rate))


def staged(seed: int = 0) -> LanguageModule:
    seed_everything(seed, verbose=False)
    make: Any = partial(MemoryTransformer, dim=16, depth=2, heads=2, memories=WINDOWS, dropout=0.1)
    return LanguageModule(make, segment_length=SEGMENT, optimizer=adam)


def test_windows_segments_and_rates_change_by_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch, run = Watch(), staged()
    callbacks = [StagedTraining(**STAGES, max_segment_length=20), watch]
    trainer(tmp_path, *callbacks, max_steps=8, limit_val_batches=1).fit(run, datamodule=data(tmp_path))
    lengths = [8] * 3 + [16] * 3 + [20] * 2
    assert [step[1] for step in watch.steps] == [
        (batch, 2 * length, length) for batch, length in zip([2] * 6 + [1] * 2, lengths, strict=True)
    ]
    assert [step[0] for step in watch.steps] == [[2, 4]] * 3 + [[4, 8]] * 3 + [[8, 16]] * 2
    # Half of three steps is one step of warm-up, at the full rate.
    assert [step[2] for step in watch.steps] == pytest.approx([0.01] * 3 + [0.005] * 3 + [0.0025] * 2)
    stacks = run.model.config["init_args"]["memories"]
    assert [stack[0]["init_args"]["window"] for stack in stacks] == [8, 16]
    assert stacks[1][0]["init_args"]["dilation"] == [2]
    assert "step 6  Phase 3 of 3: windows of up to 16 tokens, segments of 20" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [2, 3, 5, 6, 7])
def test_a_run_resumes_in_its_phase(tmp_path: Path, stop: int) -> None:
    def run(steps: int, keep: list[Any], path: str | None = None) -> tuple[dict[int, str], Any]:
        record, fresh = Record(), staged(seed=3)
        callbacks = [StagedTraining(**STAGES), record, *keep]
        options = {"max_steps": steps, "limit_val_batches": 1, "val_check_interval": 3}
        trainer(tmp_path, *callbacks, **options).fit(fresh, datamodule=data(tmp_path), ckpt_path=path)
        return record.losses, fresh

    expected, uninterrupted = run(9, [])
    first, _ = run(stop, [BestCheckpoint(str(tmp_path / "checkpoints"))])
    path = tmp_path / "checkpoints" / "last.ckpt"
    memory = MemoryTransformer.from_pretrained(path)._layers()[1].attention.memory
    assert isinstance(memory, RecurrentMemory)
    assert memory.window == 4 * 2 ** ((stop > 3) + (stop > 6))
    second, resumed = run(9, [], str(path))
    assert first | second == expected
    for name, weight in uninterrupted.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name])


def test_windows_of_all_kinds_are_scaled_and_weights_stay() -> None:
    memories = [
        [partial(RecurrentMemory, window=5), partial(RetrievalMemory, capacity=9, heads=2, exclude_recent=5)],
        partial(CompressedMemory, window=6, compression_rate=2),
        partial(RecurrentMemory, window=100, near_window=3, entry_bias=-1.0),
    ]
    model = MemoryTransformer(30, dim=8, depth=3, heads=2, memories=memories).eval()
    before, parameters = model.config["init_args"]["memories"], dict(model.named_parameters())
    random_state = torch.get_rng_state()
    scale_windows(model, before, 2.5)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    fresh = MemoryTransformer(
        30, dim=8, depth=3, heads=2,
        memories=[
            [partial(RecurrentMemory, window=12), partial(RetrievalMemory, capacity=9, heads=2, exclude_recent=12)],
            partial(CompressedMemory, window=15, compression_rate=2),
            partial(RecurrentMemory, window=100, near_window=7, entry_bias=-1.0),
        ],
    ).eval()  # fmt: skip
    assert fresh.config == model.config
    fresh.load_state_dict(model.state_dict())
    tokens = torch.randint(30, (1, 60))
    assert torch.equal(fresh(tokens).logits, model(tokens).logits)
    assert fresh.init_state(1).named_tensors().keys() == model.init_state(1).named_tensors().keys()


@pytest.mark.parametrize(
    "options", [{"steps": []}, {"steps": [0]}, {"steps": [2], "batch_sizes": [1, 2]}, {"steps": [1], "lr_factor": 0}]
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MemtxError):
        StagedTraining(**options)


def test_what_cannot_change_is_refused_before_training(tmp_path: Path) -> None:
    near = partial(RecurrentMemory, window=8, near_window=3)
    run = LanguageModule(partial(MemoryTransformer, dim=16, depth=1, heads=2, memories=[near]))
    with pytest.raises(MemtxError, match="near_window is 12, window 8"):
        trainer(tmp_path, StagedTraining([1, 1, 1]), max_steps=3).fit(run, datamodule=data(tmp_path))

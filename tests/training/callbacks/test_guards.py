"""Guards of a run: non-finite steps, loss spikes, memory norms and out-of-memory hints."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from memtx.checkpoint.async_io import AsyncAtomicCheckpointIO
from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.checkpoint.training import BestCheckpoint
from memtx.data.batch import Batch
from memtx.errors import MemtxError
from memtx.training.callbacks import skip_nonfinite
from memtx.training.callbacks.loss_spikes import NUM_RECENT, RewindOnSpike, loss_upper_bound
from memtx.training.callbacks.memory_monitor import NUM_CHECKS, MemoryNormMonitor
from memtx.training.callbacks.oom import OutOfMemoryHint, is_out_of_memory
from memtx.training.callbacks.skip_nonfinite import SkipNonFinite
from memtx.training.carry import Carry
from memtx.training.language import LanguageModule
from tests.training.small import Record, adam, assert_equal, data, module, sgd, trainer, weights


class Poison(pl.Callback):
    """Makes the output of a layer, or its gradient, non-finite in some batches."""

    def __init__(self, batches: tuple[int, ...], back: bool = False) -> None:
        self.batches, self.back = batches, back
        self.bad = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def spoil(part: nn.Module, inputs: Any, out: Tensor) -> Tensor:
            if self.bad and self.back and out.requires_grad:
                out.register_hook(lambda gradient: gradient * math.inf)
            return out * math.nan if self.bad and not self.back else out

        pl_module.get_submodule("model.blocks.1.feed_forward").register_forward_hook(spoil)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.bad = trainer.fit_loop.epoch_loop.total_batch_idx in self.batches


class Watched(pl.Callback):
    """Weights, optimizer state and memory after every batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[dict[str, Tensor]] = []
        self.states: list[dict[str, Tensor]] = []
        self.batches: list[Batch] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModule)
        self.weights.append(weights(pl_module.model))
        states = trainer.optimizers[0].state_dict()["state"].items()
        self.moments.append(
            {f"{index}.{name}": tensor.clone() for index, state in states for name, tensor in state.items()}
        )
        self.states.append({name: tensor.clone() for name, tensor in pl_module.carry.state_dict("train").items()})
        self.batches.append(batch)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nonfinite_step_is_skipped(
    tmp_path: Path, back: bool, accumulate: int, capfd: pytest.CaptureFixture[str]
) -> None:
    guard, watched = SkipNonFinite(), Watched()
    last = 2 * accumulate - 1
    run = trainer(
        tmp_path, guard, watched, Poison((last,), back=back), max_steps=3, limit_val_batches=0,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    run.fit(module(dropout=0.0), datamodule=data(tmp_path))
    before = last - accumulate
    assert_equal(watched.weights[last], watched.weights[before])
    assert_equal(watched.moments[last], watched.moments[before])
    # The memory too, except for streams in which a document began in the skipped batches.
    began = torch.cat([batch.document_starts for batch in watched.batches[before + 1 : last + 1]], dim=1).any(1)
    assert not began.all()
    for name, tensor in watched.states[last].items():
        assert torch.equal(tensor[~began], watched.states[before][name][~began]), name
        assert not tensor[began].any()
    # Then it goes on.
    assert any(not torch.equal(weight, watched.weights[last][name]) for name, weight in watched.weights[-1].items())
    assert (run.global_step, guard.num_skipped, guard.num_consecutive) == (3, 1, 0)
    assert run.callback_metrics["skipped_steps"] == 1
    assert run.callback_metrics["grad_norm"] > 0
    message = capfd.readouterr().err
    assert "step 1  The " in message
    assert "1 in a row, 1 in total" in message
    # Down to the layer: in the backward pass, the first of its parameters that the poisoned gradient reaches.
    layer = "model.blocks.1.feed_forward"
    assert (f"in the backward pass, the gradient of {layer}" if back else f"output of {layer} is") in message


def test_guards_do_not_change_a_run(tmp_path: Path) -> None:
    records = []
    for guards in ((), (SkipNonFinite(), MemoryNormMonitor(every_n_batches=1), OutOfMemoryHint())):
        record = Record()
        trainer(tmp_path, record, *guards, max_steps=4, val_check_interval=2).fit(module(), datamodule=data(tmp_path))
        records.append(record)
    assert records[0].losses == records[1].losses
    assert records[0].results == records[1].results


def test_a_skip_does_not_change_the_random_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pass that finds the layer changes no later random number and no count."""
    samples, counted = [], []
    for reads in (True, False):
        if not reads:
            monkeypatch.setattr(skip_nonfinite, "find_first_nonfinite", lambda *_: "")
        language_module, record = module(), Record()
        run = trainer(tmp_path, SkipNonFinite(), Poison((1,)), record, max_steps=3, limit_val_batches=0)
        run.fit(language_module, datamodule=data(tmp_path))
        samples.append((torch.get_rng_state().tolist(), record.losses[2]))
        counted.append((language_module.tokens_seen, sorted(run.callback_metrics)))
    assert samples[0] == samples[1]
    assert counted[0] == counted[1]


def test_a_diverged_run_stops_and_names_the_layer(tmp_path: Path) -> None:
    keep = BestCheckpoint(str(tmp_path / "checkpoints"), every_n_train_steps=1)
    explode = partial(sgd, lr=1e30)
    run = trainer(tmp_path, SkipNonFinite(patience=3), keep, max_steps=10, limit_val_batches=0)
    with pytest.raises(MemtxError, match=r"is (nan|inf) at step 3, and 3 steps in a row .*first .* learning rate"):
        run.fit(module(optimizer=explode, scheduler=None), datamodule=data(tmp_path))
    # The checkpoint is from before: none was written while steps were skipped.
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 1
    load_model_and_tokenizer(last)


def test_a_resumed_run_continues_the_counts(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for steps, poisoned, begin in ((3, (0, 2), None), (5, (3, 4), str(folder / "last.ckpt"))):
        guard, keep = SkipNonFinite(), BestCheckpoint(str(folder))
        run = trainer(tmp_path, guard, keep, Poison(poisoned), max_steps=steps, limit_val_batches=0)
        run.fit(module(), datamodule=data(tmp_path), ckpt_path=begin)
    # The last step's checkpoint is written whatever it is: there is no later one.
    assert (guard.num_skipped, guard.num_consecutive) == (4, 3)
    with pytest.raises(MemtxError, match="patience is 0"):
        SkipNonFinite(patience=0)


def test_nonfinite_memory_is_reset(tmp_path: Path) -> None:
    reader, carry = module().model, Carry()
    state = reader(torch.arange(16).view(2, 8)).state
    second = torch.tensor([1])
    carry.set_state(
        "train", state.map(lambda leaf: leaf.index_fill(0, second, math.nan) if leaf.is_floating_point() else leaf)
    )
    carry.snapshot("train")
    carry.get_state("train", reader, 2)
    carry.set_state("train", reader.init_state(2))
    carry.rollback("train")
    restored = carry.get_state("train", reader, 2)
    assert restored.select([0]).equals(state.select([0]))
    assert restored.select([1]).equals(reader.init_state(1))


# Spikes


class Rise(pl.Callback):
    """Throws the weights off at a step, once."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.read: list[int] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.read.append(int(batch.tokens.sum()))
        if trainer.global_step == self.step:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.mul_(-3.0)


def spiked(
    root: Path, name: str, step: int, steps: int, begin: str | None = None, plugin: Any = None
) -> tuple[pl.Trainer, LanguageModule, Rise, RewindOnSpike]:
    guard, rise = RewindOnSpike(window=NUM_RECENT), Rise(step)
    keep = BestCheckpoint(str(root / name), every_n_train_steps=3)
    language_module = module(dropout=0.0, optimizer=partial(adam), scheduler=None)
    options = {} if plugin is None else {"plugins": [plugin]}
    run = trainer(root, guard, rise, keep, max_steps=steps, limit_val_batches=0, **options)
    run.fit(language_module, datamodule=data(root), ckpt_path=begin)
    return run, language_module, rise, guard


@pytest.mark.parametrize("plugin", [None, AsyncAtomicCheckpointIO()])
def test_a_spike_is_rewound_and_skipped(tmp_path: Path, plugin: Any, capfd: pytest.CaptureFixture[str]) -> None:
    at = 2 * NUM_RECENT + 4
    run, _, rise, guard = spiked(tmp_path, "spiked", at, at + 2 * NUM_RECENT, plugin=plugin)
    assert guard.num_rewinds == 1
    message = capfd.readouterr().err
    assert "The loss rose above" in message
    assert "and the next data" in message
    # From before the spike: nothing was written while the loss was up.
    assert at - 3 <= int(message.replace(",", "").split("weights of step ")[1].split()[0]) <= at
    assert float(run.callback_metrics["train_loss"]) < 6.0
    # The data went on: what an undisturbed run reads.
    plain = Rise(-1)
    trainer(tmp_path, plain, max_steps=run.global_step, limit_val_batches=0).fit(
        module(dropout=0.0, scheduler=None), datamodule=data(tmp_path)
    )
    assert rise.read == plain.read


def test_a_rewound_run_resumes_exactly(tmp_path: Path) -> None:
    at = 2 * NUM_RECENT + 4
    run, language_module, _, _ = spiked(tmp_path, "whole", at, at + 2 * NUM_RECENT)
    # Killed after the spike began, and after the rewind.
    for name, killed in (("early", at + 2), ("late", at + NUM_RECENT + 4)):
        spiked(tmp_path, name, at, killed)
        _, other, _, guard = spiked(tmp_path, name, at, run.global_step, str(tmp_path / name / "last.ckpt"))
        assert guard.num_rewinds == 1
        assert_equal(weights(other), weights(language_module))


def test_noise_is_no_spike() -> None:
    draw = torch.Generator().manual_seed(0)
    losses = (3.0 + 0.2 * torch.randn(1000, generator=draw, dtype=torch.float64)).tolist()
    for step in range(128, 1000):
        assert losses[step] < loss_upper_bound(losses[step - 128 : step], 6.0)
    # A steady loss has a spread of next to nothing; a rise of a twentieth is none all the same.
    assert loss_upper_bound([2.0] * 100, 6.0) > 2.1
    assert loss_upper_bound([2.0] * 100, 6.0) < 2.5


def test_spikes_that_cannot_be_rewound(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    at = 2 * NUM_RECENT + 1
    guard = RewindOnSpike(window=NUM_RECENT)
    run = trainer(tmp_path, guard, Rise(at), max_steps=at + NUM_RECENT, limit_val_batches=0)
    run.fit(module(dropout=0.0, scheduler=None), datamodule=data(tmp_path))
    assert "no checkpoint from before it" in capfd.readouterr().err
    guard.max_rewinds, guard.num_rewinds = 1, 1
    with pytest.raises(MemtxError, match="spike 2 of this run"):
        guard._rewind(run, module(), 1, "The loss rose")
    for wrong in ({"window": 1}, {"max_rewinds": 0}, {"factor": 0.0}):
        with pytest.raises(MemtxError):
            RewindOnSpike(**wrong)  # type: ignore[arg-type]


# Memory in both senses


def test_norms_of_every_layer_are_logged(tmp_path: Path) -> None:
    language_module = module()
    run = trainer(tmp_path, MemoryNormMonitor(every_n_batches=3), max_steps=3, limit_val_batches=0)
    run.fit(language_module, datamodule=data(tmp_path))
    states = language_module.carry.state_dict("train")
    for layer in (0, 1):
        tensors = [tensor.double() for name, tensor in states.items() if name.startswith(f"layers[{layer}]")]
        tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        expected = math.sqrt(
            sum(float(tensor.square().sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)
        )
        assert float(run.callback_metrics[f"memory_rms_{layer}"]) == pytest.approx(expected, rel=1e-5)


class Stub:
    is_global_zero, global_step = True, 7


@pytest.mark.parametrize(
    ("rms_values", "message"),
    [
        ([0.0] * NUM_CHECKS, "nothing is written"),
        ([0.0, 0.0, 0.1, 0.0, 0.0], ""),
        ([1.0, 4.0, 20.0, 70.0, 200.0], "grew from 1 to 200"),
        ([1.0, 4.0, 3.0, 70.0, 200.0], ""),
        ([1.0, 1.1, 1.2, 1.3, 1.4], ""),
    ],
)
def test_memory_warnings_are_written_once(
    rms_values: list[float], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    guard = MemoryNormMonitor()
    for _ in range(2):
        for rms in rms_values:
            guard._check_history(Stub(), "layers[1][0].bank", rms)  # type: ignore[arg-type]
        guard._rms_history.clear()
    err = capfd.readouterr().err
    assert err.count("layers[1][0].bank") == bool(message)
    assert message in err
    with pytest.raises(MemtxError, match="every_n_batches is 0"):
        MemoryNormMonitor(every_n_batches=0)


class Full(pl.Callback):
    """Runs out of memory as torch says it."""

    def __init__(self, error: BaseException, validation: bool = False) -> None:
        self.error, self.validation = error, validation

    def on_train_batch_end(self, *_: Any) -> None:
        if not self.validation:
            raise self.error

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.validation:
            raise self.error


CPU = "[enforce fail at alloc_cpu.cpp:123] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"


@pytest.mark.parametrize("error", [RuntimeError(CPU), torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
@pytest.mark.parametrize(
    ("validation", "options", "expected"),
    [
        (
            False,
            {"batch_size": 6, "bptt_segments": 3},
            ("--data.batch_size 3 halves", "accumulate_grad_batches 2", "batch size 6 x 3 segments x 8"),
        ),
        (
            False,
            {"batch_size": 1, "bptt_segments": 4},
            ("--data.bptt_segments 2 halves", "--model.replay true stores one", "instead of 4"),
        ),
        (
            False,
            {"batch_size": 1, "bptt_segments": 1},
            ("--data.segment_length 4 halves", "--model.activation_checkpointing true", "instead of 2"),
        ),
        (True, {"eval_batch_size": 4}, ("--data.eval_batch_size 2 halves", "changes no result")),
    ],
)
def test_out_of_memory_hints_name_options(
    tmp_path: Path, error: BaseException, validation: bool, options: dict[str, Any], expected: tuple[str, ...]
) -> None:
    assert is_out_of_memory(error)
    run = trainer(tmp_path, OutOfMemoryHint(), Full(error, validation), max_steps=1, num_sanity_val_steps=1)
    with pytest.raises(type(error)) as caught:
        run.fit(module(), datamodule=data(tmp_path, **options))
    message = caught.value.__notes__[-1]
    assert all(text in message for text in expected), message
    error.__notes__.clear()


def test_other_errors_are_not_out_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("not enough memory"))

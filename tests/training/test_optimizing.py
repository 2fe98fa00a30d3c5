"""Effect of a step on the weights: optimizer, schedule, clipping, accumulation and precision."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, StepLR

from memtx.data.batch import Batch
from memtx.errors import MemtxError
from memtx.memory.copy_memory import CopyMemory
from memtx.memory.retrieval import RetrievalMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.language import LanguageModule
from memtx.training.optimizers import (
    StagedLinear,
    WarmupCosine,
    WarmupLinear,
    build_optimizer,
    build_scheduler,
    make_param_groups,
)
from memtx.training.tbptt import unroll
from tests.memory_zoo import KINDS
from tests.training.small import SEGMENT, Record, adam, data, memory, model, module, sgd, trainer, weights


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((after[name] - tensor).double().square().sum()) for name, tensor in before.items()))


def unit_sgd(params: Any) -> torch.optim.Optimizer:
    return sgd(params, lr=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(kind: str) -> None:
    """From the very first batch, when nothing is remembered yet: DDP stops at a parameter without one."""
    decoder = model(30, memories=(KINDS[kind](6, 2, 3),))
    tokens = torch.randint(0, 30, (2, 3))
    document_starts = torch.zeros_like(tokens, dtype=torch.bool)
    unroll(decoder, tokens, tokens, document_starts, decoder.init_state(2), segment_length=3).loss.backward()  # type: ignore[no-untyped-call]
    assert [name for name, parameter in decoder.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind: str) -> None:
    """Once memory is full, by a gradient that is not zero; some have theirs only after a step."""
    torch.manual_seed(0)
    decoder = model(30, memories=(KINDS[kind](6, 2, 3),))
    tokens = torch.randint(0, 30, (2, 32))
    document_starts = torch.zeros_like(tokens, dtype=torch.bool)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        unroll(decoder, tokens, tokens, document_starts, decoder.init_state(2), segment_length=SEGMENT).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    assert [name for name, grad in gradients.items() if grad is None or not grad.abs().max() > 0] == []


def test_only_matrices_have_weight_decay() -> None:
    decoder = model(30, bias=True)
    decayed, free = make_param_groups(decoder)
    assert "weight_decay" not in decayed
    assert free["weight_decay"] == 0.0
    parameters = {id(parameter): parameter for parameter in decoder.parameters()}
    assert sorted(map(id, decayed["params"] + free["params"])) == sorted(parameters)
    assert {parameter.dim() for parameter in free["params"]} == {1}
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    for parameter in decoder.parameters():
        parameter.requires_grad_(parameter.dim() < 2)
    (only,) = make_param_groups(decoder)
    assert only["weight_decay"] == 0.0


def gated_model() -> MemoryTransformer:
    stack = [memory(entry_bias=-3.0), partial(RetrievalMemory, capacity=8, top_k=2, exclude_recent=6, heads=2)]
    return model(30, memories=(stack,), gated_memory=True, output_memory=partial(CopyMemory, num_entries=8, key_dim=4))


GATES = {"entry_bias", "gate", "mix_gate", "log_scale", "match_weight"}
GATES |= {"output_memory.gate.weight", "output_memory.gate.bias"}


def gate_rates(optimizer: torch.optim.Optimizer, decoder: MemoryTransformer) -> tuple[set[float], set[float]]:
    """Return the rates of the gates and of all others."""
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    rates: tuple[set[float], set[float]] = set(), set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            is_gate = name in GATES or name.rpartition(".")[2] in GATES
            assert not (is_gate and group["weight_decay"]), name
            rates[not is_gate].add(group["lr"])
    assert all(rates)
    return rates


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", "Muon"])
@pytest.mark.parametrize("multiplier", [1.0, 5.0])
def test_gates_have_a_rate_of_their_own_and_no_decay(name: str, multiplier: float) -> None:
    decoder = gated_model()
    optimizer = build_optimizer(partial(getattr(torch.optim, name), lr=1e-3, weight_decay=0.1), decoder, multiplier)
    gates, others = gate_rates(optimizer, decoder)
    assert others == {1e-3}
    assert [*gates] == pytest.approx([1e-3 * multiplier])


@pytest.mark.parametrize(
    "make_scheduler",
    [
        partial(WarmupCosine, warmup_steps=2, total_steps=9),
        partial(WarmupLinear, warmup_steps=2, total_steps=9),
        partial(StepLR, step_size=2),
        partial(OneCycleLR, max_lr=0.1, total_steps=9),
        partial(CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False),
    ],
)
def test_schedules_keep_the_multiple(make_scheduler: Any) -> None:
    decoder = gated_model()
    optimizer = build_optimizer(partial(torch.optim.AdamW, lr=1e-3), decoder, 5.0)
    scheduler = build_scheduler(make_scheduler, optimizer, decoder, 5.0)
    for _ in range(7):
        (gate_rate,), (rate,) = gate_rates(optimizer, decoder)
        assert gate_rate == pytest.approx(5.0 * rate)
        optimizer.step()
        scheduler.step()


def test_a_run_with_gates_resumes_exactly(tmp_path: Path) -> None:
    def start() -> LanguageModule:
        torch.manual_seed(0)
        return LanguageModule(
            lambda vocabulary: model(vocabulary, memories=(memory(entry_bias=-3.0),)),
            segment_length=SEGMENT,
            optimizer=adam,
            gate_lr_multiplier=10.0,
        )

    texts, full = data(tmp_path), start()
    trainer(tmp_path, max_steps=6, limit_val_batches=0).fit(full, datamodule=texts)
    path, half = tmp_path / "half.ckpt", start()
    run = trainer(tmp_path, max_steps=3, limit_val_batches=0)
    run.fit(half, datamodule=data(tmp_path))
    run.save_checkpoint(path)
    resumed = start()
    run = trainer(tmp_path, max_steps=6, limit_val_batches=0)
    run.fit(resumed, datamodule=data(tmp_path), ckpt_path=path)
    (gate_rate,), (rate,) = gate_rates(run.optimizers[0], resumed.model)
    assert gate_rate == pytest.approx(10.0 * rate)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(full).items())


@pytest.mark.parametrize("multiplier", [0.0, -1.0, math.inf, math.nan])
def test_a_multiplier_is_a_positive_number(multiplier: float) -> None:
    with pytest.raises(MemtxError, match="gate_lr_multiplier"):
        module(gate_lr_multiplier=multiplier)


def learning_rates(schedule: WarmupCosine, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        schedule.optimizer.step()
        schedule.step()
    return rates


def optimizer(lr: float = 2.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_warmup_then_cosine() -> None:
    rates = learning_rates(WarmupCosine(optimizer(), warmup_steps=4, total_steps=12, min_lr_ratio=0.1), 15)
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    # Half of the way down, half of the range.
    assert rates[8] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[12:] == pytest.approx([0.2] * 3)
    assert rates[4:13] == sorted(rates[4:13], reverse=True)
    assert learning_rates(WarmupCosine(optimizer(), warmup_steps=0, total_steps=0), 3) == [2.0] * 3
    for wrong in ({"warmup_steps": -1}, {"total_steps": -1}, {"min_lr_ratio": 1.5}, {"min_lr_ratio": -0.1}):
        with pytest.raises(MemtxError, match="schedule"):
            WarmupCosine(optimizer(), **wrong)


def test_warmup_then_a_line() -> None:
    # By get_linear_schedule_with_warmup of transformers, one step ahead in the warm-up.
    rates = learning_rates(WarmupLinear(optimizer(), warmup_steps=4, total_steps=12), 14)
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, *(2.0 * (12 - step) / 8 for step in range(4, 13)), 0.0])


def test_a_second_stage_begins_as_a_run_of_its_own() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.AdamW([weight], lr=2.0)
    schedule = StagedLinear(adam, second_stage=0.5, lr_ratio=0.5, warmup_fraction=0.4, total_steps=20)
    rates, counts = [], []
    for _ in range(20):
        rates.append(adam.param_groups[0]["lr"])
        weight.sum().backward()
        adam.step()
        counts.append(int(adam.state[weight]["step"]))
        schedule.step()
    assert rates == pytest.approx([2.0] * 10 + [0.25, 0.5, 0.75, 1.0] + [(10 - step) / 6 for step in range(4, 10)])
    assert counts == [*range(1, 11), *range(1, 11)]
    for wrong in ({"second_stage": 1.5}, {"lr_ratio": 0.0}, {"warmup_fraction": -0.1}):
        with pytest.raises(MemtxError):
            StagedLinear(adam, **wrong)


def test_a_resumed_schedule_has_the_new_settings() -> None:
    short = WarmupCosine(optimizer(), warmup_steps=2, total_steps=4)
    learning_rates(short, 4)
    # The resumed run has more steps: the rate rises to that of the longer schedule.
    longer = WarmupCosine(optimizer(), warmup_steps=2, total_steps=8)
    longer.load_state_dict(short.state_dict() | {"total_steps": 4})  # as an earlier release saved it
    assert longer.last_epoch == 4
    assert longer.total_steps == 8
    complete = learning_rates(WarmupCosine(optimizer(), warmup_steps=2, total_steps=8), 8)
    assert learning_rates(longer, 4)[1:] == pytest.approx(complete[5:])


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_epochs": 3, "limit_train_batches": 4}, 12),
        ({"max_epochs": 3, "limit_train_batches": 5, "accumulate_grad_batches": 2}, 9),
    ],
)
def test_the_schedule_ends_with_the_run(tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    run = trainer(tmp_path, limit_val_batches=0, **options)
    run.fit(module(), datamodule=data(tmp_path))
    schedule = run.lr_scheduler_configs[0].scheduler
    assert run.global_step == steps
    assert isinstance(schedule, WarmupCosine)
    assert schedule.total_steps == steps
    assert schedule.get_last_lr()[0] == pytest.approx(0.01 * 0.1)


def test_custom_optimizer_and_schedule(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_val_batches=0, max_steps=3)
    run.fit(module(optimizer=unit_sgd, scheduler=partial(StepLR, step_size=1, gamma=0.5)), datamodule=data(tmp_path))
    assert isinstance(run.optimizers[0], torch.optim.SGD)
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.125, 0.125]
    run = trainer(tmp_path, limit_val_batches=0, max_steps=3)
    run.fit(module(optimizer=unit_sgd, scheduler=None), datamodule=data(tmp_path))
    assert run.lr_scheduler_configs == []
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [1.0, 1.0]
    run = trainer(tmp_path, limit_val_batches=0, max_steps=1)
    run.fit(module(optimizer=None, scheduler=None), datamodule=data(tmp_path))
    assert [group["weight_decay"] for group in run.optimizers[0].param_groups] == [0.1, 0.0]


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    lengths = []
    for clip in (None, 0.01):
        language_module = module(optimizer=unit_sgd, scheduler=None)
        before = weights(language_module.model)
        run = trainer(tmp_path, limit_val_batches=0, max_steps=1, gradient_clip_val=clip)
        run.fit(language_module, datamodule=data(tmp_path))
        # The head is the embedding: counted once.
        after = weights(language_module.model)
        del before["head.weight"], after["head.weight"]
        lengths.append(moved(before, after))
    assert lengths[0] > 0.1
    assert lengths[1] == pytest.approx(0.01, rel=1e-3)  # a difference of float32 weights a hundred times as large


class Gradients(pl.Callback):
    def __init__(self) -> None:
        self.results: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.results.append(
            {name: weight.grad.clone() for name, weight in pl_module.named_parameters() if weight.grad is not None}
        )


def test_accumulated_gradients_are_the_mean(tmp_path: Path) -> None:
    """Gradients of consecutive batches with memory; a learning rate of 0 keeps the weights."""
    frozen_sgd = partial(sgd, lr=0.0)
    single, accumulated = Gradients(), Gradients()
    for steps, accumulate, keep in ((3, 1, single), (1, 3, accumulated)):
        run = trainer(tmp_path, keep, limit_val_batches=0, max_steps=steps, accumulate_grad_batches=accumulate)
        run.fit(module(dropout=0.0, optimizer=frozen_sgd, scheduler=None), datamodule=data(tmp_path))
    assert (len(single.results), len(accumulated.results)) == (3, 1)
    for name, gradient in accumulated.results[0].items():
        mean = torch.stack([gradients[name] for gradients in single.results]).mean(0)
        # float32: sums in another order
        torch.testing.assert_close(gradient, mean, atol=1e-6, rtol=1e-4)


def test_mixed_precision_is_close_to_full(tmp_path: Path) -> None:
    records = []
    for precision in ("32-true", "bf16-mixed"):
        language_module, record = module(dropout=0.0), Record()
        run = trainer(tmp_path, record, max_steps=5, val_check_interval=5, precision=precision)
        run.fit(language_module, datamodule=data(tmp_path))
        assert {parameter.dtype for parameter in language_module.parameters()} == {torch.float32}
        records.append(record)
    full, mixed = ([float.fromhex(loss) for loss in record.losses.values()] for record in records)
    assert mixed != full
    # bfloat16 has 8 bits: some 0.4% on each number, less on their mean
    assert mixed == pytest.approx(full, rel=0.01)
    bits = [float.fromhex(record.results[4]["val_bits_per_byte"]) for record in records]
    assert bits[1] == pytest.approx(bits[0], rel=0.01)  # as the losses


@pytest.mark.slow
def test_compiled_is_close_to_eager(tmp_path: Path) -> None:
    records, names = [], []
    for compile in (False, True):
        language_module, record = module(dropout=0.0, compile=compile), Record()
        run = trainer(tmp_path, record, max_steps=4, limit_val_batches=0)
        run.fit(language_module, datamodule=data(tmp_path))
        records.append([float.fromhex(loss) for loss in record.losses.values()])
        names.append(list(language_module.state_dict()))
    # float32: fused sums round elsewhere, and four steps of learning lie between
    assert records[1] == pytest.approx(records[0], rel=1e-3)
    assert names[0] == names[1]


def test_a_diverged_validation_is_reported(tmp_path: Path) -> None:
    language_module = module()
    torch.nn.init.constant_(language_module.model.embedding.weight, math.nan)
    with pytest.raises(MemtxError, match="nan"):
        trainer(tmp_path).validate(language_module, datamodule=data(tmp_path), verbose=False)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_fused_optimizer_clips_gradients(tmp_path: Path, precision: Any) -> None:
    records = []
    for fused in (False, True):
        optimizer = partial(torch.optim.AdamW, lr=0.01, fused=fused)
        language_module, record = module(dropout=0.0, optimizer=optimizer), Record()
        run = trainer(tmp_path, record, max_steps=4, limit_val_batches=0, precision=precision, gradient_clip_val=0.01)
        run.fit(language_module, datamodule=data(tmp_path))
        records.append([float.fromhex(loss) for loss in record.losses.values()])
    # Sums in another order; bfloat16 rounds to 8 bits.
    assert records[1] == pytest.approx(records[0], rel=1e-3 if precision == "bf16-mixed" else 1e-5)


def test_a_fused_optimizer_that_unscales_gradients_is_refused(tmp_path: Path) -> None:
    language_module = module(optimizer=partial(torch.optim.AdamW, fused=True))
    run = trainer(tmp_path, max_steps=1, gradient_clip_val=1.0)
    with (
        patch.object(run.precision_plugin, "scaler", object(), create=True),
        pytest.raises(MemtxError, match="A fused AdamW cannot clip gradients"),
    ):
        run.fit(language_module, datamodule=data(tmp_path))


@pytest.mark.parametrize(("device", "is_pinned"), [("cuda", True), ("cpu", False)])
def test_batches_are_moved_to_a_gpu_from_pinned_memory(tmp_path: Path, device: str, is_pinned: bool) -> None:
    calls, data_module = [], data(tmp_path)

    def pin_memory(x: torch.Tensor) -> torch.Tensor:
        calls.append("pin")
        return x

    def move(x: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        calls.append(f"to {device}, {non_blocking=}")
        return x

    zeros = torch.zeros(1, 2)
    with patch.object(torch.Tensor, "pin_memory", pin_memory), patch.object(torch.Tensor, "to", move):
        moved = data_module.transfer_batch_to_device(Batch(*[zeros] * 5), torch.device(device), 0)
    assert isinstance(moved, Batch)
    assert calls == ["pin"] * (5 if is_pinned else 0) + [f"to {device}, non_blocking={is_pinned}"] * 5


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_the_mode_of_the_compiler(mode: Any) -> None:
    with patch.object(torch.nn.Module, "compile") as compile:
        module(compile=True, compile_mode=mode)
        module(compile_mode=mode)
    compile.assert_called_once_with(dynamic=False, mode=mode)

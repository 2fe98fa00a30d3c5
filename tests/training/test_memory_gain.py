"""The gain from memory equals a difference computed by hand, and unused memory is reported."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from memtx.memory.associative import AssociativeMemory
from memtx.memory.none import NoMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.sources import hide_sources, without_source
from memtx.training.callbacks.memory_monitor import UnusedMemoryWarning
from memtx.training.language import LanguageModule
from tests.training.small import SEGMENT, data, memory, model, module, trainer


def by_hand(language_module: LanguageModule, texts: Any) -> dict[str, float]:
    """Return gains of each document, read alone, in total and by range of distance."""
    store = texts.token_store("validation")
    window_model = without_source(language_module.model, "bank")
    nats: dict[str, float] = {}
    units: dict[str, float] = {}
    for document in range(len(store.lengths)):
        tokens = torch.from_numpy(store.slice_tokens(document, 0, int(store.lengths[document])).astype("int64"))[None]
        states: list[Any] = [None, None]
        count = tokens.shape[1] - 1
        for at in range(0, count, SEGMENT):
            part = slice(at, min(at + SEGMENT, count))
            inputs, labels = tokens[:, part], tokens[:, part.start + 1 : part.stop + 1]
            with torch.no_grad():
                remembering = language_module.model(inputs, states[0], labels=labels)
                window, fresh = (window_model(inputs, initial, labels=labels) for initial in (states[1], None))
            states = [remembering.state, window.state]
            for position, gain in enumerate((window.nll - remembering.nll)[0].tolist(), at):
                names = ["memory_gain", "memory_gain/bank"]
                if position >= SEGMENT:
                    names.append(f"memory_gain_{SEGMENT * 4 ** min(4, int(math.log(position / SEGMENT, 4) + 1e-9))}")
                for name in names:
                    nats[name] = nats.get(name, 0.0) + gain
                    units[name] = units.get(name, 0.0) + float(store.num_bytes[document]) / count
            nats["memory_gain/window"] = nats.get("memory_gain/window", 0.0) + float((fresh.nll - window.nll).sum())
            units["memory_gain/window"] = units["memory_gain"]
    return {name: nats[name] / units[name] / math.log(2) for name in nats}


def test_gain_is_the_difference_of_two_passes(tmp_path: Path) -> None:
    # As many streams as documents, so that every document begins where a segment does.
    texts, language_module = data(tmp_path, eval_batch_size=1), module(dropout=0.0)
    with torch.no_grad():
        for weight in language_module.model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)  # so that a memory makes a difference
    texts.setup("validate")
    texts.eval_batch_size = len(texts.token_store("validation").lengths)
    (metrics,) = trainer(tmp_path).validate(language_module, datamodule=texts, verbose=False)
    expected = by_hand(language_module, texts)
    assert len(expected) >= 3
    assert max(map(abs, expected.values())) > 0.01
    for name, value in expected.items():
        # Bytes are spread over a whole document by hand, over a batch's streams in the module.
        assert metrics[f"val_{name}"] == pytest.approx(value, rel=0.1 if "gain_" in name else 1e-4)


def test_each_source_has_its_own_gain(tmp_path: Path) -> None:
    stack = [memory(), partial(AssociativeMemory, heads=2)]
    network = model(memories=(stack,), gated_memory=True)
    with torch.no_grad():
        for block in network.blocks:
            block.attention.gate[0] = 0.5  # type: ignore[union-attr, index]  # the bank's; the other stays closed
    language_module = LanguageModule(lambda _: network, segment_length=SEGMENT)
    (metrics,) = trainer(tmp_path).validate(language_module, datamodule=data(tmp_path), verbose=False)
    assert metrics["val_memory_gain/associative"] == 0.0
    assert metrics["val_memory_gain/bank"] == metrics["val_memory_gain"] != 0.0


def test_a_window_alone_is_no_memory(tmp_path: Path) -> None:
    network = model(memories=(partial(RecurrentMemory, window=6),))
    language_module = LanguageModule(lambda _: network, segment_length=SEGMENT)
    (metrics,) = trainer(tmp_path).validate(language_module, datamodule=data(tmp_path), verbose=False)
    assert [name for name in metrics if "memory" in name] == ["val_memory_gain/window"]
    assert metrics["val_memory_gain/window"] != 0.0


def test_no_gain_without_memory_or_when_disabled(tmp_path: Path) -> None:
    for language_module in (
        LanguageModule(lambda vocabulary: model(vocabulary, memories=(NoMemory,)), segment_length=SEGMENT),
        module(measure_memory_gain=False),
    ):
        (metrics,) = trainer(tmp_path).validate(language_module, datamodule=data(tmp_path), verbose=False)
        assert not any("memory" in name for name in metrics)


class Deaf(MemoryTransformer):
    """Carries a memory that it never reads."""

    def forward(self, *inputs, **options):  # type: ignore[no-untyped-def]
        with hide_sources(self, ["bank"]):
            return super().forward(*inputs, **options)


def test_unused_memory_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    language_module = module(dropout=0.0)
    language_module.model.__class__ = Deaf
    fitting = trainer(tmp_path, UnusedMemoryWarning(), max_steps=14, val_check_interval=1, limit_val_batches=1)
    fitting.fit(language_module, datamodule=data(tmp_path))
    assert float(fitting.callback_metrics["val_memory_gain"]) == pytest.approx(0.0, abs=1e-9)
    message = capsys.readouterr().err
    # Once, and not early: in the second half of the run.
    assert message.count("The memory is not used") == 1
    assert message.startswith("step 7 ")
    assert "the last 7 validations" in message


@pytest.mark.parametrize(
    ("gains", "step", "is_reported"),
    [
        ([0.0] * 4, 90, False),
        ([0.0] * 5, 90, True),
        ([-0.1] * 5, 90, True),
        ([0.0] * 9, 10, False),
        ([0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0], 90, False),
        ([math.nan] * 9, 90, False),
    ],
)
def test_memory_that_is_not_used_yet_is_no_news(
    gains: list[float], step: int, is_reported: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    callback, stub = UnusedMemoryWarning(), Mock(sanity_checking=False, is_global_zero=True, global_step=step)
    stub.state.fn, stub.max_steps, stub.max_epochs = TrainerFn.FITTING, 100, -1
    for gain in gains:
        stub.callback_metrics = {"val_memory_gain": gain}
        callback.on_validation_end(stub, Mock())
    assert ("The memory is not used" in capsys.readouterr().err) == is_reported

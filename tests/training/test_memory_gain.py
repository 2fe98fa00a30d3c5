"""The gain from memory equals a difference computed by hand, and unused memory is reported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx.memory.none import NoMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.callbacks.memory_monitor import UnusedMemoryWarning
from memtx.training.language import LanguageModule
from tests.training.small import SEGMENT, data, model, module, trainer


def by_hand(language_module: LanguageModule, texts: Any) -> dict[str, float]:
    """Return gains of each document, read alone, in total and by range of distance."""
    store = texts.token_store("validation")
    nats: dict[str, float] = {}
    units: dict[str, float] = {}
    for document in range(len(store.lengths)):
        tokens = torch.from_numpy(store.slice_tokens(document, 0, int(store.lengths[document])).astype("int64"))[None]
        state, count = None, tokens.shape[1] - 1
        for at in range(0, count, SEGMENT):
            part = slice(at, min(at + SEGMENT, count))
            inputs, labels = tokens[:, part], tokens[:, part.start + 1 : part.stop + 1]
            with torch.no_grad():
                remembering, cleared = (
                    language_module.model(inputs, initial, labels=labels) for initial in (state, None)
                )
            state = remembering.state
            for position, gain in enumerate((cleared.nll - remembering.nll)[0].tolist(), at):
                names = ["memory_gain"]
                if position >= SEGMENT:
                    names.append(f"memory_gain_{SEGMENT * 4 ** min(4, int(math.log(position / SEGMENT, 4) + 1e-9))}")
                for name in names:
                    nats[name] = nats.get(name, 0.0) + gain
                    units[name] = units.get(name, 0.0) + float(store.num_bytes[document]) / count
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
        assert metrics[f"val_{name}"] == pytest.approx(value, rel=0.1 if name != "memory_gain" else 1e-4)


def test_no_gain_without_memory_or_when_disabled(tmp_path: Path) -> None:
    for language_module in (
        LanguageModule(lambda vocabulary: model(vocabulary, memories=(NoMemory,)), segment_length=SEGMENT),
        module(measure_memory_gain=False),
    ):
        (metrics,) = trainer(tmp_path).validate(language_module, datamodule=data(tmp_path), verbose=False)
        assert not any("memory" in name for name in metrics)


class Deaf(MemoryTransformer):
    """Carries a memory that it never reads."""

    def forward(self, tokens, state=None, **rest):  # type: ignore[no-untyped-def]
        state = state if state is not None else self.init_state(tokens.shape[0])
        return super().forward(tokens, state.reset(torch.ones(tokens.shape[0], dtype=torch.bool)), **rest)


@pytest.mark.parametrize("deaf", [False, True])
def test_unused_memory_is_reported(tmp_path: Path, deaf: bool, capsys: pytest.CaptureFixture[str]) -> None:
    language_module = module(dropout=0.0)
    if deaf:
        language_module.model.__class__ = Deaf
    else:
        with torch.no_grad():
            for weight in language_module.model.parameters():
                weight.add_(torch.randn_like(weight) * 0.2)
    options = {"max_steps": 2, "val_check_interval": 1, "limit_val_batches": 2}
    fitting = trainer(tmp_path, UnusedMemoryWarning(), **options)
    fitting.fit(language_module, datamodule=data(tmp_path))
    message = capsys.readouterr().err
    gain = float(fitting.callback_metrics["val_memory_gain"])
    assert ("The memory is not used" in message) == (gain < 1e-3)
    if deaf:
        assert gain == pytest.approx(0.0, abs=1e-9)
        assert message.count("only 0.0000 worse") + message.count("0.0000 better") == 2

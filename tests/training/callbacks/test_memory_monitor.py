"""The fraction of closed gates over a validation."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from memtx.memory.associative import AssociativeMemory
from memtx.memory.parts import Gate
from memtx.memory.recurrent import RecurrentMemory
from memtx.training.callbacks.memory_monitor import ClosedGateMonitor
from memtx.training.language import LanguageModule
from tests.training.small import SEGMENT, data, model, module, trainer


@pytest.mark.parametrize("closed", [0.0, 0.5, 1.0])
def test_the_closed_fraction_is_logged(tmp_path: Path, closed: float) -> None:
    stack = [partial(RecurrentMemory, window=4), partial(AssociativeMemory, heads=2)]
    language_module = LanguageModule(lambda vocabulary: model(vocabulary, memories=(stack,)), segment_length=SEGMENT)
    logged = trainer(tmp_path, ClosedGateMonitor())
    texts = data(tmp_path)
    gates = [layer for layer in language_module.modules() if isinstance(layer, Gate)]
    assert gates
    with torch.no_grad():
        for gate in gates:
            gate.proj.weight.zero_()
            # Of two heads' gates one or both shut.
            gate.proj.bias.copy_(torch.tensor([-9.0 if closed > 0 else 0.0, -9.0 if closed == 1 else 0.0]))
    (metrics,) = logged.validate(language_module, datamodule=texts, verbose=False)
    assert metrics["val_closed_gate_fraction"] == pytest.approx(closed)
    # Nothing is left behind that would slow training down.
    assert not any(gate._forward_hooks for gate in gates)


def test_a_model_without_gates_logs_nothing(tmp_path: Path) -> None:
    (metrics,) = trainer(tmp_path, ClosedGateMonitor()).validate(module(), datamodule=data(tmp_path), verbose=False)
    assert "val_closed_gate_fraction" not in metrics

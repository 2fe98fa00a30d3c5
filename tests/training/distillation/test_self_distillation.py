"""Self-distillation: a teacher of equal weights with full attention, and fresh streams in every step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.models.encoder import Encoder
from memtx.training.distillation import SelfDistillation, SoftTargets, ValueRelations
from memtx.training.distillation.language import LanguageDistillation
from memtx.training.distillation.layer_map import EveryKthLayer
from memtx.training.distillation.model_outputs import collect_language_outputs
from memtx.training.tbptt import unroll
from tests.training.small import data, module, trainer
from tests.training.test_retrofitting import HYBRID, MEAN, WINDOW, base, retrofitted


@pytest.mark.parametrize("layers", [(WINDOW,), HYBRID])
@pytest.mark.parametrize("replay", [False, True])
def test_the_teacher_is_the_model_with_full_attention(replay: bool, layers: Any) -> None:
    language_module = module(distillation=SelfDistillation([SoftTargets]), replay=replay)
    model = language_module.model = retrofitted(11, MEAN, layers=layers).double()
    language_module.distillation.setup(model)
    tokens, labels = torch.randint(0, 11, (2, 2, 20))
    labels[:, 3] = -100
    document_starts = torch.zeros(2, 20, dtype=torch.bool)
    document_starts[1, 9] = True
    batch: Any = type("Batch", (), {"tokens": tokens, "labels": labels, "document_starts": document_starts})
    loss_fn = LanguageDistillation(language_module.distillation, None).make_loss_fn(model, batch, progress=0.0)
    out = unroll(
        model, tokens, labels, document_starts, model.init_state(2), segment_length=8, replay=replay, loss_fn=loss_fn
    )
    wide = base(11, layers).double().without_memory(20)
    teacher_probs = F.softmax(wide(tokens, document_starts=document_starts).logits / 2, dim=-1)
    student_log_probs = F.log_softmax(model(tokens, document_starts=document_starts).logits / 2, dim=-1)
    expected = 4 * F.kl_div(student_log_probs, teacher_probs, reduction="none").sum(-1)[labels != -100].mean()
    # Segments of unequal length, each label of equal weight.
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert expected > 0
    out.loss.backward()
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith(".gate")]
    assert gates
    assert all(gate.grad is not None and gate.grad.isfinite().all() for gate in gates)


def test_layers_of_other_widths_are_compared_each_with_its_own_heads() -> None:
    model = retrofitted(11, MEAN, layers=HYBRID)
    distillation = SelfDistillation([partial(ValueRelations, layers=EveryKthLayer())])
    distillation.setup(model)
    tokens = torch.randint(0, 11, (2, 8))
    output = model(tokens, labels=tokens, return_hidden_states=True)
    outputs = collect_language_outputs(model, output.hidden_states, tokens, torch.zeros(2, 8, dtype=torch.bool))
    # Both are the same model.
    assert distillation.compute_losses(outputs, outputs, 0.0)["value_relations"].item() == 0
    assert distillation.losses[0].heads == {(0, 0): 4, (1, 1): 2}


def test_steps_start_with_fresh_streams(tmp_path: Path) -> None:
    language_module = module(distillation=SelfDistillation())
    trainer(tmp_path, max_steps=3).fit(language_module, data(tmp_path))
    assert language_module.carry.nbytes("train") == language_module.carry.nbytes("teacher") == 0
    assert not language_module.rank_state()["teacher"]


def test_a_model_without_memory_is_rejected() -> None:
    with pytest.raises(MemtxError, match="SelfDistillation needs a model with memory, not Encoder"):
        SelfDistillation().setup(Encoder(11, 8, 1, 2))

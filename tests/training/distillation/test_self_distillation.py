"""Self-distillation: a teacher of equal weights with full attention, and fresh streams in every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.models.encoder import Encoder
from memtx.training.distillation import SelfDistillation, SoftTargets
from memtx.training.distillation.language import LanguageDistillation
from memtx.training.tbptt import unroll
from tests.training.small import data, module, trainer
from tests.training.test_retrofitting import MEAN, base, retrofitted


@pytest.mark.parametrize("replay", [False, True])
def test_the_teacher_is_the_model_with_full_attention(replay: bool) -> None:
    language_module = module(distillation=SelfDistillation([SoftTargets]), replay=replay)
    model = language_module.model = retrofitted(11, MEAN).double()
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
    wide = base(11).double().without_memory(20)
    teacher_probs = F.softmax(wide(tokens, document_starts=document_starts).logits / 2, dim=-1)
    student_log_probs = F.log_softmax(model(tokens, document_starts=document_starts).logits / 2, dim=-1)
    expected = 4 * F.kl_div(student_log_probs, teacher_probs, reduction="none").sum(-1)[labels != -100].mean()
    # Segments of unequal length, each label of equal weight.
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert expected > 0
    out.loss.backward()
    gates = [block.attention.gate for block in model.blocks]
    assert all(gate.grad is not None and gate.grad.isfinite().all() for gate in gates)


def test_steps_start_with_fresh_streams(tmp_path: Path) -> None:
    language_module = module(distillation=SelfDistillation())
    trainer(tmp_path, max_steps=3).fit(language_module, data(tmp_path))
    assert language_module.carry.nbytes("train") == language_module.carry.nbytes("teacher") == 0
    assert not language_module.rank_state()["teacher"]


def test_a_model_without_memory_is_rejected() -> None:
    with pytest.raises(MemtxError, match="SelfDistillation needs a model with memory, not Encoder"):
        SelfDistillation().setup(Encoder(11, 8, 1, 2))

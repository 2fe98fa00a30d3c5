"""DistilBERT and TinyBERT as published: the whole losses in float64, the choice of layers, and the smoothed masking."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memtx.data.batch import IGNORE_INDEX
from memtx.data.books import BookDataModule
from memtx.data.hf_tokenizers import WordPieceTokenizer
from memtx.errors import MemtxError
from memtx.models.encoder import Encoder
from memtx.ops.cpu import cpu_info
from memtx.training import distillation as kinds
from memtx.training.distillation import Distillation, EvenlySpacedLayers, EveryKthLayer
from memtx.training.objectives import mask_tokens
from memtx.training.pretraining import MaskedModule
from tests.training.test_finetuning import trainer

VOCAB = 13
DISTILBERT = [
    partial(kinds.SoftTargets, temperature=2.0, weight=5.0),
    partial(kinds.HardLabels, weight=2.0),
    kinds.HiddenCosine,
]
TINYBERT = [kinds.EmbeddingMSE, kinds.AttentionMSE, kinds.HiddenMSE]


def test_the_layers_of_distilbert() -> None:
    assert [teacher for _, teacher in EvenlySpacedLayers().pairs(6, 12)] == [0, 2, 4, 7, 9, 11]
    assert EvenlySpacedLayers().pairs(2, 3) == [(0, 0), (1, 2)]
    assert EvenlySpacedLayers().pairs(1, 12) == [(0, 0)]
    with pytest.raises(MemtxError, match="The student has 3 layers, the teacher 2"):
        EvenlySpacedLayers().pairs(3, 2)


@given(st.integers(2, 24), st.integers(2, 48))
def test_spaced_layers_keep_order_and_ends(student: int, teacher: int) -> None:
    student, teacher = min(student, teacher), max(student, teacher)
    layers = [layer for _, layer in EvenlySpacedLayers().pairs(student, teacher)]
    assert (layers[0], layers[-1]) == (0, teacher - 1)
    assert layers == sorted(set(layers))


def widely(model: Encoder) -> Encoder:
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    return model.double()


def train_step(losses: list[Any], student: Encoder, at: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Return the loss of a step, both models, the masked tokens and their labels, and the trained projections."""
    torch.manual_seed(0)
    teacher = widely(Encoder(VOCAB, 12, 4, 2, 16))
    teacher.save_pretrained(at / "teacher")
    module = MaskedModule(
        lambda _: widely(student), VOCAB, mask_id=3, distillation=Distillation(str(at / "teacher"), losses)
    )
    assert module.distillation is not None
    module.distillation.setup(module.model)
    module.distillation.double()
    seen: list[Any] = []
    mask = module._mask_batch
    monkeypatch.setattr(module, "_mask_batch", lambda *inputs: seen.append(mask(*inputs)) or seen[-1])
    monkeypatch.setattr(module, "_log_training_step", lambda loss, tokens: loss)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    module._trainer = SimpleNamespace(global_step=0, datamodule=None)  # type: ignore[assignment]
    module._total_steps = 10
    tokens = torch.randint(4, VOCAB, (3, 9))
    batch: Any = SimpleNamespace(tokens=tokens)
    loss = float(module.training_step(batch, 0).detach())
    return loss, module.model, teacher, seen[0], [dict(part.named_parameters()) for part in module.distillation.losses]


def softmax(logits: Tensor) -> list[float]:
    powers = [math.exp(x - float(logits.max())) for x in logits.tolist()]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("masked_only", [False, True])
def test_the_loss_of_distilbert(masked_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [partial(DISTILBERT[0], masked_only=masked_only), *DISTILBERT[1:]]
    value, student, teacher, (tokens, labels), _ = train_step(losses, Encoder(VOCAB, 12, 2, 2), tmp_path, monkeypatch)
    with torch.no_grad():
        mine, other = (model(tokens, output_hidden_states=True) for model in (student, teacher))
    soft, hard, cosine = [], [], []
    for row in range(3):
        for i in range(9):
            x, y = mine.logits[row, i], other.logits[row, i]
            if labels[row, i] != IGNORE_INDEX:
                hard.append(-math.log(softmax(x)[int(labels[row, i])]))
            if not masked_only or labels[row, i] != IGNORE_INDEX:
                soft.append(sum(p * math.log(p / q) for p, q in zip(softmax(y / 2), softmax(x / 2), strict=True)))
            a, b = mine.hidden_states[-1][row, i].tolist(), other.hidden_states[-1][row, i].tolist()
            dot = sum(p * q for p, q in zip(a, b, strict=True))
            cosine.append(1 - dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b)))
    assert len(soft) > len(hard) > 0 or masked_only
    expected = 5 * 2**2 * np.mean(soft) + 2 * np.mean(hard) + np.mean(cosine)
    # float64, sums in another order; the student's cross-entropy is float32 as in training
    assert value == pytest.approx(float(expected), rel=1e-7)


def test_the_loss_of_tinybert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value, student, teacher, (tokens, _), weights = train_step(TINYBERT, Encoder(VOCAB, 8, 2, 2), tmp_path, monkeypatch)
    with torch.no_grad():
        mine, other = (model(tokens, output_hidden_states=True).hidden_states for model in (student, teacher))

    def scores(model: Encoder, hidden: Tensor, layer: int) -> Tensor:
        attention: Any = model.blocks[layer].attention
        query, key = (
            (hidden @ part.weight.T + part.bias).unflatten(-1, (2, -1)).transpose(1, 2)
            for part in (attention.query, attention.key)
        )
        return query @ key.mT / math.sqrt(query.shape[-1])

    def mse(a: Tensor, b: Tensor) -> float:
        return float(np.mean([(x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)]))

    embeddings, _, hidden = weights
    expected = mse(mine[0] @ embeddings["project.weight"].T, other[0])  # equation 9
    for layer in range(2):
        taught = 2 * layer + 1  # g(m) = 2 m, from 1
        expected += mse(scores(student, mine[layer], layer), scores(teacher, other[taught], taught))  # equation 7
        expected += mse(mine[layer + 1] @ hidden["project.weight"].T, other[taught + 1])  # equation 8
    assert value == pytest.approx(expected, rel=1e-9)
    assert EveryKthLayer().pairs(4, 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.floats(0.01, 0.9), st.integers(0, 99))
def test_smoothed_masking_selects_a_fixed_share_and_no_special_token(
    batch_size: int, length: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 9, (batch_size, length), generator=generator)
    weights = torch.tensor([1.0, 0.5, 0.0, 0.1, 0.2, 1e-3, 0.7, 0.3, 0.3])
    masked = mask_tokens(
        tokens, mask_token_id=8, vocab_size=9, mask_prob=share, special_token_ids=(0, 1), token_weights=weights,
        generator=generator,
    )  # fmt: skip
    selected = masked.labels != IGNORE_INDEX
    possible = int((tokens > 2).sum())
    assert int(selected.sum()) == min(math.ceil(share * tokens.numel()), possible)
    assert not (selected & (tokens <= 2)).any()
    assert torch.equal(masked.tokens[~selected], tokens[~selected])


def test_rare_tokens_are_masked_more_often_by_their_counts(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / "books" / split).mkdir(parents=True)
        words = ["the"] * 16 + ["cat"] * 4 + ["sat"]
        (tmp_path / "books" / split / "a.txt").write_text(" ".join(words * 60))
    data = BookDataModule(
        str(tmp_path / "books"), WordPieceTokenizer(100), batch_size=8, segment_length=30,
        cache_dir=str(tmp_path / "cache"), num_workers=1,
    )  # fmt: skip
    options: dict[str, Any] = {"mask_id": data.mask_token_id, "mask_prob": 0.02}
    options |= {"mask_smoothing": 0.7, "add_special_tokens": True}
    module = MaskedModule(partial(Encoder, dim=8, depth=1, heads=2), data.vocab_size, **options)
    run = trainer(max_steps=1, max_epochs=-1, limit_val_batches=0)
    run.fit(module, data)
    tokenizer = data.tokenizer
    assert isinstance(tokenizer, type(WordPieceTokenizer(100)).__mro__[1])
    ids = [int(tokenizer.encode(word)[0]) for word in ("the", "cat", "sat")]
    weights = module._token_weights
    assert weights is not None
    counts = [960, 240, 60]
    np.testing.assert_allclose(weights[ids].numpy(), np.array(counts) ** -0.7, rtol=1e-5)
    batch = next(iter(data.train_dataloader()))
    framed = module._mask_batch(batch, None)
    assert framed.tokens.shape == (8, 32)
    assert (framed.tokens[:, 0] == tokenizer.cls_token_id).all()
    assert (framed.tokens[:, -1] == tokenizer.sep_token_id).all()
    special = torch.tensor(tokenizer.special_token_ids)
    assert not torch.isin(framed.labels, special).any()
    # In proportion to n ^ 0.3 while few are selected, where equal chances would give 0.76.
    labels = torch.cat([module._mask_batch(batch, None).labels for _ in range(40)])
    frequent = (labels == ids[0]).sum() / (labels != IGNORE_INDEX).sum()
    assert float(frequent) == pytest.approx(0.48, abs=0.08)  # 200 draws: two standard deviations
    # Validation masks all alike, so that runs with other settings compare.
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([module._mask_batch(batch, generator).labels for _ in range(40)])
    assert (labels == ids[0]).sum() / (labels != IGNORE_INDEX).sum() > 0.7


def test_a_student_takes_the_weights_of_a_bfloat16_teacher_unrounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_info, "is_cpu_bf16_fast", lambda: True)
    torch.manual_seed(0)
    teacher, student = Encoder(VOCAB, 8, 2, 2), Encoder(VOCAB, 8, 1, 2)
    teacher.save_pretrained(tmp_path)
    distillation = Distillation(str(tmp_path), [kinds.SoftTargets], EvenlySpacedLayers(), bf16=True)
    distillation.setup(student)
    assert next(distillation._teacher[0].parameters()).dtype == torch.bfloat16
    assert torch.equal(student.blocks[0].attention.query.weight, teacher.blocks[0].attention.query.weight)


def test_options_that_do_not_fit_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(MemtxError, match=r"mask_smoothing \(0.7\) selects single tokens, whole_words whole words"):
        MaskedModule(whole_words=True, mask_smoothing=0.7)
    with pytest.raises(MemtxError, match="mask_smoothing is -1"):
        MaskedModule(mask_smoothing=-1.0)
    module = MaskedModule(partial(Encoder, dim=8, depth=1, heads=2), add_special_tokens=True)
    data = BookDataModule("embedded", cache_dir=str(tmp_path), num_workers=1)
    with pytest.raises(MemtxError, match=r"add_special_tokens needs a tokenizer with \[CLS\] and \[SEP\]"):
        trainer(max_steps=1, max_epochs=-1).fit(module, data)

"""Task models: independence of padding and segments, gradients, saving and loading."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx.errors import MemtxError
from memtx.layers.longformer import LongformerAttention
from memtx.memory.compressed import CompressedMemory
from memtx.memory.ernie_doc import ErnieDocMemory
from memtx.models.encoder import Encoder
from memtx.models.heads import (
    CLSPooling,
    MeanPooling,
    MemoryTransformerBackbone,
    SequenceClassificationHead,
    TaskModel,
    TokenClassificationHead,
)
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.reformer import Reformer

MEMORY = partial(
    MemoryTransformer,
    dim=16,
    depth=2,
    heads=2,
    memories=[partial(CompressedMemory, window=8, compression_rate=4, num_entries=4)],
)
BACKBONES: dict[str, Any] = {
    "encoder": partial(Encoder, dim=16, depth=2, heads=2, attentions=[partial(LongformerAttention, window=4)]),
    "segmented": partial(MemoryTransformerBackbone, model=MEMORY, segment_length=8),
    "retrospective": partial(MemoryTransformerBackbone, model=MEMORY, segment_length=8, retrospective=True),
}
HEADS: dict[str, Any] = {
    "mean": SequenceClassificationHead,
    "first": partial(SequenceClassificationHead, pooling=CLSPooling),
    "tokens": TokenClassificationHead,
}


def model(backbone: str = "encoder", head: str = "mean", seed: int = 0) -> TaskModel:
    torch.manual_seed(seed)
    return TaskModel(50, 3, BACKBONES[backbone], HEADS[head]).double().eval()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("head", HEADS)
def test_padding_changes_nothing(backbone: str, head: str) -> None:
    task_model = model(backbone, head)
    tokens = torch.randint(0, 50, (2, 21))
    mask = torch.ones_like(tokens)
    alone = task_model(tokens, mask, torch.zeros_like(tokens), torch.zeros_like(tokens))
    padded, padded_mask = (torch.nn.functional.pad(part, (0, 6)) for part in (tokens, mask))
    with_padding = task_model(padded, padded_mask)
    torch.testing.assert_close(with_padding[:, :21] if head == "tokens" else with_padding, alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_learns(backbone: str) -> None:
    task_model = model(backbone, "tokens").train()
    tokens = torch.randint(0, 50, (2, 21))
    marked = torch.zeros_like(tokens)
    marked[:, 0] = 1
    task_model(tokens, torch.ones_like(tokens), None, marked).square().sum().backward()
    assert [name for name, parameter in task_model.named_parameters() if parameter.grad is None] == []


def test_document_score_is_independent_of_segment_length() -> None:
    tokens = torch.randint(0, 50, (2, 37))
    results = []
    for segment in (5, 8, 64):
        torch.manual_seed(0)
        task_model = (
            TaskModel(
                50,
                3,
                partial(MemoryTransformerBackbone, model=MEMORY, segment_length=segment),
                SequenceClassificationHead,
            )
            .double()
            .eval()
        )
        out = task_model(tokens, torch.ones_like(tokens))
        out.sum().backward()
        grads = [parameter.grad for parameter in task_model.parameters()]
        results.append((out, torch.cat([grad.flatten() for grad in grads if grad is not None])))
    for out, grads in results[1:]:
        torch.testing.assert_close(out, results[0][0], atol=1e-10, rtol=0)
        torch.testing.assert_close(grads, results[0][1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_save_and_load_round_trip(backbone: str, tmp_path: Path) -> None:
    task_model = model(backbone, "first").float()
    task_model.save_pretrained(tmp_path)
    again = TaskModel.from_pretrained(tmp_path)
    assert again.fingerprint == task_model.fingerprint
    tokens = torch.randint(0, 50, (1, 9))
    assert torch.equal(again(tokens, torch.ones_like(tokens)), task_model(tokens, torch.ones_like(tokens)))


def test_mean_pooling_ignores_padding() -> None:
    x, mask = torch.randn(2, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(MeanPooling(8)(x, mask), torch.stack([x[0, :2].mean(0), x[1].mean(0)]))


def test_invalid_backbones_are_refused() -> None:
    with pytest.raises(MemtxError, match="backbone is a Reformer"):
        TaskModel(50, 2, Reformer)
    with pytest.raises(MemtxError, match="num_labels is 0"):
        TaskModel(50, 0, BACKBONES["encoder"])


def test_the_retrospective_feed_reads_every_text_twice() -> None:
    """ERNIE-Doc, section 3.2: the second time, a text's first tokens see the layers' outputs at its end."""
    ernie_doc = partial(
        MemoryTransformer, dim=8, depth=2, heads=2, memories=[partial(ErnieDocMemory, window=6, interval=4)]
    )
    torch.manual_seed(0)
    plain, retrospective = (
        MemoryTransformerBackbone(50, ernie_doc, segment_length=5, retrospective=value).double().eval()
        for value in (False, True)
    )
    retrospective.load_state_dict(plain.state_dict())
    lengths, length = (14, 9, 1), 14
    tokens = torch.randint(0, 50, (3, length))
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    out = retrospective.encode(tokens, mask)
    for row, n in enumerate(lengths):
        text = tokens[row : row + 1, :n]
        both = plain.encode(torch.cat([text, text], dim=1), torch.ones(1, 2 * n, dtype=torch.int64))
        torch.testing.assert_close(out[row : row + 1, :n], both[:, n:], atol=1e-10, rtol=0)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % 50
    assert (retrospective.encode(other, mask)[0, 0] != out[0, 0]).any()
    assert torch.equal(plain.encode(other, mask)[0, 0], plain.encode(tokens, mask)[0, 0])

"""Summarization: labels of the summary alone, learning, and generation from a run."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from memtx.data.batch import IGNORE_INDEX
from memtx.data.tasks.examples import SummaryPrompt
from memtx.data.tasks.summaries import SummaryDataModule
from memtx.errors import CheckpointError, DataError, MemtxError
from memtx.inference.predictor import Predictor, Summarizer, is_task_model, load_predictor
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.language import SummaryModule
from tests.tasks import write_lines
from tests.training.small import assert_equal, weights
from tests.training.test_finetuning import trainer

MODEL = partial(
    MemoryTransformer,
    dim=48,
    depth=2,
    heads=2,
    memories=[partial(CompressedMemory, window=16, compression_rate=4, num_entries=4)],
)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=5e-3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at, draw = tmp_path_factory.mktemp("summaries"), random.Random(0)
    for split, count in (("train", 60), ("validation", 8), ("test", 8)):
        lines = []
        for _ in range(count):
            good = draw.random() < 0.5
            text = f"{'yes' if good else 'no'} " * draw.randint(2, 9)
            lines.append({"text": text.strip(), "summary": "good" if good else "bad"})
        write_lines(at / f"{split}.jsonl", lines)
    return at


def parts(root: Path, **options: Any) -> tuple[SummaryModule, SummaryDataModule]:
    pl.seed_everything(0)
    data = SummaryDataModule(str(root), batch_size=8, segment_length=16, **options)
    return SummaryModule(
        MODEL, data.vocab_size, data.segment_length, optimizer=adam, scheduler=None, measure_memory_gain=False
    ), data


def test_only_the_summary_has_labels(root: Path) -> None:
    _, data = parts(root)
    data.setup("fit")
    for batch in data.val_dataloader():
        assert batch.document_starts[:, 0].all()
        assert not batch.document_starts[:, 1:].any()
        for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
            decoded = data.tokenizer.decode(labels[labels != IGNORE_INDEX].tolist())
            assert decoded in ("good\n\n", "bad\n\n")
            first = int((labels != IGNORE_INDEX).nonzero()[0])
            assert data.tokenizer.decode(tokens[1 : first + 1].tolist()).endswith("\nSummary: ")
        assert (batch.num_words == 1).all()


def test_a_run_learns_and_generates_from_its_checkpoint(root: Path, tmp_path: Path) -> None:
    module, data = parts(root)
    run = trainer(max_epochs=12)
    run.fit(module, data)
    assert float(run.callback_metrics["val_bits_per_byte"]) < 0.3
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert is_task_model(tmp_path / "a.ckpt")
    summarizer = load_predictor(tmp_path / "a.ckpt")
    assert isinstance(summarizer, Summarizer)
    assert summarizer.predict(["yes yes yes", {"text": "no no no no"}]) == [
        {"summary": "good", "complete": True},
        {"summary": "bad", "complete": True},
    ]
    summarizer.max_tokens = 2
    assert summarizer.predict(["yes yes yes"]) == [{"summary": "go", "complete": False}]
    with pytest.raises(MemtxError, match="Input 1: 'text' is"):
        summarizer.predict(["a", " "])
    with pytest.raises(CheckpointError):
        Predictor.load(tmp_path / "a.ckpt")


def test_resuming_is_exact(root: Path, tmp_path: Path) -> None:
    final_weights = []
    for stop in (None, 5):
        module, data = parts(root)
        if stop is not None:
            run = trainer(max_steps=stop, limit_val_batches=0)
            run.fit(module, data)
            run.save_checkpoint(tmp_path / "half.ckpt")
            module, data = parts(root)
        path = None if stop is None else str(tmp_path / "half.ckpt")
        trainer(max_steps=10, limit_val_batches=0).fit(module, data, ckpt_path=path)
        final_weights.append(weights(module.model))
    assert_equal(*final_weights)


def test_mistakes_are_reported(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="stop_sequence is empty"):
        SummaryPrompt(stop_sequence="")
    with pytest.raises(DataError, match=r"train.jsonl', line 1: Text and summary have \d+ tokens, max_length is 9"):
        parts(root, max_length=9)[1].setup("fit")
    write_lines(tmp_path / "train.jsonl", [{"text": "a", "summary": "good"}])
    with pytest.raises(DataError, match=r"line 1: The summary holds the stop sequence 'o'"):
        parts(tmp_path, stop_sequence="o")[1].setup("fit")

"""Training carries memory as continuous reading does; evaluation is exact and does not change training."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from memtx.data.batch import Batch
from memtx.data.books import BookDataModule
from memtx.errors import MemtxError
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.csv_logger import ResumableCSVLogger
from memtx.training.language import LanguageModule
from memtx.word_measure import MAX_WORD_PERPLEXITY
from tests.training.small import SEGMENT, Record, data, module, sgd, trainer

# float32: the same numbers, added up in another order
CLOSE: Any = {"rel": 1e-5}


def constant(params: Any) -> torch.optim.Optimizer:
    return sgd(params, lr=0.0)


def alone(model: MemoryTransformer, data: BookDataModule, split: str, document: int, tokens: int) -> torch.Tensor:
    """Return (tokens,) nats: a document's beginning, read by itself in one call."""
    text = torch.from_numpy(data.token_store(split).slice_tokens(document, 0, tokens + 1).astype("int64"))[None]
    with torch.no_grad():
        nll: torch.Tensor = model(text[:, :-1], labels=text[:, 1:]).nll[0]
    return nll


def test_training_carries_memory_as_continuous_reading(tmp_path: Path) -> None:
    """The loss of a document in training equals that of the document read alone, in any batch and stream."""
    steps = 30
    language_module, record, texts = module(dropout=0.0, optimizer=constant, scheduler=None), Record(), data(tmp_path)
    trainer(tmp_path, record, max_steps=steps, limit_val_batches=0, limit_train_batches=4).fit(
        language_module, datamodule=texts
    )
    streams = texts.train_dataloader()
    lengths = streams.store.lengths
    length = texts.length
    # Documents end and begin within these batches.
    streams._plan.extend_to(steps * length)
    assert all(documents[1][0] < (steps - 1) * length for documents in streams._plan.documents)
    document_nll = [
        alone(language_module.model, texts, "train", number, int(lengths[number]) - 1) for number in range(len(lengths))
    ]
    for step in range(steps):
        batch_nll: list[float] = []
        for stream in range(2):
            for document, begin, _ in streams._plan.iter_documents(stream, step * length, (step + 1) * length):
                first, last = max(step * length - begin, 0), (step + 1) * length - begin
                batch_nll += document_nll[document][first:last].tolist()
        assert float.fromhex(record.losses[step]) == pytest.approx(sum(batch_nll) / len(batch_nll), **CLOSE), step


def test_validation_does_not_change_training(tmp_path: Path) -> None:
    """Memory and random numbers (dropout) are as if there had been none; so with the sanity check."""
    losses = []
    for options in (
        {"limit_val_batches": 0},
        {"val_check_interval": 2, "num_sanity_val_steps": 0},
        {"val_check_interval": 3, "num_sanity_val_steps": 2},
    ):
        record = Record()
        trainer(tmp_path, record, max_steps=7, **options).fit(module(), datamodule=data(tmp_path))
        losses.append(record.losses)
    assert losses[0] == losses[1] == losses[2]
    assert len(losses[0]) == 7


class Keep(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.saved: dict[Path, dict[str, float]] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            path = self.path / f"{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name[:4] == "val_"}
            self.saved[path] = metrics


@pytest.mark.parametrize("limit", [MAX_WORD_PERPLEXITY, math.inf])
def test_metrics_in_training_equal_those_of_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    monkeypatch.setattr("memtx.metrics.MAX_WORD_PERPLEXITY", limit)
    keep = Keep(tmp_path)
    trainer(tmp_path, keep, max_steps=6, val_check_interval=3).fit(module(), datamodule=data(tmp_path))
    assert len(keep.saved) == 2
    for path, metrics in keep.saved.items():
        fresh = trainer(tmp_path)
        (evaluated,) = fresh.validate(module(seed=5), datamodule=data(tmp_path), ckpt_path=str(path), verbose=False)
        assert evaluated == metrics
        assert ("val_word_perplexity" in metrics) == math.isinf(limit)
    assert len({tuple(metrics.values()) for metrics in keep.saved.values()}) == 2


@pytest.mark.parametrize(("batch_size", "num_segments"), [(1, 1), (2, 3), (3, 1), (5, 2)])
def test_metrics_equal_those_of_whole_documents(tmp_path: Path, batch_size: int, num_segments: int) -> None:
    texts, language_module = data(tmp_path, eval_batch_size=batch_size, bptt_segments=num_segments), module()
    (metrics,) = trainer(tmp_path).test(language_module, datamodule=texts, verbose=False)
    store = texts.token_store("test")
    language_module.model.eval()
    documents = range(len(store.lengths))
    nats = [
        float(alone(language_module.model, texts, "test", document, int(store.lengths[document]) - 1).double().sum())
        for document in documents
    ]
    content = [path.read_bytes() for path in (tmp_path / "books" / "test").iterdir()]
    words, size = sum(len(text.split()) for text in content), sum(map(len, content))
    # The model is not trained, and then word perplexity means nothing.
    assert math.exp(sum(nats) / words) > MAX_WORD_PERPLEXITY
    assert "test_word_perplexity" not in metrics
    assert metrics["test_bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, **CLOSE)
    assert metrics["test_loss"] == pytest.approx(sum(nats) / sum(int(length) - 1 for length in store.lengths), **CLOSE)


def test_word_perplexity_is_logged_only_where_it_means_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each validation logs its own value or none, not one of an earlier validation, and never NaN."""

    class Limit(Keep):
        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            limit = math.inf if trainer.global_step in (4, 6) else MAX_WORD_PERPLEXITY
            monkeypatch.setattr("memtx.metrics.MAX_WORD_PERPLEXITY", limit)

    keep, logger = Limit(tmp_path), ResumableCSVLogger(str(tmp_path / "run"))
    options: dict[str, Any] = {"max_steps": 8, "val_check_interval": 2, "logger": logger, "log_every_n_steps": 2}
    trainer(tmp_path, keep, **options).fit(module(), datamodule=data(tmp_path))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["val_loss"]]
    assert [bool(line["val_word_perplexity"]) for line in lines] == [False, True, True, False]
    values = [metrics.get("val_word_perplexity") for metrics in keep.saved.values()]
    assert values[0] is None
    assert values[3] is None
    content = [path.read_bytes() for path in (tmp_path / "books" / "validation").iterdir()]
    words, size = sum(len(text.split()) for text in content), sum(map(len, content))
    for value, metrics in list(zip(values, keep.saved.values(), strict=True))[1:3]:
        expected = 2 ** (metrics["val_bits_per_byte"] * size / words)
        assert value == pytest.approx(expected, rel=1e-4)  # the power magnifies float32's rounding
    assert not any(math.isnan(value) for metrics in keep.saved.values() for value in metrics.values())


def test_bits_per_character_of_texts_whose_characters_have_several_bytes(tmp_path: Path) -> None:
    text = "\u6211\u4eec\u5728\u8bfb\u4e66\u3002 L'\u00e9t\u00e9, 24 \u00b0C. " * 9
    for split in ("train", "valid"):
        (tmp_path / "books" / split).mkdir(parents=True)
        (tmp_path / "books" / split / "1.txt").write_text(text, encoding="utf-8")
    (metrics,) = trainer(tmp_path).validate(module(), datamodule=data(tmp_path), verbose=False)
    bytes_per_character = len(text.encode()) / len(text)
    assert metrics["val_bits_per_character"] == pytest.approx(
        metrics["val_bits_per_byte"] * bytes_per_character, **CLOSE
    )


def test_limited_validation_is_deterministic(tmp_path: Path) -> None:
    texts = data(tmp_path, eval_tokens=64)
    (metrics,) = trainer(tmp_path).validate(module(), datamodule=texts, verbose=False)
    (full_metrics,) = trainer(tmp_path).validate(module(), datamodule=data(tmp_path), verbose=False)
    assert metrics != full_metrics
    assert metrics.keys() <= full_metrics.keys()  # distances that no text reached are left out


def test_predictions_are_the_nll_of_each_label(tmp_path: Path) -> None:
    texts, language_module = data(tmp_path, eval_batch_size=2), module()
    predictions: Any = trainer(tmp_path).predict(language_module, datamodule=texts)
    batches: list[Batch] = list(texts.predict_dataloader())
    assert [nll.shape for nll in predictions] == [batch.labels.shape for batch in batches]
    language_module.model.eval()
    plan = texts.predict_dataloader()._plan
    nll = torch.cat(predictions, dim=1)
    for stream in range(2):
        for document, begin, _ in plan.iter_documents(stream, 0, nll.shape[1]):
            tokens = int(texts.token_store("test").lengths[document]) - 1
            expected = alone(language_module.model, texts, "test", document, tokens)
            # float32, in other segments and batches
            torch.testing.assert_close(nll[stream, begin : begin + tokens], expected, atol=1e-4, rtol=1e-4)


def test_logged_metrics(tmp_path: Path) -> None:
    language_module = module()
    run = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    run.fit(language_module, datamodule=data(tmp_path))
    logged = run.callback_metrics
    batch = data(tmp_path).train_dataloader().get_batch(1)
    scored = int((batch.labels != -100).sum())
    bits = float(logged["train_loss"]) * scored / math.log(2) / int(batch.num_bytes.sum())
    assert float(logged["train_bits_per_byte"]) == pytest.approx(bits, **CLOSE)
    assert language_module.tokens_seen == 2 * 2 * 2 * SEGMENT


def test_an_empty_segment_is_rejected() -> None:
    with pytest.raises(MemtxError, match="segment_length is 0"):
        LanguageModule(segment_length=0)

"""Predictions from raw texts are equal in any batch and after loading a saved folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx.data.tasks.examples import SummaryPrompt
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import CheckpointError, MemtxError
from memtx.inference.deadline import ClosedError, DeadlineExceededError
from memtx.inference.predictor import Predictor, Summarizer, is_task_model
from memtx.models.memory_transformer import MemoryTransformer
from tests.inference.conftest import tiny_model
from tests.tasks import KINDS, predictor, records


def rounded(value: Any) -> Any:
    # Padding to the longest text changes the order of sums; 1e-4 is float32 rounding.
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_do_not_depend_on_the_batch(kind: str) -> None:
    task_predictor, inputs = predictor(kind), records(kind, 9)
    together = task_predictor.predict(inputs)
    task_predictor.max_batch_tokens = 1
    alone = [task_predictor.predict([record])[0] for record in inputs]
    assert [rounded(prediction) for prediction in alone] == [rounded(prediction) for prediction in together]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_ignored(kind: str) -> None:
    task_predictor, inputs = predictor(kind), records(kind, 3)
    labels = ("label", "labels", "tags", "answers", "is_impossible")
    unlabeled = [{key: value for key, value in record.items() if key not in labels} for record in inputs]
    assert task_predictor.predict(inputs) == task_predictor.predict(unlabeled)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_is_complete(kind: str, tmp_path: Path) -> None:
    task_predictor = predictor(kind, stride=8)
    task_predictor.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", "task.json", "tokenizer.json"
    ]  # fmt: skip
    assert is_task_model(tmp_path)
    loaded = Predictor.load(tmp_path)
    assert loaded.task.to_dict() == task_predictor.task.to_dict()
    assert loaded.predict(records(kind, 3)) == task_predictor.predict(records(kind, 3))


def test_tasks_on_one_text_accept_raw_text() -> None:
    text = "Captain  Ahab saw (in the dark) the whale."
    (prediction,) = predictor("tagging").predict([text])
    assert len(prediction["tags"]) == len(prediction["tokens"]) == 11
    for span in prediction["spans"]:
        assert text[span["start"] : span["end"]] == span["text"]
    assert set(predictor("classification").predict([text])[0]["scores"]) == {"neg", "pos"}
    for kind in ("matching", "questions"):
        with pytest.raises(MemtxError, match="as JSON"):
            predictor(kind).predict([text])


def test_a_long_text_is_split_into_windows_or_refused() -> None:
    text = "the white whale . " * 40
    with pytest.raises(MemtxError, match="Input 1: The text has 160 tokens"):
        predictor("classification").predict(["the whale", text])
    assert len(predictor("tagging", stride=32).predict([text])[0]["tags"]) == 160


def test_invalid_inputs_deadlines_and_closing_are_reported() -> None:
    task_predictor = predictor("classification")
    for raw_input, message in (({"txt": "a"}, "There is no 'text'"), ("  ", "empty"), ("\ud800", "surrogate")):
        with pytest.raises(MemtxError, match=message):
            task_predictor.predict([raw_input])  # type: ignore[list-item]
    with pytest.raises(DeadlineExceededError):
        task_predictor.predict(["a"], deadline=time.monotonic() - 1)
    task_predictor.close()
    with pytest.raises(ClosedError):
        task_predictor.predict(["a"])


def test_models_without_a_task_are_refused(tmp_path: Path) -> None:
    MemoryTransformer(10, dim=8, depth=1, heads=1).save_pretrained(tmp_path / "m")
    assert not is_task_model(tmp_path / "m")
    with pytest.raises(CheckpointError, match="no tokenizer or no task"):
        Predictor.load(tmp_path / "m")
    with pytest.raises(CheckpointError, match="does not exist"):
        Predictor.load(tmp_path / "no")
    (tmp_path / "x.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="not a valid checkpoint"):
        Predictor.load(tmp_path / "x.ckpt")
    task_predictor = predictor("classification")
    task_predictor.model.num_labels = 5
    with pytest.raises(CheckpointError, match="do not belong together"):
        Predictor(task_predictor.model, task_predictor.tokenizer, predictor("tagging").task)


def test_the_best_span_is_found() -> None:
    from memtx.data.tasks.question_answering import _best_span

    torch.manual_seed(0)
    for _ in range(20):
        scores = torch.randn(12, 2).numpy()
        expected = max(
            (float(scores[start, 0] + scores[end, 1]), start, end)
            for start in range(12)
            for end in range(start, min(12, start + 4))
        )
        assert _best_span(scores, 4) == pytest.approx(expected)


def test_a_long_text_to_summarize_is_checked_against_the_deadline_segment_by_segment() -> None:
    summarizer = Summarizer(tiny_model(257), ByteTokenizer(), SummaryPrompt(), max_tokens=4)
    assert summarizer.predict(["a short text"], deadline=time.monotonic() + 60)[0]["complete"] is False
    start = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        summarizer.predict(["long " * 100_000], deadline=time.monotonic() + 0.5)
    assert time.monotonic() - start < 5

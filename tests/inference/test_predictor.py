"""Raw texts in, answers out; the same whatever they are asked beside, and from a folder alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx.data.tasks.base import Task
from memtx.errors import CheckpointError, MemtxError
from memtx.inference.engine import ClosedError, DeadlineExceededError
from memtx.inference.predictor import Predictor, is_task_model
from memtx.models.memory_transformer import MemoryTransformer
from tests.tasks import KINDS, predictor, records


def rounded(value: Any) -> Any:
    # Rows of a call are padded to the longest, which changes the order of sums: 1e-4 is float32's noise here.
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_company_changes_nothing(kind: str) -> None:
    made, given = predictor(kind), records(kind, 9)
    together = made.predict(given)
    made.max_batch_tokens = 1
    assert [rounded(made.predict([one])[0]) for one in given] == [rounded(one) for one in together]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_not_looked_at(kind: str) -> None:
    made, given = predictor(kind), records(kind, 3)
    bare = [{key: value for key, value in one.items() if key not in ("label", "tags", "answers")} for one in given]
    for one in bare:
        one.pop("is_impossible", None)
    assert made.predict(given) == made.predict(bare)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_alone_is_enough(kind: str, tmp_path: Path) -> None:
    made = predictor(kind, stride=8)
    made.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", "task.json", "tokenizer.json"
    ]  # fmt: skip
    assert is_task_model(tmp_path)
    again = Predictor.load(tmp_path)
    assert again.task.to_dict() == made.task.to_dict()
    assert again.predict(records(kind, 3)) == made.predict(records(kind, 3))


def test_a_raw_text_is_enough_where_one_text_is_all() -> None:
    text = "Captain  Ahab saw (in the dark) the whale."
    (said,) = predictor("tagging").predict([text])
    assert len(said["tags"]) == len(said["tokens"]) == 11
    for span in said["spans"]:
        assert text[span["start"] : span["end"]] == span["text"]
    assert set(predictor("classification").predict([text])[0]["scores"]) == {"neg", "pos"}
    for kind in ("matching", "questions"):
        with pytest.raises(MemtxError, match="as JSON"):
            predictor(kind).predict([text])


def test_a_long_text_is_windows_or_refused() -> None:
    text = "the white whale . " * 40
    with pytest.raises(MemtxError, match="Input 1: The text has 160 tokens"):
        predictor("classification").predict(["the whale", text])
    assert len(predictor("tagging", stride=32).predict([text])[0]["tags"]) == 160


def test_what_is_wrong_is_said_with_its_place() -> None:
    made = predictor("classification")
    for given, said in (({"txt": "a"}, "There is no 'text'"), ("  ", "empty"), ("\ud800", "surrogate")):
        with pytest.raises(MemtxError, match=said):
            made.predict([given])  # type: ignore[list-item]
    with pytest.raises(DeadlineExceededError):
        made.predict(["a"], deadline=time.monotonic() - 1)
    made.close()
    with pytest.raises(ClosedError):
        made.predict(["a"])


def test_what_is_no_task_is_refused(tmp_path: Path) -> None:
    MemoryTransformer(10, dim=8, depth=1, heads=1).save_pretrained(tmp_path / "m")
    assert not is_task_model(tmp_path / "m")
    with pytest.raises(CheckpointError, match="no tokenizer or no task"):
        Predictor.load(tmp_path / "m")
    with pytest.raises(CheckpointError, match="does not exist"):
        Predictor.load(tmp_path / "no")
    (tmp_path / "x.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        Predictor.load(tmp_path / "x.ckpt")
    made = predictor("classification")
    own: Task = predictor("tagging").task
    made.model.num_labels = 5
    with pytest.raises(CheckpointError, match="do not belong together"):
        Predictor(made.model, made.tokenizer, own)


def test_the_best_span_is_searched_for() -> None:
    from memtx.data.tasks.question_answering import _best_span

    torch.manual_seed(0)
    for _ in range(20):
        scores = torch.randn(12, 2).numpy()
        wanted = max(
            (float(scores[start, 0] + scores[stop, 1]), start, stop)
            for start in range(12)
            for stop in range(start, min(12, start + 4))
        )
        assert _best_span(scores, 4) == pytest.approx(wanted)

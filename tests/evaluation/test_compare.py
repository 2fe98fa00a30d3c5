"""Models beside one another: sizes as they are, scores as plain loops find them, times of calls that take turns."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from memtx.data.sources.corpus import open_corpus
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import DataError, MemtxError
from memtx.evaluation.compare import (
    REPEATS,
    ModelComparison,
    ParsedRecord,
    TextBatch,
    bits_per_byte,
    compare_language_models,
    compare_task_models,
    compute_task_score,
    num_parameters,
    time_calls,
)
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.memory_transformer import MemoryTransformer
from tests.tasks import predictor, records, task

WORDS = ("One.", "Two and a half.", "Thrée.")


def model(seed: int = 0) -> MemoryTransformer:
    torch.manual_seed(seed)
    return MemoryTransformer(257, dim=8, depth=1, heads=2, memories=[partial(RecurrentMemory, window=6)]).eval()


def texts(at: Path, length: int = 64) -> TextBatch:
    (at / "test").mkdir()
    for number, text in enumerate(WORDS):
        (at / "test" / f"{number}.txt").write_text(text, encoding="utf-8")
    return TextBatch.from_documents(open_corpus(str(at)).get_split("test"), ByteTokenizer(), length)


@pytest.mark.parametrize("segment", [1, 4, 64])
@pytest.mark.parametrize("beyond", [0, 3])
def test_bits_are_of_the_bytes_from_a_position_on(tmp_path: Path, segment: int, beyond: int) -> None:
    own, found = model(), texts(tmp_path)
    nats, size = 0.0, 0
    for text in WORDS:
        tokens = torch.tensor([256, *text.encode()])
        nll = own(tokens[None, :-1], labels=tokens[None, 1:]).nll[0]
        nats += float(nll[beyond:].double().sum())
        size += len(nll[beyond:])
    # float32, cut otherwise
    assert bits_per_byte(own, found, segment_length=segment, min_position=beyond) == pytest.approx(
        nats / math.log(2) / size, rel=1e-5
    )


def test_texts_are_cut_to_their_beginnings(tmp_path: Path) -> None:
    found = texts(tmp_path, 5)
    assert found.tokens.shape == found.labels.shape == found.label_bytes.shape == (3, 5)
    assert found.labels[1].tolist() == list(WORDS[1].encode()[:5])
    assert found.labels[0].tolist() == [*WORDS[0].encode(), -100]
    assert found.label_bytes[0].tolist() == [1, 1, 1, 1, 0]
    with pytest.raises(DataError, match="no text to be measured on"):
        TextBatch.from_documents([], ByteTokenizer(), 5)


def test_calls_take_turns_and_the_fastest_of_each_input_counts() -> None:
    made: list[tuple[str, int]] = []

    def slow(number: int) -> None:
        made.append(("slow", number))
        time.sleep(0.02)

    spent = time_calls([slow, lambda number: made.append(("fast", number))], 2)
    assert made == [(name, number) for number in range(2) for _ in range(REPEATS) for name in ("slow", "fast")]
    # It sleeps at least as long as asked.
    assert spent[0] >= 20 > spent[1] >= 0
    with pytest.raises(MemtxError, match="num_inputs is 0"):
        time_calls([], 0)


def test_shares_are_of_the_teachers() -> None:
    teacher = ModelComparison("teacher", 1000, 3.0, 0.8, "accuracy")
    student = ModelComparison("student", 250, 1.5, 0.6, "accuracy")
    assert (student.size_reduction(teacher), student.speed_gain(teacher)) == (0.75, 1.0)
    assert student.score_retention(teacher) == pytest.approx(0.75)
    teacher, student = (ModelComparison("", 1, 1.0, bits, "bits_per_byte") for bits in (2.0, 2.5))
    assert student.score_retention(teacher) == pytest.approx(0.8)


@pytest.mark.parametrize("kind", ["classification", "tagging", "questions"])
def test_a_tasks_score_is_one_for_right_answers(kind: str) -> None:
    own = task(kind)
    examples = [own.parse(record, True) for record in records(kind, 12)]
    right = {
        "classification": [{"label": getattr(one, "label", "")} for one in examples],
        "tagging": [{"tags": getattr(one, "tags", ())} for one in examples],
        "questions": [{"answer": next((a.text for a in getattr(one, "answers", ())), "")} for one in examples],
    }[kind]
    assert compute_task_score(own, examples, right) == 1.0
    wrong = {"classification": {"label": "?"}, "tagging": {"tags": None}, "questions": {"answer": "nothing"}}[kind]
    others = [{**wrong, "tags": ["O"] * len(one.tags)} if kind == "tagging" else wrong for one in examples]
    assert compute_task_score(own, examples, others) < 0.2


def test_tasks_and_texts_beside_one_another(tmp_path: Path) -> None:
    named = [(name, predictor("classification", seed=seed)) for seed, name in enumerate(("a", "b"))]
    asked = [ParsedRecord(one, named[0][1].task.parse(one, True)) for one in records("classification", 6)]
    calls: list[None] = []
    found = compare_task_models(named, asked, num_timed=2, on_progress=lambda: calls.append(None))
    assert len(calls) == 2 * (6 + 2 * REPEATS)
    assert [one.name for one in found] == ["a", "b"]
    assert found[0].num_parameters == num_parameters(named[0][1].model) > 0
    said = named[0][1].predict([one.record for one in asked])
    share = sum(one["label"] == two.example.label for one, two in zip(said, asked, strict=True)) / 6
    assert found[0].score == pytest.approx(share)
    read = compare_language_models([("a", model()), ("b", model(1))], texts(tmp_path), segment_length=4, num_timed=3)
    assert [one.metric for one in read] == ["bits_per_byte"] * 2
    assert all(one.latency_ms > 0 for one in read)
    # A tied head is no weight of its own.
    assert read[0].num_parameters == sum(one.numel() for one in set(model().parameters()))

"""Comparisons: sizes, scores equal to plain loops, and latencies of alternating calls."""

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

TEXTS = ("One.", "Two and a half.", "Thrée.")


def model(seed: int = 0) -> MemoryTransformer:
    torch.manual_seed(seed)
    return MemoryTransformer(257, dim=8, depth=1, heads=2, memories=[partial(RecurrentMemory, window=6)]).eval()


def text_batch(folder: Path, max_length: int = 64) -> TextBatch:
    (folder / "test").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "test" / f"{number}.txt").write_text(text, encoding="utf-8")
    return TextBatch.from_documents(open_corpus(str(folder)).get_split("test"), ByteTokenizer(), max_length)


@pytest.mark.parametrize("segment_length", [1, 4, 64])
@pytest.mark.parametrize("min_position", [0, 3])
def test_bits_per_byte_count_tokens_from_min_position(tmp_path: Path, segment_length: int, min_position: int) -> None:
    reader, batch = model(), text_batch(tmp_path)
    nats, num_bytes = 0.0, 0
    for text in TEXTS:
        tokens = torch.tensor([256, *text.encode()])
        nll = reader(tokens[None, :-1], labels=tokens[None, 1:]).nll[0]
        nats += float(nll[min_position:].double().sum())
        num_bytes += len(nll[min_position:])
    # float32 with other segments.
    assert bits_per_byte(reader, batch, segment_length=segment_length, min_position=min_position) == pytest.approx(
        nats / math.log(2) / num_bytes, rel=1e-5
    )


def test_text_batch_holds_the_beginnings_of_texts(tmp_path: Path) -> None:
    batch = text_batch(tmp_path, 5)
    assert batch.tokens.shape == batch.labels.shape == batch.label_bytes.shape == (3, 5)
    assert batch.labels[1].tolist() == list(TEXTS[1].encode()[:5])
    assert batch.labels[0].tolist() == [*TEXTS[0].encode(), -100]
    assert batch.label_bytes[0].tolist() == [1, 1, 1, 1, 0]
    with pytest.raises(DataError, match="no text to evaluate on"):
        TextBatch.from_documents([], ByteTokenizer(), 5)


def test_timed_calls_alternate_and_the_fastest_of_each_input_counts() -> None:
    calls: list[tuple[str, int]] = []

    def slow(index: int) -> None:
        calls.append(("slow", index))
        time.sleep(0.02)

    latencies = time_calls([slow, lambda index: calls.append(("fast", index))], 2)
    assert calls == [(name, index) for index in range(2) for _ in range(REPEATS) for name in ("slow", "fast")]
    # sleep() takes at least the requested time.
    assert latencies[0] >= 20 > latencies[1] >= 0
    with pytest.raises(MemtxError, match=r"num_inputs .*0"):
        time_calls([], 0)


def test_ratios_are_relative_to_the_teacher() -> None:
    teacher = ModelComparison("teacher", 1000, 3.0, 0.8, "accuracy")
    student = ModelComparison("student", 250, 1.5, 0.6, "accuracy")
    assert (student.size_reduction(teacher), student.speed_gain(teacher)) == (0.75, 1.0)
    assert student.score_retention(teacher) == pytest.approx(0.75)
    teacher, student = (ModelComparison("", 1, 1.0, bits, "bits_per_byte") for bits in (2.0, 2.5))
    assert student.score_retention(teacher) == pytest.approx(0.8)


@pytest.mark.parametrize("kind", ["classification", "tagging", "questions"])
def test_score_of_correct_predictions_is_one(kind: str) -> None:
    scored_task = task(kind)
    examples = [scored_task.parse(record, True) for record in records(kind, 12)]
    correct = {
        "classification": [{"label": getattr(example, "label", "")} for example in examples],
        "tagging": [{"tags": getattr(example, "tags", ())} for example in examples],
        "questions": [
            {"answer": next((answer.text for answer in getattr(example, "answers", ())), "")} for example in examples
        ],
    }[kind]
    assert compute_task_score(scored_task, examples, correct) == 1.0
    wrong = {"classification": {"label": "?"}, "tagging": {"tags": None}, "questions": {"answer": "nothing"}}[kind]
    others = [{**wrong, "tags": ["O"] * len(example.tags)} if kind == "tagging" else wrong for example in examples]
    assert compute_task_score(scored_task, examples, others) < 0.2


def test_task_models_and_language_models_are_compared(tmp_path: Path) -> None:
    predictors = [(name, predictor("classification", seed=seed)) for seed, name in enumerate(("a", "b"))]
    parsed = [
        ParsedRecord(record, predictors[0][1].task.parse(record, True)) for record in records("classification", 6)
    ]
    calls: list[None] = []
    comparisons = compare_task_models(predictors, parsed, num_timed=2, on_progress=lambda: calls.append(None))
    assert len(calls) == 2 * (6 + 2 * REPEATS)
    assert [comparison.name for comparison in comparisons] == ["a", "b"]
    assert comparisons[0].num_parameters == num_parameters(predictors[0][1].model) > 0
    predictions = predictors[0][1].predict([example.record for example in parsed])
    pairs = zip(predictions, parsed, strict=True)
    accuracy = sum(prediction["label"] == example.example.label for prediction, example in pairs) / 6
    assert comparisons[0].score == pytest.approx(accuracy)
    models = [("a", model()), ("b", model(1))]
    comparisons = compare_language_models(models, text_batch(tmp_path), segment_length=4, num_timed=3)
    assert [comparison.metric for comparison in comparisons] == ["bits_per_byte"] * 2
    assert all(comparison.latency_ms > 0 for comparison in comparisons)
    # A tied head adds no parameters.
    assert comparisons[0].num_parameters == sum(parameter.numel() for parameter in set(model().parameters()))

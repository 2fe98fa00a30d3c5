"""Examples become windows and batches, and logits become predictions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.batch import IGNORE_INDEX
from memtx.data.tasks.base import task_from_json, task_to_json
from memtx.data.tasks.batches import EvaluationBatches, TaskBatch, TrainingBatches, collate
from memtx.data.tasks.examples import TaggedExample
from memtx.data.tasks.tagging import Tagging, extract_spans, find_words
from memtx.errors import CheckpointError, DataError
from tests.tasks import KINDS, records, task, tokenizer

OWN = tokenizer()
SHORT = {"classification": 12, "tagging": 12, "matching": 22, "questions": 22, "multi_label": 12}
"""Tokens into which the examples do not fit."""


def pad_own(windows: list[Any]) -> TaskBatch:
    return collate(windows, OWN.pad_token_id)


def encoded_examples(kind: str, count: int = 12, **options: Any) -> list[Any]:
    a_task = task(kind, **options)
    return [a_task.prepare(a_task.parse(record), OWN) for record in records(kind, count)]


def windows_of(examples: list[Any]) -> list[Any]:
    return [window for example in examples for window in example.windows]


@pytest.mark.parametrize("kind", SHORT)
def test_logits_equal_to_the_targets_give_the_labels(kind: str) -> None:
    for max_length, stride in ((64, None), (SHORT[kind], 4)):
        a_task = task(kind, max_length, stride)
        for prepared in encoded_examples(kind, max_length=max_length, stride=stride):
            scores = []
            for window in prepared.windows:
                if kind in ("classification", "matching"):
                    scores.append(np.eye(a_task.num_labels, dtype=np.float32)[window.target[0]])
                    continue
                if kind == "multi_label":
                    scores.append((20 * window.target - 10).astype(np.float32))
                    continue
                row = np.zeros((len(window.ids), a_task.num_labels), dtype=np.float32)
                if kind == "tagging":
                    for index, target in enumerate(window.target):
                        row[index, max(target, 0)] = 1
                else:
                    for which in (0, 1):
                        row[window.target[which], which] = 1
                scores.append(row)
            prediction = a_task.postprocess(prepared, scores)
            if kind == "tagging":
                assert prediction["tags"] == list(prepared.example.tags)
            elif kind == "questions":
                answer = prepared.example.answers[0].text if prepared.example.answers else ""
                assert (prediction["answer"], prediction["is_impossible"]) == (answer, not answer)
            elif kind == "multi_label":
                assert sorted(prediction["labels"]) == sorted(prepared.example.labels)
            else:
                assert prediction["label"] == prepared.example.label
                assert sum(prediction["scores"].values()) == pytest.approx(1, abs=1e-4)  # rounded to six places each


@pytest.mark.parametrize("kind", SHORT)
def test_windows_cover_the_text_and_overlap(kind: str) -> None:
    for prepared in encoded_examples(kind, max_length=SHORT[kind], stride=4):
        text = prepared.encodings[1 if kind == "questions" else 0]
        assert len(prepared.windows) > 1
        seen = np.zeros(len(text), dtype=int)
        for window in prepared.windows:
            assert len(window.ids) <= SHORT[kind]
            seen[window.text_start : window.text_stop] += 1
            part = window.ids[window.input_start : window.input_start + window.text_stop - window.text_start]
            assert part.tolist() == text.ids[window.text_start : window.text_stop].tolist()
        assert seen.min() >= 1
        assert seen.max() >= 2


@pytest.mark.parametrize("kind", SHORT)
def test_a_text_that_is_too_long_is_rejected_with_a_hint(kind: str) -> None:
    with pytest.raises(DataError, match=r"fit into what the model reads at once \(14\).*stride"):
        encoded_examples(kind, max_length=14)


def test_each_task_sets_its_global_tokens() -> None:
    for prepared in encoded_examples("classification") + encoded_examples("matching"):
        assert prepared.windows[0].global_attention_mask.nonzero()[0].tolist() == [0]
    for prepared in encoded_examples("questions"):
        window = prepared.windows[0]
        # [CLS] and the question, not the [SEP] after it, as in published Longformers.
        assert window.global_attention_mask.nonzero()[0].tolist() == list(range(len(prepared.encodings[0]) + 1))
        assert window.token_type_ids.tolist() == [0] * window.input_start + [1] * (len(window.ids) - window.input_start)
    assert not any(prepared.windows[0].global_attention_mask.any() for prepared in encoded_examples("tagging"))


def test_an_unknown_label_is_reported() -> None:
    a_task = task("classification")
    with pytest.raises(DataError, match=r"'poz' was never seen in training, known are neg, pos. Did you mean 'pos'"):
        a_task.prepare(a_task.parse({"text": "a", "label": "poz"}), OWN)
    tags = Tagging(["O", "B-X"])
    with pytest.raises(DataError, match="'B-Y' was never seen"):
        tags.prepare(TaggedExample(("a",), ("B-Y",)), OWN)


def test_a_word_without_tokens_has_a_tag_too() -> None:
    a_task = Tagging(["B-X", "O"])
    example = TaggedExample(("whale", "\x00", "\u200b", "sea"), ("B-X", "O", "O", "B-X"))
    prepared = a_task.prepare(example, OWN)
    scores = [np.zeros((len(window.ids), 2), dtype=np.float32) for window in prepared.windows]
    assert a_task.postprocess(prepared, scores)["tags"][0] == "B-X"
    assert len(a_task.postprocess(prepared, scores)["tags"]) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_comes_back_from_json(kind: str) -> None:
    a_task = task(kind, 32, 8)
    assert task_from_json(task_to_json(a_task)).to_dict() == a_task.to_dict()
    for text in (
        "",
        "[]",
        '{"format": "memtx.task", "version": 2, "kind": "x"}',
        task_to_json(a_task).replace("2", "3"),
    ):
        with pytest.raises(DataError):
            task_from_json(text)


def test_spans_follow_seqeval() -> None:
    cases: list[tuple[str, list[tuple[str, int, int]]]] = [
        ("B-A I-A O B-B", [("A", 0, 2), ("B", 3, 4)]),
        ("I-A I-A", [("A", 0, 2)]),
        ("B-A B-A I-B", [("A", 0, 1), ("A", 1, 2), ("B", 2, 3)]),
        ("O I-A I-B I-B", [("A", 1, 2), ("B", 2, 4)]),
        ("B-A E-A I-A", [("A", 0, 2), ("A", 2, 3)]),
        ("S-A S-A O", [("A", 0, 1), ("A", 1, 2)]),
        ("B I O", [("_", 0, 2)]),
        ("O O", []),
        ("B-A-B I-A-B", [("A-B", 0, 2)]),
    ]
    for tags, expected in cases:
        assert extract_spans(tags.split()) == expected, tags


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "E-A", "S-A", "B-B", "I-B"]), max_size=12))
def test_spans_equal_those_of_seqeval(tags: list[str]) -> None:
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling", reason="the package 'seqeval' is not installed")
    assert extract_spans(tags) == [(kind, start, stop + 1) for kind, start, stop in labeling.get_entities(tags)]


def test_a_raw_text_is_split_into_words() -> None:
    text = "Boeing Co. won't sell Tulsa's 747-400 unit (yet)."
    assert [text[start:stop] for start, stop in find_words(text)] == [
        "Boeing", "Co", ".", "wo", "n't", "sell", "Tulsa", "'s", "747-400", "unit", "(", "yet", ")", "."
    ]  # fmt: skip


def test_a_pass_holds_every_window_once_and_the_next_has_another_order() -> None:
    examples = encoded_examples("classification", 21)
    batches = TrainingBatches(windows_of(examples), 4, pad_own, seed=3)
    passes = [[batch.tokens for batch in batches] for _ in range(2)]
    for batches_of_ids in passes:
        assert len(batches_of_ids) == len(batches) == 6
        assert sum(len(part) for part in batches_of_ids) == 21
        texts = sorted(tuple(row[row != OWN.pad_token_id].tolist()) for part in batches_of_ids for row in part)
        assert texts == sorted(tuple(example.windows[0].ids.tolist()) for example in examples)
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(*passes, strict=True))


def test_training_resumes_at_a_position() -> None:
    examples = encoded_examples("tagging", 21)
    batches = TrainingBatches(windows_of(examples), 4, pad_own, seed=3)
    expected = [batch.tokens.tolist() for _ in range(3) for batch in batches]
    for stop in (0, 1, 5, 6, 7, 13):
        first, taken = TrainingBatches(windows_of(examples), 4, pad_own, seed=3), []
        while len(taken) < stop:
            for batch in first:
                taken.append(batch.tokens.tolist())
                if len(taken) == stop:
                    break
        second = TrainingBatches(windows_of(examples), 4, pad_own, seed=3)
        second.load_state_dict(first.state_dict())
        while len(taken) < len(expected):
            taken += [batch.tokens.tolist() for batch in second]
        assert taken == expected
    with pytest.raises(CheckpointError, match="belongs to seed 4"):
        second.load_state_dict(first.state_dict() | {"seed": 4})


def test_ranks_share_the_windows() -> None:
    examples = encoded_examples("classification", 21)
    for world in (2, 5):
        parts = [TrainingBatches(windows_of(examples), 2, pad_own, 0, rank, world) for rank in range(world)]
        counts = {len(list(part)) for part in parts}
        assert counts == {len(parts[0])}
    seen = [example for rank in range(2) for batch in EvaluationBatches(examples, task("classification"), 4, 0, rank, 2)
            for example in batch.batch_examples.examples]  # fmt: skip
    assert len(seen) == 21


@settings(max_examples=60)
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 6)), min_size=1, max_size=4),
)
def test_the_rest_of_a_pass_is_assigned_to_other_ranks(count: int, stages: list[tuple[int, int, int]]) -> None:
    numbered = [SimpleNamespace(ids=[index] * (1 + index % 5)) for index in range(count)]
    seen: list[int] = []
    state: dict[str, Any] = {}
    batch_size = ranks = 1
    for batch_size, ranks, steps in [*stages, (*stages[-1][:2], count)]:
        parts: list[Any] = [
            TrainingBatches(numbered, batch_size, lambda windows: [window.ids[0] for window in windows], 3, rank, ranks)
            for rank in range(ranks)
        ]
        for part in parts if state else ():
            part.load_state_dict(state)
        if count < batch_size * ranks:
            return  # Fewer batches than ranks: every rank has one.
        left = [len(part) - part.position for part in parts]
        assert len(set(left)) == 1
        read = min(steps, left[0])
        for part in parts:
            batches = iter(part)
            for _ in range(read if part.position < len(part) else 0):
                seen += next(batches)
        state = parts[0].state_dict()
        assert all(part.state_dict() == state for part in parts)
        if read == left[0]:
            break
    assert len(set(seen)) == len(seen)
    # Windows that do not make a batch for every rank are left out.
    assert count - len(seen) <= (ranks - 1) * batch_size


def test_labels_are_ignored_where_there_is_no_target() -> None:
    for batch in EvaluationBatches(encoded_examples("tagging"), task("tagging"), 4, OWN.pad_token_id):
        assert (batch.labels[batch.attention_mask == 0] == IGNORE_INDEX).all()
        assert (batch.labels[:, 0] == IGNORE_INDEX).all()

"""How examples become rows, and scores answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.batch import IGNORE_INDEX
from memtx.data.tasks.base import task_from_json, task_to_json
from memtx.data.tasks.batches import EvaluationBatches, TrainingBatches, collate, encode_examples
from memtx.data.tasks.examples import TaggedExample
from memtx.data.tasks.tagging import Tagging, extract_spans, find_words
from memtx.errors import CheckpointError, DataError
from tests.tasks import KINDS, records, task, tokenizer

OWN = tokenizer()
SHORT = {"classification": 12, "tagging": 12, "matching": 22, "questions": 22}
"""Tokens into which the examples do not fit."""


def made(kind: str, count: int = 12, **options: Any) -> list[Any]:
    own = task(kind, **options)
    return encode_examples([own.parse(record) for record in records(kind, count)], own, OWN)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_that_are_the_targets_give_the_labels_back(kind: str) -> None:
    for longest, stride in ((64, None), (SHORT[kind], 4)):
        own = task(kind, longest, stride)
        for one in made(kind, max_length=longest, stride=stride):
            scores = []
            for window in one.windows:
                if kind in ("classification", "matching"):
                    scores.append(np.eye(own.num_labels, dtype=np.float32)[window.target[0]])
                    continue
                row = np.zeros((len(window.ids), own.num_labels), dtype=np.float32)
                if kind == "tagging":
                    for place, target in enumerate(window.target):
                        row[place, max(target, 0)] = 1
                else:
                    for which in (0, 1):
                        row[window.target[which], which] = 1
                scores.append(row)
            said = own.postprocess(one.example, one.encodings, one.windows, scores)
            if kind == "tagging":
                assert said["tags"] == list(one.example.tags)
            elif kind == "questions":
                wanted = one.example.answers[0].text if one.example.answers else ""
                assert (said["answer"], said["is_impossible"]) == (wanted, not wanted)
            else:
                assert said["label"] == one.example.label
                assert sum(said["scores"].values()) == pytest.approx(1, abs=1e-4)  # rounded to six places each


@pytest.mark.parametrize("kind", KINDS)
def test_windows_cover_the_text_and_overlap(kind: str) -> None:
    for one in made(kind, max_length=SHORT[kind], stride=4):
        text = one.encodings[1 if kind == "questions" else 0]
        assert len(one.windows) > 1
        seen = np.zeros(len(text), dtype=int)
        for window in one.windows:
            assert len(window.ids) <= SHORT[kind]
            seen[window.text_start : window.text_stop] += 1
            part = window.ids[window.input_start : window.input_start + window.text_stop - window.text_start]
            assert part.tolist() == text.ids[window.text_start : window.text_stop].tolist()
        assert seen.min() >= 1
        assert seen.max() >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_text_is_refused_with_the_cure(kind: str) -> None:
    with pytest.raises(DataError, match=r"fit into what the model reads at once \(14\).*stride"):
        made(kind, max_length=14)


def test_global_tokens_are_the_tasks() -> None:
    for one in made("classification") + made("matching"):
        assert one.windows[0].global_attention_mask.nonzero()[0].tolist() == [0]
    for one in made("questions"):
        window = one.windows[0]
        assert window.global_attention_mask.nonzero()[0].tolist() == list(range(len(one.encodings[0]) + 2))
        assert window.token_type_ids.tolist() == [0] * window.input_start + [1] * (len(window.ids) - window.input_start)
    assert not any(one.windows[0].global_attention_mask.any() for one in made("tagging"))


def test_an_unknown_label_is_said() -> None:
    own = task("classification")
    with pytest.raises(DataError, match=r"'poz' was never seen in training, known are neg, pos. Did you mean 'pos'"):
        encode_examples([own.parse({"text": "a", "label": "poz"})], own, OWN)
    tags = Tagging(["O", "B-X"])
    with pytest.raises(DataError, match="'B-Y' was never seen"):
        encode_examples([TaggedExample(("a",), ("B-Y",))], tags, OWN)


def test_a_word_without_tokens_has_a_tag_too() -> None:
    own = Tagging(["B-X", "O"])
    example = TaggedExample(("whale", "\x00", "\u200b", "sea"), ("B-X", "O", "O", "B-X"))
    (one,) = encode_examples([example], own, OWN)
    scores = [np.zeros((len(window.ids), 2), dtype=np.float32) for window in one.windows]
    assert own.postprocess(example, one.encodings, one.windows, scores)["tags"][0] == "B-X"
    assert len(own.postprocess(example, one.encodings, one.windows, scores)["tags"]) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_comes_back_from_json(kind: str) -> None:
    own = task(kind, 32, 8)
    assert task_from_json(task_to_json(own)).to_dict() == own.to_dict()
    for text in ("", "[]", '{"format": "memtx.task", "version": 2, "kind": "x"}', task_to_json(own).replace("2", "3")):
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
    for tags, wanted in cases:
        assert extract_spans(tags.split()) == wanted, tags


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "E-A", "S-A", "B-B", "I-B"]), max_size=12))
def test_spans_equal_seqevals_own(tags: list[str]) -> None:
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling", reason="the package 'seqeval' is not installed")
    assert extract_spans(tags) == [(kind, start, stop + 1) for kind, start, stop in labeling.get_entities(tags)]


def test_words_of_a_raw_text() -> None:
    text = "Boeing Co. won't sell Tulsa's 747-400 unit (yet)."
    assert [text[start:stop] for start, stop in find_words(text)] == [
        "Boeing", "Co", ".", "wo", "n't", "sell", "Tulsa", "'s", "747-400", "unit", "(", "yet", ")", "."
    ]  # fmt: skip


def test_a_pass_holds_every_row_once_and_the_next_another_order() -> None:
    examples = made("classification", 21)
    batches = TrainingBatches(examples, 4, OWN.pad_token_id, seed=3, collate_fn=collate)
    passes = [[batch.tokens for batch in batches] for _ in range(2)]
    for rows in passes:
        assert len(rows) == len(batches) == 6
        assert sum(len(part) for part in rows) == 21
        texts = sorted(tuple(row[row != OWN.pad_token_id].tolist()) for part in rows for row in part)
        assert texts == sorted(tuple(one.windows[0].ids.tolist()) for one in examples)
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(*passes, strict=True))


def test_a_position_is_gone_on_from() -> None:
    examples = made("tagging", 21)
    whole = TrainingBatches(examples, 4, OWN.pad_token_id, seed=3, collate_fn=collate)
    wanted = [batch.tokens.tolist() for _ in range(3) for batch in whole]
    for stop in (0, 1, 5, 6, 7, 13):
        first, taken = TrainingBatches(examples, 4, OWN.pad_token_id, seed=3, collate_fn=collate), []
        while len(taken) < stop:
            for batch in first:
                taken.append(batch.tokens.tolist())
                if len(taken) == stop:
                    break
        second = TrainingBatches(examples, 4, OWN.pad_token_id, seed=3, collate_fn=collate)
        second.load_state_dict(first.state_dict())
        while len(taken) < len(wanted):
            taken += [batch.tokens.tolist() for batch in second]
        assert taken == wanted
    with pytest.raises(CheckpointError, match="belongs to seed 4"):
        second.load_state_dict(first.state_dict() | {"seed": 4})


def test_ranks_share_the_rows() -> None:
    examples = made("classification", 21)
    for world in (2, 5):
        parts = [
            TrainingBatches(examples, 2, OWN.pad_token_id, 0, rank, world, collate_fn=collate) for rank in range(world)
        ]
        counts = {len(list(part)) for part in parts}
        assert counts == {len(parts[0])}
    seen = [one for rank in range(2) for batch in EvaluationBatches(examples, task("classification"), 4, 0, rank, 2)
            for one in batch.batch_examples.examples]  # fmt: skip
    assert len(seen) == 21


@settings(max_examples=60)
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 6)), min_size=1, max_size=4),
)
def test_what_is_left_of_a_pass_is_dealt_to_other_ranks(count: int, stages: list[tuple[int, int, int]]) -> None:
    numbered = [SimpleNamespace(windows=[SimpleNamespace(ids=[place] * (1 + place % 5))]) for place in range(count)]
    seen: list[int] = []
    state: dict[str, Any] = {}
    rows = ranks = 1
    for rows, ranks, steps in [*stages, (*stages[-1][:2], count)]:
        parts: list[Any] = [
            TrainingBatches(
                numbered, rows, 0, 3, rank, ranks, collate_fn=lambda chosen, _: [one.ids[0] for one in chosen]
            )
            for rank in range(ranks)
        ]
        for part in parts if state else ():
            part.load_state_dict(state)
        if count < rows * ranks:
            return  # A batch for each rank there is not: all have one.
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
    # What makes no batch for every rank.
    assert count - len(seen) <= (ranks - 1) * rows


def test_labels_are_ignored_where_nothing_is_to_be_learned() -> None:
    for batch in EvaluationBatches(made("tagging"), task("tagging"), 4, OWN.pad_token_id):
        assert (batch.labels[batch.attention_mask == 0] == IGNORE_INDEX).all()
        assert (batch.labels[:, 0] == IGNORE_INDEX).all()

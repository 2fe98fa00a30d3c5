from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.errors import MemtxError
from memtx.metrics import AnswerExactMatch, AnswerF1, BitsPerByte, SpanF1, WordPerplexity


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 10_000)), min_size=1, max_size=10))
def test_sums_are_divided_once(batches: list[tuple[float, int]]) -> None:
    bits, words = BitsPerByte(), WordPerplexity()
    for nll, units in batches:
        bits.update(nll, units)
        words.update(torch.tensor(nll, dtype=torch.float64), torch.tensor(units))
    mean = sum(nll for nll, _ in batches) / sum(units for _, units in batches)
    assert bits.compute().item() == pytest.approx(mean / math.log(2), rel=1e-12)
    assert words.compute().item() == pytest.approx(float(torch.tensor(mean, dtype=torch.float64).exp()), rel=1e-9)


def test_uniform_byte_model_needs_eight_bits() -> None:
    metric = BitsPerByte()
    metric.update(torch.full((4, 25), math.log(256)), 100)
    # The logarithm was rounded to float32.
    assert metric.compute().item() == pytest.approx(8, rel=1e-6)


def test_small_batches_still_count_after_large_ones() -> None:
    metric = BitsPerByte()
    metric.update(1e9, 1)
    for _ in range(100):
        metric.update(1.0, 0)
    # A float32 sum would not have moved.
    assert metric.nll.item() == 1e9 + 100


def test_sums_stay_float64_when_the_model_is_cast() -> None:
    for cast in (lambda x: x.half(), lambda x: x.to(torch.bfloat16), lambda x: torch.nn.ModuleList([x]).half()[0]):
        metric = BitsPerByte()
        metric.update(123456.789, 1)
        assert cast(metric).nll.dtype == torch.float64
        assert metric.nll.item() == 123456.789


def test_sums_reduce_over_processes_and_reset() -> None:
    metric = WordPerplexity()
    assert set(metric._reductions) == {"nll", "units"}
    assert all(reduce(torch.tensor([1.0, 2.0])) == 3 for reduce in metric._reductions.values())
    metric.update(2.0, 2)
    assert metric.compute().item() == pytest.approx(math.e)
    metric.reset()
    assert (metric.nll.item(), metric.units.item()) == (0, 0)


@pytest.mark.parametrize(
    ("nll", "units", "message"), [(math.nan, 1, "finite"), (math.inf, 1, "finite"), (1.0, -1, "at least 0")]
)
def test_invalid_values_are_refused_and_not_counted(nll: float, units: int, message: str) -> None:
    metric = BitsPerByte()
    with pytest.raises(MemtxError, match=message):
        metric.update(nll, units)
    assert (metric.nll.item(), metric.units.item()) == (0, 0)


@pytest.mark.filterwarnings("ignore:The ``compute``")
def test_text_without_words_gives_nan() -> None:
    metric = WordPerplexity()
    assert math.isnan(metric.compute().item())
    metric.update(3.0, 0)
    assert metric.compute().item() == math.inf


def test_span_f1_is_the_micro_average_of_whole_spans() -> None:
    metric = SpanF1()
    metric.update([("A", 0, 2), ("B", 3, 4)], [("A", 0, 2), ("B", 3, 5), ("A", 6, 7)])
    metric.update([], [("A", 0, 1)])
    assert float(metric.compute()) == pytest.approx(2 * 1 / (2 + 4))
    empty = SpanF1()
    empty.update([], [])
    assert float(empty.compute()) == 0.0


@pytest.mark.parametrize(
    ("prediction", "targets", "exact", "f1"),
    [
        ("The  Whale!", ["a whale"], 1, 1),
        ("white whale", ["the whale", "a white sea"], 0, 2 / 3),
        ("", [], 1, 1),
        ("whale", [], 0, 0),
        ("", ["whale"], 0, 0),
        ("whale whale", ["whale"], 0, 2 / 3),
        ("", ["the", "whale"], 0, 0),
    ],
)
def test_answers_are_scored_as_squad_does(prediction: str, targets: list[str], exact: float, f1: float) -> None:
    for metric_class, score in ((AnswerExactMatch, exact), (AnswerF1, f1)):
        metric = metric_class()
        metric.update(prediction, targets)
        assert float(metric.compute()) == pytest.approx(score)

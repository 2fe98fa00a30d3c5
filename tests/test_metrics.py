from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.errors import MemtxError
from memtx.inference.reader import Totals
from memtx.metrics import AnswerExactMatch, AnswerF1, BitsPerByte, SpanF1, WordPerplexity
from memtx.word_measure import MAX_WORD_PERPLEXITY


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 10_000)), min_size=1, max_size=10))
def test_sums_are_divided_once(batches: list[tuple[float, int]]) -> None:
    bits, words = BitsPerByte(), WordPerplexity()
    for nll, units in batches:
        bits.update(nll, units)
        words.update(torch.tensor(nll, dtype=torch.float64), torch.tensor(units))
    mean = sum(nll for nll, _ in batches) / sum(units for _, units in batches)
    assert bits.compute().item() == pytest.approx(mean / math.log(2), rel=1e-12)
    perplexity = float(torch.tensor(mean, dtype=torch.float64).exp())
    expected = perplexity if perplexity <= MAX_WORD_PERPLEXITY else math.nan
    assert words.compute().item() == pytest.approx(expected, rel=1e-9, nan_ok=True)


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
    assert set(metric._reductions) == {"nll", "units", "num_bytes"}
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
    assert math.isnan(metric.compute().item())


@pytest.mark.parametrize(
    ("text", "has_words"),
    [
        ("It was the best of times, it was the worst of times.", True),
        ("Das Rindfleischetikettierungsueberwachungsaufgabenuebertragungsgesetz gilt.", True),
        ("\u0b85\u0bb5\u0bb0\u0bcd\u0b95\u0bb3\u0bc1\u0b95\u0bcd\u0b95\u0bc1 \u0b87\u0ba4\u0bc1", True),
        ("\u6211\u4eec\u5728\u8bfb\u4e66\uff0c\u4ed6\u4eec\u5728\u5199\u5b57\u3002" * 9, False),
        ("\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22\u0e40\u0e1b\u0e47\u0e19\u0e20\u0e32\u0e29\u0e32", False),
    ],
)
def test_word_perplexity_is_left_out_where_whitespace_separates_no_words(text: str, has_words: bool) -> None:
    metric = WordPerplexity()
    metric.update(9.0, len(text.split()), len(text.encode()))
    assert math.isnan(metric.compute().item()) != has_words
    totals = replace(Totals().with_text(text), nll=9.0)
    assert math.isnan(totals.word_perplexity) != has_words
    assert totals.bits_per_character == pytest.approx(9.0 / math.log(2) / len(text))


def test_word_perplexity_of_an_untrained_model_is_left_out() -> None:
    metric = WordPerplexity()
    metric.update(30.0, 1, 6)
    assert math.isnan(metric.compute().item())
    assert math.isnan(Totals(nll=30.0, num_words=1, num_bytes=6).word_perplexity)


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

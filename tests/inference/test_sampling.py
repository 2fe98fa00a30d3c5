from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.errors import MemtxError
from memtx.inference.sampling import (
    SamplingParams,
    apply_repetition_penalty,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample_token,
)

NO_TOKENS = torch.empty(0, dtype=torch.int64)
LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


def remaining_tokens(logits: torch.Tensor) -> list[int]:
    return logits.isfinite().nonzero().flatten().tolist()


def test_top_k_keeps_the_largest_logits() -> None:
    assert remaining_tokens(keep_top_k(LOGITS, 2)) == [1, 2]
    assert remaining_tokens(keep_top_k(LOGITS, 0)) == remaining_tokens(keep_top_k(LOGITS, 9)) == [0, 1, 2, 3]
    # Exactly k, even among equals.
    assert remaining_tokens(keep_top_k(torch.zeros(5), 2)) == [0, 1]


def test_top_p_keeps_the_fewest_tokens_that_reach_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]]
    assert remaining_tokens(keep_top_p(logits, 0.45)) == [1]
    assert remaining_tokens(keep_top_p(logits, 0.6)) == [1, 3]
    assert remaining_tokens(keep_top_p(logits, 0.85)) == [0, 1, 3]
    assert remaining_tokens(keep_top_p(logits, 1e-9)) == [1]
    assert torch.equal(keep_top_p(logits, 1.0), logits)


def test_min_p_is_relative_to_the_highest_probability() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert remaining_tokens(keep_min_p(logits, 0.5)) == [0, 1]
    assert remaining_tokens(keep_min_p(logits, 1.0)) == [0]
    assert remaining_tokens(keep_min_p(logits, 0.0)) == [0, 1, 2, 3]


def test_repetition_penalty_lowers_positive_and_negative_logits() -> None:
    penalized = apply_repetition_penalty(LOGITS, torch.tensor([1, 3]), 2.0)
    assert penalized.tolist() == [1.0, 1.5, 2.0, -2.0]
    assert LOGITS.tolist() == [1.0, 3.0, 2.0, -1.0]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=20),
    st.floats(0, 5),
    st.integers(0, 25),
    st.floats(0.001, 1),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_sampled_token_passes_every_filter(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = torch.tensor(values)
    params = SamplingParams(temperature, top_k, top_p, min_p)
    token = sample_token(logits, params, NO_TOKENS, torch.Generator().manual_seed(seed))
    assert 0 <= token < len(values)
    if temperature == 0 or top_k == 1:
        assert logits[token] == logits.max()
    elif top_k:
        assert int((logits > logits[token]).sum()) < top_k


def test_samples_follow_the_probabilities() -> None:
    generator, logits = torch.Generator().manual_seed(0), torch.tensor([0.7, 0.2, 0.1]).log()
    samples = [sample_token(logits, SamplingParams(), NO_TOKENS, generator) for _ in range(3000)]
    # Three standard deviations of a frequency over 3000 samples are below 0.026.
    for token, probability in enumerate((0.7, 0.2, 0.1)):
        # Three standard deviations of a frequency over 3000 samples are below 0.026.
        assert abs(samples.count(token) / 3000 - probability) < 0.03


def test_excluded_tokens_are_never_sampled() -> None:
    logits = torch.tensor([-math.inf, 0.0, 50.0])
    generator = torch.Generator().manual_seed(0)
    assert 0 not in [sample_token(logits, SamplingParams(temperature=100.0), NO_TOKENS, generator) for _ in range(300)]


@pytest.mark.parametrize(
    "invalid",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_values_out_of_range_are_refused(invalid: dict[str, float]) -> None:
    with pytest.raises(MemtxError, match=f"{next(iter(invalid))} is .*expected"):
        SamplingParams(**invalid)  # type: ignore[arg-type]


def test_non_finite_logits_are_refused() -> None:
    with pytest.raises(MemtxError, match="not finite"):
        sample_token(torch.tensor([0.0, math.nan]), SamplingParams(), NO_TOKENS, torch.Generator())

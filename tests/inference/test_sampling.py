"""Sampling of many texts at once: equal to transformers' processors, and to each text alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from memtx.errors import MemtxError
from memtx.inference.generate import GenerationConfig
from memtx.inference.sampling import SampledToken, SamplingParams, SamplingRow, TokenCounts, sample_batch
from memtx.inference.truncated_sampling import top_k

RECORDED = json.loads((Path(__file__).parent / "recorded" / "filters.json").read_text())
NUM_DRAWS = 4000


def to_params(values: dict[str, Any]) -> SamplingParams:
    bias = {int(token): bias for token, bias in values.get("logit_bias", {}).items()}
    return SamplingParams(**{**values, "logit_bias": bias})


def sample(logits: torch.Tensor, params: SamplingParams, seed: int = 0, **options: Any) -> int:
    row = SamplingRow(params, Random(seed), **options)
    (token,) = sample_batch(logits[None], [row], len(logits))
    assert isinstance(token, SampledToken)
    return token.token


def frequencies(logits: torch.Tensor, params: SamplingParams, counts: TokenCounts) -> list[float]:
    batch = [SamplingRow(params, Random(seed), counts) for seed in range(NUM_DRAWS)]
    tokens = sample_batch(logits.expand(NUM_DRAWS, -1), batch, len(logits))
    counter = Counter(token.token for token in tokens if isinstance(token, SampledToken))
    return [counter[token] / NUM_DRAWS for token in range(len(logits))]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: "-".join(case["settings"]))
@pytest.mark.parametrize("width", [0, 3000])
def test_samples_follow_the_distribution_of_transformers(case: dict[str, Any], width: int) -> None:
    # Behind the recorded ids, with which a search by blocks begins at larger vocabularies, no id is possible.
    logits = torch.cat([torch.tensor(case["logits"]), torch.full((width,), -60.0)])
    actual = frequencies(logits, to_params(case["settings"]), TokenCounts(case["ids"]))
    for token, probability in enumerate(case["probabilities"]):
        assert probability > 0 or actual[token] == 0, token
        # Five standard deviations of a frequency; seeds are fixed.
        assert abs(actual[token] - probability) <= 5 * math.sqrt(probability * (1 - probability) / NUM_DRAWS), token


def test_penalties_of_the_text_are_openais() -> None:
    # mu[j] - c[j] * frequency - (c[j] > 0) * presence; ids of the prompt alone do not count.
    logits = torch.tensor([1.0, 0.9, 0.8, 0.7])
    counts = TokenCounts([0, 1])
    assert sample(logits, SamplingParams(greedy=True, presence_penalty=2.0), counts=counts) == 0
    counts.add(0)
    assert sample(logits, SamplingParams(greedy=True, presence_penalty=0.15), counts=counts) == 1
    assert sample(logits, SamplingParams(greedy=True, frequency_penalty=0.15), counts=counts) == 1
    counts.add(1)
    counts.add(1)
    assert sample(logits, SamplingParams(greedy=True, presence_penalty=0.15), counts=counts) == 0
    assert sample(logits, SamplingParams(greedy=True, frequency_penalty=0.15), counts=counts) == 0
    assert sample(logits, SamplingParams(greedy=True, frequency_penalty=-0.5), counts=counts) == 1
    for token in range(200):  # more than there is room for at first
        counts.add(token)
    ids, occurrences = counts.arrays()
    assert dict(zip(ids.tolist(), occurrences.tolist(), strict=True)) == {0: 2, 1: 3} | dict.fromkeys(range(2, 200), 1)


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-40, 0.5, 1.0, 100.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 400, 10**6]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    greedy=st.booleans(),
    typical_p=st.sampled_from([1e-9, 0.4, 0.95, 1.0, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.3]),
    logit_bias=st.sampled_from([{}, {0: 4.0, 5: -100.0}]),
)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(params_strategy, st.none() | st.integers(0, 5), st.booleans()), min_size=1, max_size=9),
    st.sampled_from([1, 7, 128, 2100]),
    st.sampled_from([0.0, 1.0, 8.0]),
    st.integers(0, 99),
)
def test_a_row_gives_the_same_alone_and_in_a_batch(
    choices: list[tuple[SamplingParams, int | None, bool]], vocab_size: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(len(choices), vocab_size + 5, generator=generator) * scale).bfloat16()  # with many equal ones
    before = logits.clone()

    def to_row(index: int) -> SamplingRow:
        params, num_logprobs, has_excluded = choices[index]
        counts = TokenCounts([1, 2, vocab_size])
        counts.add(0)
        excluded = {1, vocab_size + 3} if has_excluded and vocab_size > 1 else set()
        return SamplingRow(params, Random(seed + index), counts, excluded, num_logprobs)

    together = sample_batch(logits, [to_row(index) for index in range(len(choices))], vocab_size)
    assert torch.equal(logits, before)
    for index, (params, num_logprobs, has_excluded) in enumerate(choices):
        (alone,) = sample_batch(logits[index : index + 1], [to_row(index)], vocab_size)
        sampled = together[index]
        assert isinstance(alone, SampledToken)
        assert isinstance(sampled, SampledToken)
        assert sampled.token == alone.token
        allowed = [token for token in range(vocab_size) if not (has_excluded and token == 1 < vocab_size)]
        assert sampled.token in allowed
        if num_logprobs is not None:
            expected = logits[index].float().log_softmax(0)
            assert sampled.logprob == pytest.approx(float(expected[sampled.token]), abs=1e-4)  # float32 sums
            assert sampled.top_logprobs == alone.top_logprobs
            best = sorted((float(expected[token]) for token in allowed), reverse=True)[:num_logprobs]
            assert [value for _, value in sampled.top_logprobs] == pytest.approx(best, abs=1e-4)  # float32 sums
        has_penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
        if params.is_greedy and not params.logit_bias and not has_penalties:
            assert logits[index, sampled.token] == logits[index, allowed].max()


class HostReadCounter(TorchFunctionMode):
    """Counts calls for which the host waits for a GPU."""

    READS = (
        Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.nonzero, Tensor.masked_select, torch.nonzero,
        Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.unique, torch.unique,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        has_mask = func in (Tensor.__getitem__, Tensor.__setitem__) and getattr(args[1], "dtype", None) == torch.bool
        self.count += func in self.READS or has_mask
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("values", "num_logprobs", "max_reads"),
    [
        ({"greedy": True}, None, 1),
        ({}, None, 2),
        ({"top_k": 40, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "presence_penalty": 1.0}, None, 2),
        # A round is repeated for the rows whose token was rejected: with probability 0.1, so that all of 64 rows
        # accept within 5 rounds but once in 1,600 times.
        ({"top_p": 0.9, "logit_bias": {1: 2.0}}, None, 6),
        ({"typical_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}, None, 6),
        ({}, 5, 5),
    ],
)
def test_the_host_waits_for_the_device_as_often_for_many_texts(
    values: dict[str, Any], num_logprobs: int | None, max_reads: int
) -> None:
    logits = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    batch = [
        SamplingRow(to_params(values), Random(seed), TokenCounts([seed, 7]), {3}, num_logprobs) for seed in range(64)
    ]
    with HostReadCounter() as counter:
        sample_batch(logits, batch, 4000)
    assert 1 <= counter.count <= max_reads


@given(st.integers(1, 60), st.sampled_from([64, 1000, 4096]), st.integers(0, 99))
def test_top_k_finds_the_largest(k: int, length: int, seed: int) -> None:
    scores = torch.randn(3, length, generator=torch.Generator().manual_seed(seed))
    values, indices = top_k(scores, k)
    assert torch.equal(values, scores.topk(k, 1).values)
    assert torch.equal(scores.gather(1, indices), values)


def test_tokens_as_likely_as_the_last_of_top_k_are_kept() -> None:
    logits = torch.tensor([1.0, 1.0, 1.0, 0.0, 3.0])
    assert {sample(logits, SamplingParams(top_k=2), seed) for seed in range(200)} == {0, 1, 2, 4}


def test_excluded_and_padded_tokens_are_never_sampled() -> None:
    logits = torch.tensor([90.0, 0.0, 50.0, 99.0])
    batch = [SamplingRow(SamplingParams(temperature=100.0), Random(seed), excluded={0, 3}) for seed in range(300)]
    sampled = sample_batch(logits.expand(300, -1), batch, 3)
    assert {token.token for token in sampled if isinstance(token, SampledToken)} == {1, 2}


def test_only_the_row_whose_logits_are_not_finite_fails() -> None:
    logits = torch.zeros(4, 5)
    logits[1, 2], logits[2, 0], logits[3] = math.nan, math.inf, -math.inf
    for params in (SamplingParams(greedy=True), SamplingParams(top_k=2), SamplingParams(top_p=0.5)):
        sampled = sample_batch(logits, [SamplingRow(params, Random(0), num_logprobs=2)] * 4, 5)
        assert isinstance(sampled[0], SampledToken)
        assert all(isinstance(token, MemtxError) and "not finite" in str(token) for token in sampled[1:])


@pytest.mark.parametrize(
    "invalid",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"typical_p": 0.0},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -3.0},
        {"logit_bias": {1: math.inf}},
    ],
)
def test_values_out_of_range_are_refused(invalid: dict[str, Any]) -> None:
    with pytest.raises(MemtxError, match=f"{next(iter(invalid))} is .*expected"):
        SamplingParams(**invalid)
    with pytest.raises(MemtxError, match="seed is"):
        GenerationConfig(seed=2**64)

"""Every attention backend matches the float64 reference: outputs and all gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtx.ops.attention import banded, flex, reference
from memtx.ops.attention.bias import AlibiBias, RelativeBias, ScoreBias
from memtx.ops.attention.dispatch import AttentionBackend, segment_attention
from memtx.ops.attention.mask import KeyRange, SparsePattern, Visibility
from memtx.ops.attention.reference import merge_attention
from tests.ops.attention.strategies import Problem, problems

Solution = tuple[Tensor, ...]
Attend = Callable[..., tuple[Tensor, Tensor | None]]

LSE_BACKENDS: tuple[AttentionBackend, ...] = ("reference", "banded")


def select_entry(x: Tensor, index: int) -> Tensor:
    """Return entry ``index`` of the first dimension, which may be broadcast."""
    return x[index if x.shape[0] > 1 else 0]


def count_key(visibility: Visibility, batch: int, head: int, query: int, key: int) -> int:
    """Return how often a key counts for a query, by the docstrings of Visibility and SparsePattern."""
    start, end = (select_entry(x, batch)[key] for x in (visibility.visible_from, visibility.visible_until))
    in_interval = int(start <= query < end)
    pattern = visibility.pattern
    if pattern is None:
        return in_interval
    start, end = (select_entry(x, batch)[key] for x in (pattern.document_start, pattern.document_end))
    in_document = bool(start <= query < end)
    if pattern.global_queries is not None and query in select_entry(pattern.global_queries, batch).tolist():
        return max(in_interval, int(in_document))
    if not in_document or pattern.random_blocks is None or key < pattern.first_key:
        return in_interval
    blocks = select_entry(pattern.random_blocks, head)[query // pattern.block_size].tolist()
    count = in_interval + blocks.count((key - pattern.first_key) // pattern.block_size)
    return count if pattern.count_duplicates else min(count, 1)


def bias_of_pair(bias: ScoreBias, batch: int, head: int, query: int, key: int) -> float:
    distance = query - float(select_entry(bias.key_offset, batch)[key])
    if isinstance(bias, AlibiBias):
        return -float(bias.slopes[head]) * distance
    column = math.floor(distance) - bias.min_distance
    if bias.buckets is None:
        return float(bias.table[head, min(max(column, 0), bias.table.shape[1] - 1)])
    return float(bias.table[head, bias.buckets[min(max(column, 0), len(bias.buckets) - 1)]])


def naive_attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """Compute one query at a time in plain Python, to test the reference itself."""
    q, k, v, visibility = problem.q, problem.k, problem.v, problem.visibility
    group = q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), dtype=q.dtype)
    for batch, head, query in itertools.product(*map(range, q.shape[:3])):
        counts = [count_key(visibility, batch, head, query, key) for key in range(visibility.num_keys)]
        keys = [key for key, count in enumerate(counts) for _ in range(count)]
        if not keys:
            continue
        scores = [float(q[batch, head, query] @ k[batch, head // group, key]) / math.sqrt(q.shape[-1]) for key in keys]
        if problem.bias is not None:
            biases = [bias_of_pair(problem.bias, batch, head, query, key) for key in keys]
            scores = [score + bias for score, bias in zip(scores, biases, strict=True)]
        key_scores = torch.tensor(scores, dtype=torch.float64)
        lse[batch, head, query] = key_scores.logsumexp(0)
        out[batch, head, query] = torch.softmax(key_scores, 0) @ v[batch, head // group, keys]
    return out, lse


def solve(attend: Attend, problem: Problem, dtype: torch.dtype) -> Solution:
    """Return output, log-sum-exp and all gradients of a loss that weights every element of both differently."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v))
    inputs, bias = [q, k, v], problem.bias
    if isinstance(bias, RelativeBias):
        bias = replace(bias, table=bias.table.clone().requires_grad_())
        inputs.append(bias.table)
    out, lse = attend(q, k, v, problem.visibility, bias=bias, scale=q.shape[-1] ** -0.5)
    assert lse is not None
    loss = torch.zeros((), dtype=torch.float64)
    lse = lse.masked_fill(lse == float("-inf"), -50.0)
    for output in (out, lse):
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
        loss = loss + (output.double() * weights).sum()
    # If all queries are fully masked, the gradient of a table may be missing; it counts as 0.
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    filled = (torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True))
    return out.detach(), lse.detach(), *filled


def banded_in_blocks(problem: Problem) -> Attend:
    return lambda *args, **options: banded.attend(*args, **options, block_size=problem.block_size)


def max_error(solution: Solution, expected: Solution) -> float:
    """Return the largest difference, relative to the largest element of its tensor (at least 1)."""
    return max(
        float((x.double() - y).abs().max() / max(1.0, float(y.abs().max())))
        for x, y in zip(solution, expected, strict=True)
        if y.numel()
    )


def check_compiled_gradients(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, backend: AttentionBackend
) -> None:
    """Assert that a backend compiles without a graph break, to the same gradients."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return segment_attention(q, k, v, visibility, backend=backend)[0].square()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected_grads = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
    grads = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert torch.equal(grad, expected)


def causal_window(queries: int, batch_size: int = 1, window: int = 8) -> Visibility:
    offset = torch.arange(queries).expand(batch_size, -1)
    return Visibility(offset, offset + window, queries, (KeyRange(queries, 0, 1, window),))


@pytest.mark.parametrize("patterns", [False, True])
def test_reference_matches_the_formula(patterns: bool) -> None:
    @given(problems(max_queries=12, patterns=patterns))
    @settings(deadline=None, max_examples=20)
    def check(problem: Problem) -> None:
        out, lse = reference.attend(
            problem.q, problem.k, problem.v, problem.visibility, bias=problem.bias, scale=problem.q.shape[-1] ** -0.5
        )
        expected, expected_lse = naive_attention(problem)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)

    check()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-10),
        (torch.float32, 1e-5),
        # Inputs are rounded to 8 bits (2^-9 relative each), weights and gradients again, and the gradients of keys and
        # values once more for each of up to 70 blocks (of one query) that they are summed over.
        (torch.bfloat16, 1e-1),
        (torch.float16, 2e-2),
    ],
)
def test_banded_matches_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    @given(problems())
    @settings(deadline=None, max_examples=200)
    def check(problem: Problem) -> None:
        expected = solve(reference.attend, problem, torch.float64)
        assert max_error(solve(banded_in_blocks(problem), problem, dtype), expected) <= tolerance

    check()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_banded_with_a_pattern_matches_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    @given(problems(patterns=True))
    @settings(deadline=None, max_examples=40)
    def check(problem: Problem) -> None:
        expected = solve(reference.attend, problem, torch.float64)
        assert max_error(solve(banded_in_blocks(problem), problem, dtype), expected) <= tolerance

    check()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 1e-1)])
def test_unfused_blocks_match_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    """Runs the path for a learned bias, and for the log-sum-exp on other devices, on the CPU."""

    @given(problems(max_queries=30))
    @settings(deadline=None, max_examples=20)
    def check(problem: Problem) -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, **options: Any) -> tuple[Tensor, Tensor]:
            return banded.attend_unfused(q, k, v, visibility, **options, block_size=problem.block_size)

        expected = solve(reference.attend, problem, torch.float64)
        assert max_error(solve(attend, problem, dtype), expected) <= tolerance

    check()


@given(problems(max_queries=30, biases=("none", "linear")))
@settings(deadline=None, max_examples=20)
def test_sdpa_blocks_match_the_reference(problem: Problem) -> None:
    """Runs the path for other devices on the CPU; it returns no log-sum-exp, so the reference's is used."""

    def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, **options: Any) -> tuple[Tensor, Tensor]:
        out = banded.attend_sdpa(q, k, v, visibility, **options, block_size=problem.block_size)
        return out, reference.attend(q, k, v, visibility, **options)[1]

    expected = solve(reference.attend, problem, torch.float64)
    assert max_error(solve(attend, problem, torch.float64), expected) <= 1e-10


@given(problems(max_queries=12, biases=("none", "linear")))
@settings(deadline=None, max_examples=5)
def test_flex_matches_the_reference(problem: Problem) -> None:
    """Forward only: torch has no backward of flex_attention on the CPU, and dispatch rejects it."""
    scale = problem.q.shape[-1] ** -0.5
    expected, _ = reference.attend(problem.q, problem.k, problem.v, problem.visibility, bias=problem.bias, scale=scale)
    out, _ = flex.attend(
        problem.q.float(), problem.k.float(), problem.v.float(), problem.visibility, bias=problem.bias, scale=scale
    )
    assert max_error((out,), (expected,)) <= 1e-5


@given(problems(), st.integers(0, 200))
@settings(deadline=None, max_examples=20)
def test_attention_over_two_parts_merges_to_attention_over_all_keys(problem: Problem, split: int) -> None:
    """Values and gradients, for every backend that has both."""
    split = min(split, problem.visibility.num_keys)

    def slice_keys(visibility: Visibility, low: int, high: int) -> Visibility:
        start, end = visibility.visible_from[:, low:high], visibility.visible_until[:, low:high]
        return Visibility(start, end, visibility.num_queries, (KeyRange(high - low),))

    def attend(
        q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, bias: Any, scale: float
    ) -> tuple[Tensor, Tensor]:
        parts = []
        for low, high in ((0, split), (split, visibility.num_keys)):
            part_bias = replace(bias, key_offset=bias.key_offset[:, low:high]) if bias is not None else None
            out, lse = segment_attention(
                q, k[:, :, low:high], v[:, :, low:high], slice_keys(visibility, low, high),
                bias=part_bias, scale=scale, backend=backend, return_lse=True,
            )  # fmt: skip
            assert lse is not None
            parts.append((out, lse))
        return merge_attention(parts)

    expected = solve(reference.attend, problem, torch.float64)
    for backend in LSE_BACKENDS:  # noqa: B007 - read by the function above
        assert max_error(solve(attend, problem, torch.float64), expected) <= 1e-10


def test_lse_is_returned_only_on_request() -> None:
    for backend in ("auto", "reference", "banded"):
        assert segment_attention(Q, Q, Q, VISIBILITY, backend=backend)[1] is None
        lse = segment_attention(Q, Q, Q, VISIBILITY, backend=backend, return_lse=True)[1]
        assert lse is not None
        assert lse.shape == Q.shape[:3]


def test_autocast_gives_bfloat16_outputs_and_float32_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 20, 16, requires_grad=True)
    weight = torch.randn(16, 16, requires_grad=True)

    def run() -> Tensor:
        q = (x @ weight).unflatten(-1, (2, 8)).transpose(1, 2)
        return segment_attention(q, q, q, causal_window(20, 2), backend="banded")[0]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        out = run()
    assert out.dtype == torch.bfloat16
    # bfloat16 has 8 bits; scores reach about 20, so a weight is off by at most e^(20 * 2^-8) - 1 = 8%.
    assert float((out - expected).detach().abs().max()) <= 0.15 * float(expected.detach().abs().max())
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert bool(weight.grad.isfinite().all())


def test_cached_masks_of_a_freed_bias_are_not_reused() -> None:
    """A bias may get the address of a freed one, but not its masks."""
    torch.manual_seed(0)
    q = torch.randn(1, 2, 10, 8, dtype=torch.float64)
    visibility = causal_window(10)
    for slope in (0.1, 1.0, 3.0):
        bias = AlibiBias(torch.full((2,), slope, dtype=torch.float64), visibility.visible_from.double())
        out, _ = segment_attention(q, q, q, visibility, bias=bias, backend="banded")
        expected, _ = segment_attention(q, q, q, visibility, bias=bias, backend="reference")
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        del bias


def test_layers_share_cached_masks() -> None:
    q, visibility = torch.randn(1, 2, 10, 8), causal_window(10)
    bias = AlibiBias(torch.ones(2), visibility.visible_from.double())
    for _ in range(3):
        segment_attention(q, q, q, visibility, bias=bias, backend="banded")
    assert len(visibility._values) == 1


@pytest.mark.parametrize("backend", ["reference", "banded", "auto"])
@pytest.mark.parametrize("has_pattern", [False, True])
def test_dropout_drops_and_rescales_weights(backend: AttentionBackend, has_pattern: bool) -> None:
    torch.manual_seed(0)
    keys, rate = 300, 0.25
    visibility = causal_window(keys)
    if has_pattern:
        start = torch.zeros(1, keys, dtype=torch.int64)
        blocks = torch.tensor([[[3, 0]] * -(-keys // 64)])
        pattern = SparsePattern(start, start + keys, global_queries=torch.tensor([[5, 77]]), random_blocks=blocks)
        visibility = replace(visibility, pattern=pattern, _values={})
    q = torch.randn(1, 1, keys, keys, dtype=torch.float64) / 4
    # With unit vectors as values the output is the weights.
    v = torch.eye(keys, dtype=torch.float64)[None, None]
    weights, _ = segment_attention(q, q, v, visibility, backend="reference")
    with_dropout, _ = segment_attention(q, q, v, visibility, backend=backend, dropout=rate)
    dropped = (with_dropout == 0) & (weights > 0)
    torch.testing.assert_close(with_dropout, weights.masked_fill(dropped, 0.0) / (1 - rate), rtol=1e-12, atol=1e-14)
    # A fraction of at least 45,000 samples: five standard errors are 0.0102.
    assert float(dropped.sum() / (weights > 0).sum()) == pytest.approx(rate, abs=0.0103)


Q, VISIBILITY = torch.randn(2, 4, 10, 8), causal_window(10)


@pytest.mark.parametrize("backend", ["auto", "reference", "banded"])
def test_learned_slopes_get_a_gradient(backend: AttentionBackend) -> None:
    slopes = torch.ones(4, requires_grad=True)
    bias = AlibiBias(slopes, VISIBILITY.visible_from.double())
    segment_attention(Q, Q, Q, VISIBILITY, bias=bias, backend=backend)[0].sum().backward()
    assert slopes.grad is not None
    assert float(slopes.grad.abs().min()) > 0


def test_log_sum_exp_alone_has_a_gradient() -> None:
    """The output's gradient is then None, not zeros."""
    q = Q.double().requires_grad_()
    grads = []
    for backend in LSE_BACKENDS:
        lse = segment_attention(q, q, q, VISIBILITY, backend=backend, return_lse=True)[1]
        assert lse is not None
        grads.append(torch.autograd.grad(lse.sum(), q)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-10)


def test_cost_is_linear_in_length() -> None:
    """Pairs in fused calls grow with the number of queries, not with its square."""

    def count_pairs(queries: int) -> int:
        blocks = banded.split_queries(causal_window(queries), 16)
        return sum((stop - start) * (high - low) for start, stop, key_ranges in blocks for low, high in key_ranges)

    # Four times the queries; quadratic cost would be sixteen times as much.
    assert count_pairs(400) < 4.5 * count_pairs(100)

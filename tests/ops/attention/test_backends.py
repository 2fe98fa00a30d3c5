"""Every attention backend computes what the float64 reference computes: outputs and all gradients."""

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
from torch._subclasses.fake_tensor import FakeTensorMode

from memtx.errors import MemtxError
from memtx.ops.attention import banded, block_plan, blocks, checks, dispatch, flex, reference
from memtx.ops.attention.bias import AlibiBias, RelativeBias, ScoreBias
from memtx.ops.attention.combine import merge_attention
from memtx.ops.attention.dispatch import AttentionBackend, segment_attention
from memtx.ops.attention.mask import KeyRange, SparsePattern, Visibility
from tests.ops.attention.strategies import Problem, problems

Answer = tuple[Tensor, ...]
Attend = Callable[..., tuple[Tensor, Tensor | None]]


def times(visibility: Visibility, row: int, head: int, t: int, j: int) -> int:
    """How often key j counts for the query at tick t, as the docstrings of Visibility and SparsePattern say it."""

    def of(x: Tensor, index: int, *rest: int) -> int:
        return int(x[(index if x.shape[0] > 1 else 0, *rest)])

    alive = int(of(visibility.visible_from, row, j) <= t < of(visibility.visible_until, row, j))
    beside = visibility.pattern
    if beside is None:
        return alive
    within = of(beside.document_start, row, j) <= t < of(beside.document_end, row, j)
    if (
        beside.global_queries is not None
        and t in beside.global_queries[row if beside.global_queries.shape[0] > 1 else 0].tolist()
    ):
        return max(alive, int(within))
    if not within or beside.random_blocks is None or j < beside.first_key:
        return alive
    blocks = beside.random_blocks[head if beside.random_blocks.shape[0] > 1 else 0, t // beside.block_size].tolist()
    found = alive + blocks.count((j - beside.first_key) // beside.block_size)
    return found if beside.count_duplicates else min(found, 1)


def added(bias: ScoreBias, row: int, head: int, t: int, j: int) -> float:
    """The bias of one score."""
    distance = t - float(bias.key_offset[row if bias.key_offset.shape[0] > 1 else 0, j])
    if isinstance(bias, AlibiBias):
        return -float(bias.slopes[head]) * distance
    column = math.floor(distance) - bias.min_distance
    if bias.buckets is None:
        return float(bias.table[head, min(max(column, 0), bias.table.shape[1] - 1)])
    return float(bias.table[head, bias.buckets[min(max(column, 0), len(bias.buckets) - 1)]])


def naive(problem: Problem) -> tuple[Tensor, Tensor]:
    """One query at a time in plain Python: the twin of the reference itself."""
    q, k, v, visibility = problem.q, problem.k, problem.v, problem.visibility
    group = q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), dtype=q.dtype)
    for row, head, t in itertools.product(*map(range, q.shape[:3])):
        keys = [j for j in range(visibility.num_keys) for _ in range(times(visibility, row, head, t, j))]
        if not keys:
            continue
        scores = [float(q[row, head, t] @ k[row, head // group, j]) / math.sqrt(q.shape[-1]) for j in keys]
        if problem.bias is not None:
            scores = [s + added(problem.bias, row, head, t, j) for s, j in zip(scores, keys, strict=True)]
        total = torch.tensor(scores, dtype=torch.float64)
        lse[row, head, t] = total.logsumexp(0)
        out[row, head, t] = torch.softmax(total, 0) @ v[row, head // group, keys]
    return out, lse


def solve(attend: Attend, problem: Problem, dtype: torch.dtype) -> Answer:
    """Output, log-sum-exp, and all gradients under a loss that weighs every number of both differently."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v))
    inputs, bias = [q, k, v], problem.bias
    if isinstance(bias, RelativeBias):
        bias = replace(bias, table=bias.table.clone().requires_grad_())
        inputs.append(bias.table)
    out, lse = attend(q, k, v, problem.visibility, bias=bias, scale=q.shape[-1] ** -0.5)
    assert lse is not None
    loss = torch.zeros((), dtype=torch.float64)
    lse = lse.masked_fill(lse == float("-inf"), -50.0)
    for made in (out, lse):
        loss = loss + (made.double() * torch.linspace(-1, 1, made.numel(), dtype=torch.float64).view(made.shape)).sum()
    # Nothing seen by nobody: a table's gradient is then 0, not missing.
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return (
        out.detach(),
        lse.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)),
    )


def in_blocks(problem: Problem) -> Attend:
    return lambda *args, **options: banded.attend(*args, **options, block_size=problem.block)


def gap(answer: Answer, truth: Answer) -> float:
    """The largest difference, measured against the largest number of its tensor (at least 1)."""
    return max(
        float((a.double() - b).abs().max() / max(1.0, float(b.abs().max())))
        for a, b in zip(answer, truth, strict=True)
        if b.numel()
    )


@pytest.mark.parametrize("patterns", [False, True])
def test_reference_is_the_formula(patterns: bool) -> None:
    @given(problems(most=12, patterns=patterns))
    @settings(deadline=None, max_examples=20)
    def check(problem: Problem) -> None:
        out, lse = reference.attend(
            problem.q, problem.k, problem.v, problem.visibility, bias=problem.bias, scale=problem.q.shape[-1] ** -0.5
        )
        truth, truth_lse = naive(problem)
        torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, truth_lse, rtol=0, atol=1e-12)

    check()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-10),
        (torch.float32, 1e-5),
        # Inputs are rounded to 8 bits (2^-9 relative each), weights and gradients again on their way, and the
        # gradients of keys and values once more at each of up to 70 blocks (of one query) that they are summed over.
        (torch.bfloat16, 1e-1),
        (torch.float16, 2e-2),
    ],
)
def test_banded_is_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    @given(problems())
    @settings(deadline=None, max_examples=200)
    def check(problem: Problem) -> None:
        truth = solve(reference.attend, problem, torch.float64)
        assert gap(solve(in_blocks(problem), problem, dtype), truth) <= tolerance

    check()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_banded_with_a_pattern_is_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    @given(problems(patterns=True))
    @settings(deadline=None, max_examples=40)
    def check(problem: Problem) -> None:
        truth = solve(reference.attend, problem, torch.float64)
        assert gap(solve(in_blocks(problem), problem, dtype), truth) <= tolerance

    check()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 1e-1)])
def test_plain_blocks_are_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    """The form for a bias that learns, and for the log-sum-exp on other devices, run on this one."""

    @given(problems(most=30))
    @settings(deadline=None, max_examples=20)
    def check(problem: Problem) -> None:
        def plain(q: Tensor, k: Tensor, v: Tensor, seen: Visibility, **options: Any) -> tuple[Tensor, Tensor]:
            return blocks.attend_unfused(q, k, v, seen, **options, block_size=problem.block)

        truth = solve(reference.attend, problem, torch.float64)
        assert gap(solve(plain, problem, dtype), truth) <= tolerance

    check()


@given(problems(most=30, biases=("none", "linear")))
@settings(deadline=None, max_examples=20)
def test_fused_blocks_are_the_reference(problem: Problem) -> None:
    """The form for other devices, run on this one; it gives no log-sum-exp, so the reference's stands in."""

    def fused(q: Tensor, k: Tensor, v: Tensor, seen: Visibility, **options: Any) -> tuple[Tensor, Tensor]:
        out = blocks.attend_sdpa(q, k, v, seen, **options, block_size=problem.block)
        return out, reference.attend(q, k, v, seen, **options)[1]

    truth = solve(reference.attend, problem, torch.float64)
    assert gap(solve(fused, problem, torch.float64), truth) <= 1e-10


@given(problems(most=12, biases=("none", "linear")))
@settings(deadline=None, max_examples=5)
def test_flex_is_the_reference(problem: Problem) -> None:
    """Forward only: torch has no backward of flex_attention on the CPU, and the dispatcher refuses it there."""
    scale = problem.q.shape[-1] ** -0.5
    truth, _ = reference.attend(problem.q, problem.k, problem.v, problem.visibility, bias=problem.bias, scale=scale)
    out, _ = flex.attend(
        problem.q.float(), problem.k.float(), problem.v.float(), problem.visibility, bias=problem.bias, scale=scale
    )
    assert gap((out,), (truth,)) <= 1e-5


@given(problems(), st.integers(0, 200))
@settings(deadline=None, max_examples=20)
def test_halves_of_the_keys_merge_to_the_whole(problem: Problem, at: int) -> None:
    """By every backend that has both, values and gradients."""
    at = min(at, problem.visibility.num_keys)

    def part(seen: Visibility, low: int, high: int) -> Visibility:
        return Visibility(
            seen.visible_from[:, low:high], seen.visible_until[:, low:high], seen.num_queries, (KeyRange(high - low),)
        )

    def halves(q: Tensor, k: Tensor, v: Tensor, seen: Visibility, *, bias: Any, scale: float) -> tuple[Tensor, Tensor]:
        parts = []
        for low, high in ((0, at), (at, seen.num_keys)):
            own = replace(bias, key_offset=bias.key_offset[:, low:high]) if bias is not None else None
            parts.append(
                segment_attention(
                    q, k[:, :, low:high], v[:, :, low:high], part(seen, low, high),
                    bias=own, scale=scale, backend=backend, return_lse=True,
                )
            )  # fmt: skip
        return merge_attention(parts)

    truth = solve(reference.attend, problem, torch.float64)
    for backend in BOTH:  # noqa: B007 - read by the function above
        assert gap(solve(halves, problem, torch.float64), truth) <= 1e-10


BOTH: tuple[AttentionBackend, ...] = ("reference", "banded")


def causal(queries: int, rows: int = 1, window: int = 8) -> Visibility:
    tick = torch.arange(queries).expand(rows, -1)
    return Visibility(tick, tick + window, queries, (KeyRange(queries, 0, 1, window),))


def test_under_autocast() -> None:
    """What a projection under bfloat16 autocast hands over goes through, float32 gradients come back."""
    torch.manual_seed(0)
    x = torch.randn(2, 20, 16, requires_grad=True)
    weight = torch.randn(16, 16, requires_grad=True)

    def run() -> Tensor:
        q = (x @ weight).unflatten(-1, (2, 8)).transpose(1, 2)
        return segment_attention(q, q, q, causal(20, 2), backend="banded")

    truth = run()
    with torch.autocast("cpu", torch.bfloat16):
        out = run()
    assert out.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; scores reach about 20 here, so a weight is off by e^(20 * 2^-8) - 1 = 8% at worst.
    assert float((out - truth).detach().abs().max()) <= 0.15 * float(truth.detach().abs().max())
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert bool(weight.grad.isfinite().all())


def test_masks_are_not_taken_from_another_bias() -> None:
    """A bias may get the address of one that died; its masks must not come with it."""
    torch.manual_seed(0)
    q = torch.randn(1, 2, 10, 8, dtype=torch.float64)
    seen = causal(10)
    for slope in (0.1, 1.0, 3.0):
        bias = AlibiBias(torch.full((2,), slope, dtype=torch.float64), seen.visible_from.double())
        out = segment_attention(q, q, q, seen, bias=bias, backend="banded")
        truth = segment_attention(q, q, q, seen, bias=bias, backend="reference")
        torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)
        del bias


def test_masks_are_shared_by_layers() -> None:
    q, seen = torch.randn(1, 2, 10, 8), causal(10)
    bias = AlibiBias(torch.ones(2), seen.visible_from.double())
    for _ in range(3):
        segment_attention(q, q, q, seen, bias=bias, backend="banded")
    assert len(seen._values) == 1


@pytest.mark.parametrize("backend", ["reference", "banded", "auto"])
@pytest.mark.parametrize("beside", [False, True])
def test_dropout_drops_whole_weights_and_makes_up_for_them(backend: AttentionBackend, beside: bool) -> None:
    torch.manual_seed(0)
    keys, dropped = 300, 0.25
    seen = causal(keys)
    if beside:
        begins = torch.zeros(1, keys, dtype=torch.int64)
        blocks = torch.tensor([[[3, 0]] * -(-keys // 64)])
        pattern = SparsePattern(begins, begins + keys, global_queries=torch.tensor([[5, 77]]), random_blocks=blocks)
        seen = replace(seen, pattern=pattern, _values={})
    q = torch.randn(1, 1, keys, keys, dtype=torch.float64) / 4
    # Values of unit vectors show the weights themselves.
    v = torch.eye(keys, dtype=torch.float64)[None, None]
    weights = segment_attention(q, q, v, seen, backend="reference")
    left = segment_attention(q, q, v, seen, backend=backend, dropout=dropped)
    gone = (left == 0) & (weights > 0)
    torch.testing.assert_close(left, weights.masked_fill(gone, 0.0) / (1 - dropped), rtol=1e-12, atol=1e-14)
    # A share of at least 45,000 draws: five standard errors are 0.0102.
    assert float(gone.sum() / (weights > 0).sum()) == pytest.approx(dropped, abs=0.0103)


Q, SEEN = torch.randn(2, 4, 10, 8), causal(10)


@pytest.mark.parametrize(
    ("q", "k", "options", "says"),
    [
        (Q, torch.randn(2, 3, 10, 8), {}, "4 query heads cannot share 3"),
        (Q[:, :, :9], Q, {}, "of 10 queries and 10 keys, got 9 and 10"),
        (Q, Q[:, :, :9], {}, "of 10 queries and 10 keys, got 10 and 9"),
        (Q, Q[..., :4], {}, "expected"),
        (Q[0], Q[0], {}, "expected"),
        (Q[:1], Q, {}, "expected"),
        (Q, Q.double(), {}, "in one type"),
        (Q, Q, {"backend": "fast"}, "no attention backend 'fast'"),
        (Q, Q, {"backend": "flex", "dropout": 0.1}, "no attention dropout"),
        (Q.clone().requires_grad_(), Q, {"backend": "flex"}, "no gradient on the CPU"),
        (Q, Q, {"bias": AlibiBias(torch.ones(3), SEEN.visible_from.double())}, "3 heads"),
        (
            Q,
            Q,
            {"bias": AlibiBias(torch.ones(4).requires_grad_(), SEEN.visible_from.double()), "backend": "flex"},
            "bias that learns",
        ),
        (
            Q,
            Q,
            {"bias": RelativeBias(torch.ones(4, 3), SEEN.visible_from.double()), "backend": "triton"},
            "bias that learns",
        ),
        (
            Q,
            Q,
            {"bias": AlibiBias(torch.ones(4), SEEN.visible_from.double()), "backend": "triton"},
            "'triton' has no bias",
        ),
        (Q, Q, {"backend": "triton"}, "got heads of 8 in torch.float32"),
    ],
)
def test_refuses_before_any_work(
    q: Tensor, k: Tensor, options: dict[str, object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    for backend in (reference, banded, flex):
        monkeypatch.setattr(backend, "attend", worked)
    with pytest.raises(MemtxError, match=says):
        segment_attention(q, k, k, SEEN, **options)  # type: ignore[arg-type]


def test_wrong_rows_of_visibility() -> None:
    with pytest.raises(MemtxError, match="3 rows, q of 2"):
        segment_attention(Q, Q, Q, causal(10, 3))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"document_start": torch.zeros(1, 9)}, r"document_start is \(1, 9\), expected \(2 or 1, 10\)"),
        ({"document_end": torch.zeros(3, 10)}, r"document_end is \(3, 10\)"),
        ({"global_queries": torch.zeros(3, 1)}, r"global queries are \(3, 1\)"),
        (
            {"random_blocks": torch.zeros(1, 2, 1), "block_size": 4},
            r"table of blocks is \(1, 2, 1\), expected \(4 or 1, 3, any\)",
        ),
        ({"random_blocks": torch.zeros(1, 3, 1), "block_size": 0}, "blocks of 0"),
        ({"random_blocks": torch.zeros(1, 3, 1), "block_size": 4, "first_key": 11}, "from key 11 on, of 10"),
        ({"backend": "flex"}, "no global queries and no random blocks"),
    ],
)
def test_refuses_a_pattern_that_does_not_fit(options: dict[str, Any], says: str) -> None:
    backend = options.pop("backend", "auto")
    fitting = SparsePattern(torch.zeros(1, 10), torch.full((1, 10), 10))
    with pytest.raises(MemtxError, match=says):
        segment_attention(Q, Q, Q, replace(SEEN, pattern=replace(fitting, **options)), backend=backend)


@pytest.mark.parametrize("backend", ["auto", "reference", "banded"])
def test_learned_slopes_get_a_gradient(backend: AttentionBackend) -> None:
    slopes = torch.ones(4, requires_grad=True)
    segment_attention(
        Q, Q, Q, SEEN, bias=AlibiBias(slopes, SEEN.visible_from.double()), backend=backend
    ).sum().backward()
    assert slopes.grad is not None
    assert float(slopes.grad.abs().min()) > 0


def test_log_sum_exp_alone_may_be_learned_from() -> None:
    """The other output then has no gradient at all, not zeros."""
    q = Q.double().requires_grad_()
    own, truth = (
        torch.autograd.grad(segment_attention(q, q, q, SEEN, backend=backend, return_lse=True)[1].sum(), q)[0]
        for backend in BOTH
    )
    torch.testing.assert_close(own, truth, rtol=0, atol=1e-10)


def test_cost_is_linear_in_length() -> None:
    """Pairs of the fused calls grow with the queries, not with their square."""

    def work(queries: int) -> int:
        seen = causal(queries)
        return sum(
            (stop - start) * (high - low)
            for start, stop, parts in block_plan.split_queries(seen, 16)
            for low, high in parts
        )

    # Four times the queries; a square would give sixteen times the work.
    assert work(400) < 4.5 * work(100)


def test_what_auto_chooses_on_a_gpu() -> None:
    """By a tensor that only says that it is on one."""
    with FakeTensorMode():
        q = {width: torch.empty(1, 2, 10, width, device="cuda") for width in (8, 64, 80)}
    bias = AlibiBias(torch.ones(2), SEEN.visible_from.double())
    own = "triton" if checks.has_triton() else "flex"
    assert dispatch._choose_backend(q[64], SEEN, None, 0.0)[0] == own
    assert dispatch._choose_backend(q[64], SEEN, bias, 0.0)[0] == "flex"
    assert dispatch._choose_backend(q[80], SEEN, None, 0.0)[0] == "flex"
    assert dispatch._choose_backend(q[8], SEEN, None, 0.0)[0] == "banded"
    assert dispatch._choose_backend(q[64].double(), SEEN, None, 0.0)[0] == "banded"
    assert dispatch._choose_backend(q[64], replace(SEEN, num_queries=1), None, 0.0)[0] == "banded"
    assert dispatch._choose_backend(q[64], SEEN, None, 0.1)[0] == "banded"


def test_says_once_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log_backend.cache_clear()
    with caplog.at_level("INFO", logger=dispatch.__name__):
        for _ in range(3):
            segment_attention(Q, Q, Q, SEEN)
    assert [record.getMessage() for record in caplog.records] == [
        "attention on cpu runs by 'banded': fused calls over views, linear in length"
    ]

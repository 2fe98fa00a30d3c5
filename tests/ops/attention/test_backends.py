"""Every attention backend computes what the float64 reference computes: outputs and all gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from memtx.errors import MemtxError
from memtx.ops.attention import banded, flex, reference
from memtx.ops.attention.bias import Bias
from memtx.ops.attention.dispatch import segment_attention
from memtx.ops.visibility import Section, Visibility
from tests.ops.attention.drawn import Problem, problems

Answer = tuple[Tensor, ...]


def naive(problem: Problem) -> Tensor:
    """One query at a time in plain Python: the twin of the reference itself."""
    q, k, v, seen = problem.q, problem.k, problem.v, problem.visibility
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for row in range(q.shape[0]):
        life = row if seen.born.shape[0] > 1 else 0
        for t in range(seen.queries):
            keys = [j for j in range(seen.keys) if seen.born[life, j] <= t < seen.expires[life, j]]
            for head in range(q.shape[1] if keys else 0):
                scores = [float(q[row, head, t] @ k[row, head // group, j]) / math.sqrt(q.shape[-1]) for j in keys]
                if problem.bias is not None:
                    slope, tick = problem.bias.slopes[head], problem.bias.tick[life]
                    scores = [s - float(slope * (t - tick[j])) for s, j in zip(scores, keys, strict=True)]
                weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
                out[row, head, t] = sum(w * v[row, head // group, j] for w, j in zip(weights, keys, strict=True))
    return out


def solve(attend: Callable[..., tuple[Tensor, Tensor | None]], problem: Problem, dtype: torch.dtype) -> Answer:
    """Output, then gradients of q, k and v under a loss that weighs every output differently."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v))
    out, _ = attend(q, k, v, problem.visibility, bias=problem.bias, scale=q.shape[-1] ** -0.5)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
    return (out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v)))


def in_blocks(problem: Problem) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return lambda *args, **options: banded.attend(*args, **options, block=problem.block)


def gap(answer: Answer, truth: Answer) -> float:
    """The largest difference, measured against the largest number of its tensor (at least 1)."""
    return max(
        float((a.double() - b).abs().max() / max(1.0, float(b.abs().max())))
        for a, b in zip(answer, truth, strict=True)
        if b.numel()
    )


@given(problems(most=12))
@settings(deadline=None, max_examples=15)
def test_reference_is_the_formula(problem: Problem) -> None:
    out, _ = reference.attend(
        problem.q, problem.k, problem.v, problem.visibility, bias=problem.bias, scale=problem.q.shape[-1] ** -0.5
    )
    torch.testing.assert_close(out, naive(problem), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-10),
        (torch.float32, 1e-5),
        # Inputs are rounded to 8 bits (2^-9 relative each), weights and gradients again on their way.
        (torch.bfloat16, 6e-2),
        (torch.float16, 8e-3),
    ],
)
def test_banded_is_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    @given(problems())
    @settings(deadline=None, max_examples=40)
    def check(problem: Problem) -> None:
        truth = solve(reference.attend, problem, torch.float64)
        assert gap(solve(in_blocks(problem), problem, dtype), truth) <= tolerance

    check()


@given(problems(most=30))
@settings(deadline=None, max_examples=15)
def test_portable_form_is_the_reference(problem: Problem) -> None:
    """The form for other devices, run on this one."""

    def portable(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, **options: object) -> tuple[Tensor, None]:
        bias = problem.bias
        return banded._portable(q, k, v, visibility, bias, q.shape[-1] ** -0.5, problem.block), None

    truth = solve(reference.attend, problem, torch.float64)
    assert gap(solve(portable, problem, torch.float64), truth) <= 1e-10


@given(problems(most=12))
@settings(deadline=None, max_examples=5)
def test_flex_is_the_reference(problem: Problem) -> None:
    """Forward only: torch has no backward of flex_attention on the CPU, and the dispatcher refuses it there."""
    scale = problem.q.shape[-1] ** -0.5
    truth, _ = reference.attend(problem.q, problem.k, problem.v, problem.visibility, bias=problem.bias, scale=scale)
    out, _ = flex.attend(
        problem.q.float(), problem.k.float(), problem.v.float(), problem.visibility, bias=problem.bias, scale=scale
    )
    assert gap((out,), (truth,)) <= 1e-5


@given(problems())
@settings(deadline=None, max_examples=15)
def test_log_sum_exp_of_banded(problem: Problem) -> None:
    scale = problem.q.shape[-1] ** -0.5
    _, truth = reference.attend(problem.q, problem.k, problem.v, problem.visibility, bias=problem.bias, scale=scale)
    _, lse = banded.attend(
        problem.q, problem.k, problem.v, problem.visibility, bias=problem.bias, scale=scale, block=problem.block
    )
    assert lse is not None
    torch.testing.assert_close(lse, truth, rtol=0, atol=1e-10)


def causal(queries: int, rows: int = 1) -> Visibility:
    tick = torch.arange(queries).expand(rows, -1)
    return Visibility(tick, tick + 8, queries, (Section(queries, 0, 1, 8),))


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
        bias = Bias(torch.full((2,), slope, dtype=torch.float64), seen.born.double())
        out = segment_attention(q, q, q, seen, bias=bias, backend="banded")
        truth = segment_attention(q, q, q, seen, bias=bias, backend="reference")
        torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)
        del bias


def test_masks_are_shared_by_layers() -> None:
    q, seen = torch.randn(1, 2, 10, 8), causal(10)
    bias = Bias(torch.ones(2), seen.born.double())
    for _ in range(3):
        segment_attention(q, q, q, seen, bias=bias, backend="banded")
    assert len(seen._made) == 1


def test_dropout_is_of_the_weights_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 1, 10, 8)
    v = torch.ones(1, 1, 10, 8)
    total = torch.stack([segment_attention(q, q, v, causal(10), dropout=0.5) for _ in range(400)])
    assert float(total.std()) > 0.1
    # 80 means of 400 draws whose deviation is at most 1: five standard errors.
    torch.testing.assert_close(total.mean(0), v, rtol=0, atol=0.25)


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
        (Q, Q, {"backend": "banded", "dropout": 0.1}, "no attention dropout"),
        (Q.clone().requires_grad_(), Q, {"backend": "flex"}, "no gradient on the CPU"),
        (Q, Q, {"bias": Bias(torch.ones(3), SEEN.born.double())}, "3 heads"),
        (Q, Q, {"bias": Bias(torch.ones(4).requires_grad_(), SEEN.born.double()), "backend": "banded"}, "slopes"),
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


def test_learned_slopes_get_a_gradient() -> None:
    slopes = torch.ones(4, requires_grad=True)
    segment_attention(Q, Q, Q, SEEN, bias=Bias(slopes, SEEN.born.double())).sum().backward()
    assert slopes.grad is not None
    assert float(slopes.grad.abs().min()) > 0


def test_cost_is_linear_in_length() -> None:
    """Pairs of the fused calls grow with the queries, not with their square."""

    def work(queries: int) -> int:
        seen = causal(queries)
        return sum((stop - start) * (high - low) for start, stop, parts in banded.cut(seen, 16) for low, high in parts)

    # Four times the queries; a square would give sixteen times the work.
    assert work(400) < 4.5 * work(100)

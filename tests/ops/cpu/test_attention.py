"""The CPU's compiled kernel: the reference's numbers, whatever is asked of it, and whoever asks."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from memtx.errors import MemtxError
from memtx.ops.attention import dispatch, reference
from memtx.ops.attention.bias import AlibiBias, RelativeBias
from memtx.ops.attention.dispatch import segment_attention
from memtx.ops.cpu import attention
from tests.ops.attention.strategies import Problem, problems
from tests.ops.attention.test_backends import causal, gap, solve

pytestmark = pytest.mark.skipif(not attention.is_available(), reason="no C++ compiler made the CPU's kernel here")


def drawn(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=generator) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("threads", [1, 3])
def test_it_is_the_reference(threads: int) -> None:
    """Widths that fill its lanes and that do not; more threads than heads of keys cut the queries into parts."""

    @given(problems(most=130, biases=("none", "linear"), widths=(4, 16, 20, 48, 64)))
    @settings(deadline=None, max_examples=150)
    def check(problem: Problem) -> None:
        truth = solve(reference.attend, problem, torch.float64)
        assert gap(solve(attention.attend, problem, torch.float32), truth) <= 1e-5

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check()
    finally:
        torch.set_num_threads(before)


def test_bfloat16_is_rounded_at_the_doors_alone() -> None:
    @given(problems(most=70, biases=("none", "linear")))
    @settings(deadline=None, max_examples=30)
    def check(problem: Problem) -> None:
        rounded = replace(problem, **{name: getattr(problem, name).bfloat16().double() for name in ("q", "k", "v")})
        truth = solve(reference.attend, rounded, torch.float64)
        # Eight bits: what comes out is rounded by 2^-9 of itself, what comes in was rounded for both; the gradient
        # that comes in is rounded too.
        assert gap(solve(attention.attend, problem, torch.bfloat16), truth) <= 2**-7

    check()


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_scores_far_apart_are_told_apart(size: float) -> None:
    """Scores up to 900 and 10^8 apart: float32 tells the latter to a few units, so there the highest must just win."""
    q, k, v = (x * size**0.5 for x in drawn(1, 2, 70, 16))
    out = segment_attention(q, k, v, causal(70, window=20), backend="cpp", scale=1.0)
    truth, _ = reference.attend(q.double(), k.double(), v.double(), causal(70, window=20), scale=1.0)
    # A score of s is rounded by s 2^-23 or so, and its weight by as much relatively.
    highest = float((q @ k.transpose(-1, -2)).abs().max())
    tolerance = 4 * highest * 2**-23 * float(v.abs().max())
    if tolerance < 0.1:
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=tolerance)
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * (1 + 1e-6), "a mean of values"


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_number_stays_seen(which: int) -> None:
    """A run that diverged is found by its loss: no query may hide what it saw."""
    inputs = drawn(1, 2, 70, 16)
    inputs[which][0, 1, 33] = float("nan")
    out = segment_attention(*inputs, causal(70, window=20), backend="cpp")
    told = out.isnan().any(-1)
    seeing = slice(33, 34) if which == 0 else slice(33, 53)
    assert told[0, 1, seeing].all()
    if which < 2:  # A weight of 0 times nan is nan, so a value is seen as far as its tile goes.
        assert int(told.sum()) == told[0, 1, seeing].numel(), "nobody else is touched"


def test_a_row_is_computed_alike_in_any_company() -> None:
    q, k, v = drawn(3, 2, 70, 16)
    whole = segment_attention(q, k, v, causal(70, window=20), backend="cpp")
    alone = segment_attention(q[1:2], k[1:2], v[1:2], causal(70, window=20), backend="cpp")
    assert torch.equal(whole[1:2], alone)


def test_its_operators_are_as_torch_wants_them() -> None:
    """Schemas, shapes without data, and gradients through torch's own checks."""
    q, k, v = (x.requires_grad_() for x in drawn(2, 2, 40, 16))
    seen = causal(40, window=20)
    born, expires = seen.visible_from.int(), seen.visible_until.int()
    for slopes, tick in ((None, None), (torch.ones(2), seen.visible_from.float())):
        arguments = (q, k, v, born, expires, slopes, tick, [40, 0, 1, 20, 1], 0.25)
        torch.library.opcheck(attention._forward, arguments)


def test_a_compiled_model_takes_it_whole() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(2, 2, 40, 16))
    seen = causal(40, window=20)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return segment_attention(q, k, v, seen, backend="cpp").square()

    whole = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        torch.autograd.grad(attend(q, k, v).sum(), (q, k, v)),
        torch.autograd.grad(whole(q, k, v).sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_when_it_is_chosen() -> None:
    seen, (q, _, _) = causal(40, window=20), drawn(1, 2, 40, 16)
    linear = AlibiBias(torch.ones(2), seen.visible_from.double())
    for bias in (None, linear):
        assert dispatch._choose_backend(q, seen, bias, 0.0)[0] == "cpp"
    learned = RelativeBias(torch.zeros(2, 5), seen.visible_from.double())
    assert dispatch._choose_backend(q, seen, learned, 0.0)[0] == "banded"
    assert dispatch._choose_backend(q, seen, None, 0.1)[0] == "banded"
    assert dispatch._choose_backend(q.bfloat16(), seen, None, 0.0)[0] == (
        "cpp" if attention.is_faster(torch.bfloat16) else "banded"
    )
    for other in (q.double(), q.half(), q[:, :, :1], q.new_empty(1, 2, 40, 272)):
        assert dispatch._choose_backend(other, seen, None, 0.0)[0] == "banded"


def test_what_it_cannot_do_is_refused_before_any_work() -> None:
    q, k, v = drawn(1, 2, 40, 16)
    with pytest.raises(MemtxError, match=r"heads of 16 in torch.float64 on cpu, expected a width of 256 at most"):
        segment_attention(q.double(), k.double(), v.double(), causal(40, window=20), backend="cpp")
    with pytest.raises(MemtxError, match="no attention dropout"):
        segment_attention(q, k, v, causal(40, window=20), backend="cpp", dropout=0.1)


def test_without_a_compiler_the_bands_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.cpp_extension, "load_library", lambda source: None)
    q, k, v = drawn(1, 2, 40, 16)
    assert dispatch._choose_backend(q, causal(40, window=20), None, 0.0)[0] == "banded"
    with pytest.raises(MemtxError, match="could not be compiled on this machine"):
        segment_attention(q, k, v, causal(40, window=20), backend="cpp")


def test_it_runs_on_torchs_threads() -> None:
    """Two pools of threads on the same cores wait for each other."""
    assert isinstance(attention.cpp_extension.load_library(attention.SOURCE_PATH), ctypes.CDLL)
    with open("/proc/self/maps", encoding="utf-8") as maps:
        pools = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(pools) == 1

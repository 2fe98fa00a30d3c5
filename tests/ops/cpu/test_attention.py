"""The C++ kernel matches the reference for all supported arguments, eager and compiled."""

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
from tests.ops.attention.test_backends import causal_window, check_compiled_gradients, max_error, solve

pytestmark = pytest.mark.skipif(not attention.is_available(), reason="no C++ compiler for the CPU kernel")


def random_qkv(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=generator) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("threads", [1, 3])
def test_kernel_matches_the_reference(threads: int) -> None:
    """Covers head dimensions that fill its lanes or not; more threads than key heads split the queries."""

    @given(problems(max_queries=130, biases=("none", "linear"), head_dims=(4, 16, 20, 48, 64)))
    @settings(deadline=None, max_examples=150)
    def check(problem: Problem) -> None:
        expected = solve(reference.attend, problem, torch.float64)
        assert max_error(solve(attention.attend, problem, torch.float32), expected) <= 1e-5

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check()
    finally:
        torch.set_num_threads(before)


def test_bfloat16_is_rounded_at_inputs_and_outputs_only() -> None:
    @given(problems(max_queries=70, biases=("none", "linear")))
    @settings(deadline=None, max_examples=30)
    def check(problem: Problem) -> None:
        rounded = replace(problem, **{name: getattr(problem, name).bfloat16().double() for name in ("q", "k", "v")})
        expected = solve(reference.attend, rounded, torch.float64)
        # Eight bits: outputs are rounded by 2^-9 relative, inputs were rounded for both; the incoming gradient is
        # rounded too.
        assert max_error(solve(attention.attend, problem, torch.bfloat16), expected) <= 2**-7

    check()


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_scores_far_apart_stay_distinct(size: float) -> None:
    """Scores up to 900 and 10^8 apart: float32 resolves the latter to a few units, so the highest must just win."""
    q, k, v = (x * size**0.5 for x in random_qkv(1, 2, 70, 16))
    visibility = causal_window(70, window=20)
    out, _ = segment_attention(q, k, v, visibility, backend="cpp", scale=1.0)
    expected, _ = reference.attend(q.double(), k.double(), v.double(), visibility, scale=1.0)
    # A score s is rounded by about s 2^-23, and its weight by as much relatively.
    max_score = float((q @ k.transpose(-1, -2)).abs().max())
    tolerance = 4 * max_score * 2**-23 * float(v.abs().max())
    if tolerance < 0.1:
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * (1 + 1e-6), "a mean of values"


@pytest.mark.parametrize("index", [0, 1, 2])
def test_nan_reaches_the_queries_that_see_it(index: int) -> None:
    """A diverged run is detected by its loss, so no query may hide a nan that it sees."""
    inputs = random_qkv(1, 2, 70, 16)
    inputs[index][0, 1, 33] = float("nan")
    out, _ = segment_attention(*inputs, causal_window(70, window=20), backend="cpp")
    is_nan = out.isnan().any(-1)
    attending = slice(33, 34) if index == 0 else slice(33, 53)
    assert is_nan[0, 1, attending].all()
    if index < 2:  # 0 * nan is nan, so a nan among the values reaches all queries of its tile.
        assert int(is_nan.sum()) == is_nan[0, 1, attending].numel(), "no other query is affected"


def test_batch_entries_are_independent() -> None:
    q, k, v = random_qkv(3, 2, 70, 16)
    visibility = causal_window(70, window=20)
    batched, _ = segment_attention(q, k, v, visibility, backend="cpp")
    single, _ = segment_attention(q[1:2], k[1:2], v[1:2], visibility, backend="cpp")
    assert torch.equal(batched[1:2], single)


def test_operators_pass_opcheck() -> None:
    """Checks schemas, fake tensors and gradients by torch's own tests."""
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 2, 40, 16))
    visibility = causal_window(40, window=20)
    start, end = visibility.visible_from.int(), visibility.visible_until.int()
    for slopes, key_offset in ((None, None), (torch.ones(2), visibility.visible_from.float())):
        arguments = (q, k, v, start, end, slopes, key_offset, [40, 0, 1, 20, 1], 0.25)
        torch.library.opcheck(attention._forward, arguments)


def test_compiled_model_has_no_graph_break() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 2, 40, 16))
    visibility = causal_window(40, window=20)
    check_compiled_gradients(q, k, v, visibility, "cpp")


def test_auto_chooses_the_kernel_where_it_is_supported() -> None:
    visibility, (q, _, _) = causal_window(40, window=20), random_qkv(1, 2, 40, 16)
    key_offset = visibility.visible_from.double()
    for bias in (None, AlibiBias(torch.ones(2), key_offset)):
        assert dispatch._choose_backend(q, visibility, bias, 0.0)[0] == "cpp"
    learned = RelativeBias(torch.zeros(2, 5), key_offset)
    assert dispatch._choose_backend(q, visibility, learned, 0.0)[0] == "banded"
    assert dispatch._choose_backend(q, visibility, None, 0.1)[0] == "banded"
    bf16_backend = "cpp" if attention.is_faster(torch.bfloat16) else "banded"
    assert dispatch._choose_backend(q.bfloat16(), visibility, None, 0.0)[0] == bf16_backend
    for unsupported in (q.double(), q.half(), q[:, :, :1], q.new_empty(1, 2, 40, 272)):
        assert dispatch._choose_backend(unsupported, visibility, None, 0.0)[0] == "banded"


def test_unsupported_arguments_raise_before_any_work() -> None:
    q, k, v = random_qkv(1, 2, 40, 16)
    visibility = causal_window(40, window=20)
    with pytest.raises(MemtxError, match=r"heads of 16 in torch.float64 on cpu, expected at most 256"):
        segment_attention(q.double(), k.double(), v.double(), visibility, backend="cpp")
    with pytest.raises(MemtxError, match="'cpp' does not support attention dropout"):
        segment_attention(q, k, v, visibility, backend="cpp", dropout=0.1)


def test_auto_falls_back_to_banded_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.cpp_extension, "load_library", lambda source: None)
    q, k, v = random_qkv(1, 2, 40, 16)
    visibility = causal_window(40, window=20)
    assert dispatch._choose_backend(q, visibility, None, 0.0)[0] == "banded"
    with pytest.raises(MemtxError, match="could not be compiled on this machine"):
        segment_attention(q, k, v, visibility, backend="cpp")


def test_kernel_uses_torchs_thread_pool() -> None:
    """Two thread pools on the same cores would wait for each other."""
    assert isinstance(attention.cpp_extension.load_library(attention.SOURCE_PATH), ctypes.CDLL)
    with open("/proc/self/maps", encoding="utf-8") as maps:
        pools = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(pools) == 1

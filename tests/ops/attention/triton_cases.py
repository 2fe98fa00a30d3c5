"""Run by test_triton_window.py in a process of its own, where Triton's interpreter stands in for a GPU."""

from __future__ import annotations

import sys
from typing import Any

import torch
from hypothesis import given, settings
from torch import Tensor

from memtx.ops.attention import reference
from memtx.ops.attention.dispatch import segment_attention
from memtx.ops.attention.mask import KeyRange, Visibility
from tests.ops.attention.strategies import Problem, problems
from tests.ops.attention.test_backends import gap, solve


def by_triton(q: Tensor, k: Tensor, v: Tensor, seen: Visibility, *, bias: Any, scale: float) -> tuple[Tensor, Tensor]:
    """Through the dispatcher, as users do."""
    return segment_attention(q, k, v, seen, bias=bias, scale=scale, backend="triton", return_lse=True)


def check(dtype: torch.dtype, tolerance: float, examples: int) -> None:
    """Compare outputs, log-sum-exp and all gradients with the float64 reference."""

    @given(problems(most=40, biases=("none",), widths=(32, 64)))
    @settings(deadline=None, max_examples=examples, derandomize=True, database=None)
    def compare(problem: Problem) -> None:
        truth = solve(reference.attend, problem, torch.float64)
        found = gap(solve(by_triton, problem, dtype), truth)
        assert found <= tolerance, f"off by {found}"

    compare()


def strided() -> None:
    """Heads behind entries, as projections leave them, and an inner stride that is not 1."""
    torch.manual_seed(0)
    tick = torch.arange(20)[None]
    seen = Visibility(tick, tick + 8, 20, (KeyRange(20, 0, 1, 8),))
    q = torch.randn(2, 20, 4, 32).transpose(1, 2)
    k = torch.randn(2, 20, 2, 64).transpose(1, 2)[..., ::2]
    out = segment_attention(q, k, k, seen, backend="triton")
    torch.testing.assert_close(out, segment_attention(q, k, k, seen, backend="reference"), rtol=0, atol=1e-5)


if __name__ == "__main__":
    strided()
    check(torch.float32, 1e-5, int(sys.argv[1]))
    # Inputs are rounded to 11 bits, weights and gradients again on their way.
    check(torch.float16, 1e-2, int(sys.argv[1]))

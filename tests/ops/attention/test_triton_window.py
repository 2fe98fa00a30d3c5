"""The Triton kernel matches the reference: interpreted on a CPU, and on a GPU if there is one.

The interpreter has no bfloat16 products (Triton 3.9 multiplies their bits as integers): that dtype is compiled here and
compared on a GPU only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from memtx.ops.attention import reference
from memtx.ops.attention.dispatch import AttentionBackend, has_triton, segment_attention
from memtx.ops.attention.mask import KeyRange, Visibility
from tests.ops.attention.strategies import Problem, problems
from tests.ops.attention.test_backends import max_error, solve

needs_triton = pytest.mark.skipif(not has_triton(), reason="the package triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@needs_triton
def test_interpreted_kernel_matches_the_reference() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tests.ops.attention.triton_cases", "4"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr[-3000:]


@needs_triton
def test_bounds_are_built_once_per_shape() -> None:
    triton_window = pytest.importorskip("memtx.ops.attention.triton_window")
    key_ranges = (KeyRange(40, -120, 3, 60), KeyRange(100, -50, 1, 50))
    device = torch.device("cpu")
    first, second = (triton_window.build_key_bounds(key_ranges, 50, 16, device) for _ in range(2))
    assert first is second
    query_bounds = triton_window.build_query_bounds(key_ranges, 50, 32, device)
    # Blocks have at most 32 keys of one key range, and cover all keys.
    expected = [[0, 32], [32, 40], [40, 72], [72, 104], [104, 136], [136, 140]]
    assert query_bounds[:, :2].tolist() == expected


@needs_gpu
@needs_triton
@pytest.mark.cuda
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("triton", torch.float32, 1e-5),
        # As for 'banded': inputs and weights are rounded.
        ("triton", torch.bfloat16, 6e-2),
        ("triton", torch.float16, 8e-3),
        ("flex", torch.float32, 1e-2),  # Its float32 products run in TF32.
        ("banded", torch.float32, 1e-5),
    ],
)
def test_backends_on_a_gpu_match_the_reference(backend: AttentionBackend, dtype: torch.dtype, tolerance: float) -> None:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, bias: Any, scale: float
    ) -> tuple[Tensor, Tensor]:
        start, end = visibility.visible_from.cuda(), visibility.visible_until.cuda()
        visibility = replace(visibility, visible_from=start, visible_until=end, _values={})
        out, lse = segment_attention(
            q.cuda(), k.cuda(), v.cuda(), visibility, bias=bias, scale=scale, backend=backend, return_lse=True
        )
        assert lse is not None
        return out.cpu(), lse.cpu()

    # Each width and group compiles three kernels; tests/gpu/test_aot.py compiles the others.
    head_dims = (64, 128) if dtype == torch.bfloat16 else (64,)

    @given(problems(kv_groups=(1, 2), max_queries=300, biases=("none",), head_dims=head_dims))
    # flex compiles once per shape.
    @settings(deadline=None, max_examples=3 if backend == "flex" else 25)
    def check(problem: Problem) -> None:
        expected = solve(reference.attend, problem, torch.float64)
        assert max_error(solve(attend, problem, dtype), expected) <= tolerance

    check()

"""The Triton kernel is the reference: by the interpreter on a CPU, and on a GPU where there is one.

The interpreter knows no bfloat16 products (Triton 3.9 multiplies their bits as integers): that type is
compiled here and compared on a GPU only.
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
from memtx.ops.attention.checks import has_triton
from memtx.ops.attention.dispatch import segment_attention
from memtx.ops.attention.mask import KeyRange, Visibility
from tests.ops.attention.strategies import Problem, problems
from tests.ops.attention.test_backends import gap, solve

needs_triton = pytest.mark.skipif(not has_triton(), reason="the package triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@needs_triton
def test_by_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.attention.triton_cases", "8"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@needs_triton
@pytest.mark.parametrize("kernel", ["_forward", "_backward_queries", "_backward_keys"])
def test_compiles_for_a_gpu_that_is_not_here(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To Hopper's machine code in bfloat16, within its shared memory."""
    compiler = pytest.importorskip("triton.compiler")
    backends = pytest.importorskip("triton.backends.compiler")
    triton_window = pytest.importorskip("memtx.ops.attention.triton_window")
    if triton_window.IS_INTERPRETED:
        pytest.skip("the interpreter is on, nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_window, kernel)
    tiles = triton_window._choose_tiles(64, torch.bfloat16, "forward" if kernel == "_forward" else "backward")
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    fixed = {"HEADS": 8, "KV_HEADS": 4, "GROUP": 2, "SECTIONS": 2, "D": 64, "PRECISION": "ieee", "HAS_GRAD_LSE": True}
    fixed |= tiles
    types = dict.fromkeys(("q", "k", "v", "out", "grad_out", "dq", "dk", "dv"), "*bf16")
    types |= dict.fromkeys(("lse", "grad_lse", "delta"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(("visible_from", "visible_until", "key_bounds", "query_bounds"), "*i32")
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in function.arg_names}
    source = compiler.ASTSource(function, signature, {name: fixed[name] for name in signature if name in fixed})
    made = compiler.compile(source, target=backends.GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"]
    assert made.metadata.shared <= 227 * 1024


@needs_triton
def test_ranges_are_made_once_a_shape() -> None:
    triton_window = pytest.importorskip("memtx.ops.attention.triton_window")
    sections = (KeyRange(40, -120, 3, 60), KeyRange(100, -50, 1, 50))
    at = torch.device("cpu")
    assert triton_window.build_key_bounds(sections, 50, 16, at) is triton_window.build_key_bounds(sections, 50, 16, at)
    blocks = triton_window.build_query_bounds(sections, 50, 32, at)
    # Blocks of keys are 32 at most, together all keys, none of two sections.
    assert [tuple(one) for one in blocks[:, :2].tolist()] == [
        (0, 32),
        (32, 40),
        (40, 72),
        (72, 104),
        (104, 136),
        (136, 140),
    ]


@needs_gpu
@needs_triton
@pytest.mark.cuda
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("triton", torch.float32, 1e-5),
        # As for the banded form: inputs and weights are rounded.
        ("triton", torch.bfloat16, 6e-2),
        ("triton", torch.float16, 8e-3),
        ("flex", torch.float32, 1e-2),  # its float32 products run in TF32
        ("banded", torch.float32, 1e-5),
    ],
)
def test_on_a_gpu(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Visibility, *, bias: Any, scale: float) -> tuple[Tensor, Tensor]:
        seen = replace(seen, visible_from=seen.visible_from.cuda(), visible_until=seen.visible_until.cuda(), _values={})
        out, lse = segment_attention(
            q.cuda(), k.cuda(), v.cuda(), seen, bias=bias, scale=scale, backend=backend, return_lse=True
        )  # type: ignore[call-overload]
        return out.cpu(), lse.cpu()

    @given(problems(most=300, biases=("none",), widths=(32, 64, 128)))
    # Every shape of flex is a compilation.
    @settings(deadline=None, max_examples=3 if backend == "flex" else 25)
    def check(problem: Problem) -> None:
        truth = solve(reference.attend, problem, torch.float64)
        assert gap(solve(attend, problem, dtype), truth) <= tolerance

    check()

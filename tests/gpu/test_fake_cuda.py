"""The CUDA path with fake tensors on a device in name: graphs, dtypes, launches and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memtx.ops.attention.dispatch import has_triton
from tests.memory_zoo import KINDS

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="the package triton is not installed"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA: a device in name would replace it"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
]
GRAPHS = ("graphs", "activation_checkpointing", "decoder_graphs", "inductor")
EAGER = ("decode_launches", "autograd_functions", "loss_memory")
MEMORIES = ("compressed-convolution", "top-k", "dual", "slots", "retrieval", "sinks", "gated-delta-net", "copy")


def run_cases(*names: str) -> None:
    """Run checks of tests/gpu/cases.py in a process of their own; fail with the first error."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.gpu.cases", *names],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    results = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    for result in results:
        assert not result["error"], f"{result['name']}: {result['error']}"
    assert [result["name"] for result in results] == list(names), process.stderr[-3000:]


@pytest.mark.parametrize("name", GRAPHS)
def test_compiled_models(name: str) -> None:
    run_cases(name)


@pytest.mark.slow
def test_compiled_model_with_alibi() -> None:
    run_cases("flex_graphs")


def test_launches_and_memory() -> None:
    run_cases(*EAGER)


def test_memories_train_under_autocast() -> None:
    run_cases(*(f"memory-{name}" for name in MEMORIES))


@pytest.mark.slow
def test_all_memories_train_under_autocast() -> None:
    run_cases(*(f"memory-{name}" for name in KINDS if name not in ("tokens", "ernie-doc", *MEMORIES)))

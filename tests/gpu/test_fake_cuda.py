"""The CUDA path with fake tensors on a device in name: graphs, dtypes, launches and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from memtx.ops.attention.dispatch import has_triton
from tests.memory_zoo import KINDS, READ_ON_HOST

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="the package triton is not installed"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA: a device in name would replace it"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
]
FAST = (
    *("training_step", "activation_checkpointing", "decoder_graphs"),
    *("decode_launches", "autograd_functions", "loss_memory"),
    *(f"memory-{name}" for name in ("compressed-convolution", "top-k", "dual", "retrieval", "gated-delta-net", "copy")),
)
SLOW = (
    "flex_graphs",
    "training_step_of_two_layers",
    *(f"memory-{name}" for name in KINDS if f"memory-{name}" not in FAST and name not in READ_ON_HOST),
)
RunCase = Callable[[str], str | None]


@pytest.fixture(scope="module")
def run_case() -> Iterator[RunCase]:
    """Return a function that runs a check of tests/gpu/cases.py in one process for all, and returns its error."""
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.cases"], env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        ) as process,
    ):  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None

        def run(name: str) -> str | None:
            print(name, file=process.stdin, flush=True)
            if line := process.stdout.readline():
                return json.loads(line)
            log.seek(0)
            return log.read()[-3000:] or "The process ended."

        yield run
        process.kill()


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_cuda_path_with_fake_tensors(run_case: RunCase, name: str) -> None:
    assert run_case(name) is None

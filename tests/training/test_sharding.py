"""Weights shared out over two processes: the same gradients and the same run, and checkpoints of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx import files
from tests.commands.program import Program
from tests.commands.runs import changed
from tests.training import runs

FSDP2 = ("--trainer.strategy", "fsdp2")


def config(rows: int, **trainer: Any) -> dict[str, Any]:
    content = changed(("data", "rows"), rows)
    content["data"]["horizon"] = 2
    content["trainer"] |= {"val_check_interval": 3, "max_steps": 6} | trainer
    content["checkpoint"] = {"every_n_train_steps": 2}
    content["model"]["model"]["init_args"] |= {"depth": 2, "dropout": 0.0}
    content["model"]["scheduler"]["init_args"]["steps"] = 100
    return content


@pytest.fixture(autouse=True)
def _gloo() -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")


def test_gradients_are_those_of_one_process(program: Program, tmp_path: Path) -> None:
    at = runs.prepare(tmp_path, config(2, max_steps=1, val_check_interval=1))
    for name, ranks, options in (("one", 0, ()), ("two", 2, (*FSDP2, "--data.rows", "1"))):
        done = runs.fit(program, at, name, *options, ranks=ranks, gradients=True)
        assert done.code == 0, done.err
    one, two = (
        files.load_tensors(at / f"{name}-watched" / "gradients", kind="gradients", version=1)[0]
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert float(gradient.abs().max()) > 0, name
        # float32: sums in another order
        torch.testing.assert_close(two[name], gradient, atol=1e-6, rtol=1e-4)
    scores = [json.loads((at / name / "checkpoints" / "best.json").read_text())["score"] for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)

"""Two processes equal one: gradients, metrics and, after a resume, losses."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx import files
from memtx.checkpoint.pretrained import read_checkpoint
from memtx.cli.errors import EXIT_INTERRUPTED
from tests.commands.program import Program
from tests.commands.runs import changed
from tests.training import runs

TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp_fork")


def config(batch_size: int, **trainer: Any) -> dict[str, Any]:
    content = changed(("data", "batch_size"), batch_size)
    content["trainer"] |= {"val_check_interval": 3, "max_steps": 8} | trainer
    content["checkpoint"] = {"every_n_train_steps": 2}
    return content


@pytest.fixture(autouse=True)
def _gloo() -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")


def test_gradients_and_metrics_equal_one_process(program: Program, tmp_path: Path) -> None:
    content = config(2, max_steps=1, val_check_interval=1)
    # Dropout draws by process. In the first batch no document ends, so all streams score alike and the mean over
    # processes is the mean over labels.
    content["model"]["model"]["init_args"]["dropout"] = 0.0
    # More streams than books: some processes score nothing, and must not keep the others waiting.
    content["data"]["eval_batch_size"] = 3
    at = runs.prepare(tmp_path, content)
    for name, options in (("one", ()), ("parallel", (*TWO, "--data.batch_size", "1"))):
        done = runs.fit(program, at, name, *options, gradients=True)
        assert done.code == 0, done.err
    single, parallel = (
        files.load_tensors(at / f"{name}-watched" / "gradients", kind="gradients", version=1)[0]
        for name in ("one", "parallel")
    )
    assert single.keys() == parallel.keys()
    for name, gradient in single.items():
        assert float(gradient.abs().max()) > 0, name
        # float32: sums in another order
        torch.testing.assert_close(parallel[name], gradient, atol=1e-6, rtol=1e-4)
    scores = [
        json.loads((at / name / "checkpoints" / "best.json").read_text())["score"] for name in ("one", "parallel")
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_of_two_processes_resumes(program: Program, tmp_path: Path, number: signal.Signals) -> None:
    at = runs.prepare(tmp_path, config(1))
    done = runs.fit(program, at, "whole", *TWO)
    assert done.code == 0, done.err
    done = runs.fit(program, at, "struck", *TWO, strike=6, signal=int(number), rank=1)
    # One of them is struck: without mercy, or with the step in hand saved by both.
    assert done.code == (1 if number == signal.SIGKILL else EXIT_INTERRUPTED), done.err
    assert max(runs.losses(at, "struck")) == (5 if number == signal.SIGKILL else 6)
    done = runs.fit(program, at, "struck", *TWO)
    assert done.code == 0, done.err
    for rank in (0, 1):
        assert runs.losses(at, "struck", rank) == runs.losses(at, "whole", rank)
        assert runs.weights(at, "struck", rank) == runs.weights(at, "whole", rank)
    assert runs.losses(at, "whole", 0) != runs.losses(at, "whole", 1)
    assert runs.weights(at, "whole", 0) == runs.weights(at, "whole", 1)
    # Each its own memory.
    saved = read_checkpoint(at / "whole" / "checkpoints" / "last.ckpt")["memtx"]["ranks"]
    assert len(saved) == 2
    memories = [torch.cat([tensor.double().flatten() for tensor in rank["carry"].values()]) for rank in saved]
    assert not torch.equal(*memories)


def test_all_processes_skip_the_same_steps(program: Program, tmp_path: Path) -> None:
    at = runs.prepare(tmp_path, config(1, max_steps=3, limit_val_batches=0))
    for name, spoil in (("plain", -1), ("spoiled", 1)):
        done = runs.fit(program, at, name, *TWO, spoil=spoil, rank=1)
        assert done.code == 0, done.err
    # Said by the first process, whose own loss was finite.
    assert "loss of another process" in done.err
    assert "1 in a row, 1 in total" in done.err
    assert runs.weights(at, "spoiled", 0) == runs.weights(at, "spoiled", 1)
    assert runs.weights(at, "spoiled", 0) != runs.weights(at, "plain", 0)


STACK = [
    [
        {"class_path": "memtx.RecurrentMemory", "init_args": {"window": 12}},
        {"class_path": "memtx.AssociativeMemory", "init_args": {"heads": 2, "decay_gate": "memtx.memory.parts.Gate"}},
        {"class_path": "memtx.SlotMemory", "init_args": {"num_slots": 3, "interval": 8, "heads": 2}},
        {
            "class_path": "memtx.RetrievalMemory",
            "init_args": {"capacity": 20, "top_k": 3, "exclude_recent": 12, "heads": 2},
        },
        {"class_path": "memtx.SinkMemory", "init_args": {"num_sinks": 2, "exclude_recent": 12}},
        {"class_path": "memtx.TokenMemory", "init_args": {"num_tokens": 2, "interval": 10}},
    ]
]


@pytest.mark.parametrize("replay", [False, True])
def test_every_memory_gives_every_parameter_a_gradient(program: Program, tmp_path: Path, replay: bool) -> None:
    """DDP stops at a parameter that took no part, from the second step on; the strategy has no flag against it."""
    content = config(1, max_steps=3)
    content["model"]["replay"] = replay
    content["model"]["model"]["init_args"]["memories"] = STACK
    at = runs.prepare(tmp_path, content)
    done = runs.fit(program, at, "two", *TWO, gradients=True)
    assert done.code == 0, done.err
    gradients, _ = files.load_tensors(at / "two-watched" / "gradients", kind="gradients", version=1)
    assert sum("extra_memories" in name for name in gradients) > 20
    assert runs.weights(at, "two", 0) == runs.weights(at, "two", 1)

"""A SLURM job that is about to end saves, is requeued, and resumes exactly."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from memtx.cli.errors import EXIT_INTERRUPTED
from memtx.cli.lightning_cli import get_launcher_kwargs
from memtx.errors import MemtxError
from memtx.training import slurm
from tests.commands.program import Program, free_port
from tests.commands.runs import changed
from tests.training import runs


def scontrol(at: Path, code: int = 0) -> Path:
    """Return a folder with a fake scontrol that records its arguments and ends with an exit code."""
    folder = at / f"bin-{code}"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {at}/arguments\necho "no such job" >&2\nexit {code}\n')
    (folder / "scontrol").chmod(0o755)
    return folder


def tasks(count: int, path: Path, **more: str) -> list[dict[str, str]]:
    """Return the environment that srun sets for each task of a job on one node."""
    common = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(count),
        "SLURM_NTASKS_PER_NODE": str(count),
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PATH": f"{path}:{os.environ['PATH']}",
    } | more
    return [common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(count)]


def test_a_requeued_job_resumes_exactly(program: Program, tmp_path: Path) -> None:
    config = changed(("data", "batch_size"), 1)
    config["trainer"] |= {"max_steps": 6, "limit_val_batches": 0, "accumulate_grad_batches": 2}
    at = runs.prepare(tmp_path, config)
    path = scontrol(tmp_path)
    done = runs.fit(program, at, "whole", environments=tasks(2, path))
    assert done.code == 0, done.err
    # One task alone is told; both save at the same step's end, and the first one asks.
    done = runs.fit(program, at, "told", environments=tasks(2, path), strike=4, signal=int(signal.SIGUSR1), rank=1)
    assert done.code == EXIT_INTERRUPTED, done.err
    assert "job 4711 is requeued" in done.err
    assert (tmp_path / "arguments").read_text() == "requeue 4711\n"
    assert max(runs.losses(at, "told")) == 5
    assert not list((at / "told").glob("hpc_ckpt*"))
    done = runs.fit(program, at, "told", environments=tasks(2, path))
    assert done.code == 0, done.err
    for rank in (0, 1):
        assert runs.losses(at, "told", rank) == runs.losses(at, "whole", rank)
        assert runs.weights(at, "told", rank) == runs.weights(at, "whole", rank)


def test_a_refused_requeue_is_reported(program: Program, tmp_path: Path) -> None:
    config = changed(("trainer", "max_steps"), 4)
    config["trainer"]["limit_val_batches"] = 0
    at = runs.prepare(tmp_path, config)
    inputs = tasks(1, scontrol(tmp_path, 1), SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="3")
    done = runs.fit(program, at, "told", environments=inputs, strike=1, signal=int(signal.SIGUSR1))
    assert done.code == 2
    assert "`scontrol requeue 12_3` failed: no such job" in done.err
    assert "Traceback" not in done.err
    assert (at / "told" / "checkpoints" / "last.ckpt").exists()


def test_job_id_and_requeue_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.get_job_id({}) is None
    assert slurm.get_job_id({"SLURM_JOB_ID": "12"}) == "12"
    assert slurm.get_job_id({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}) == "12_3"
    assert slurm.get_job_id({"SLURM_JOB_ID": "12; rm -r ."}) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MemtxError, match="No such file"):
        slurm.requeue("12")


def test_the_launcher_sets_the_number_of_processes() -> None:
    assert get_launcher_kwargs({}) == {}
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert get_launcher_kwargs(torchrun) == {"devices": 4, "num_nodes": 2}
    slurm = {"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_JOB_NAME": "train"}
    assert get_launcher_kwargs(slurm) == {"devices": 2, "num_nodes": 3}
    assert get_launcher_kwargs(slurm | {"SLURM_JOB_NAME": "interactive"}) == {}
    assert get_launcher_kwargs(slurm | torchrun) == {"devices": 4, "num_nodes": 2}

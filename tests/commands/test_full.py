"""A full disk or memory is one line; the last good checkpoint stays and the run resumes from it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtx.checkpoint import checksummed_zip
from tests.commands.program import Program
from tests.commands.runs import changed
from tests.training import runs


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder that is a disk of 3 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("mount is not available")
    if mounted.returncode:
        pytest.skip(f"tmpfs could not be mounted: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(disk: Path, remaining: int) -> None:
    stats = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(stats.f_bavail * stats.f_frsize - remaining))


@pytest.mark.parametrize(
    "writer", [pytest.param("training.AtomicCheckpointIO", marks=pytest.mark.slow), "async_io.AsyncAtomicCheckpointIO"]
)
def test_a_full_disk_keeps_the_last_checkpoint(program: Program, tmp_path: Path, disk: Path, writer: str) -> None:
    config = changed(("trainer", "max_steps"), 6)
    config["trainer"] |= {"plugins": [{"class_path": f"memtx.checkpoint.{writer}"}], "val_check_interval": 4}
    config["checkpoint"] = {"every_n_train_steps": 2}
    workdir = runs.prepare(tmp_path, config)
    assert runs.fit(program, workdir, "whole").code == 0
    assert runs.fit(program, workdir, "disk/run", "--trainer.max_steps", "2").code == 0
    folder = disk / "run" / "checkpoints"
    # No space at all: the log cannot be written. Then space for the log but not for a checkpoint.
    for remaining, expected in ((0, "The disk is full"), (100_000, ".ckpt' could not be written: No space left")):
        fill(disk, remaining)
        result = runs.fit(program, workdir, "disk/run")
        (disk / "filler").unlink()
        assert result.code == 2, result.err
        assert "Traceback" not in result.err
        (line,) = [line for line in result.err.splitlines() if line.startswith("memtx: error:")]
        assert expected in line
        assert "Free some space" in line
        assert not list(folder.glob(".*")), "no partial file is left"
        for path in folder.glob("*.ckpt"):
            checksummed_zip.verify(path)
        assert checksummed_zip.read_step(folder / "last.ckpt") == 2
    result = runs.fit(program, workdir, "disk/run")
    assert result.code == 0, result.err
    watched = workdir / "disk" / "run-watched"
    shutil.copytree(watched, workdir / "struck-watched")
    assert runs.weights(workdir, "struck") == runs.weights(workdir, "whole")


def test_full_memory_is_one_line(program: Program, tmp_path: Path) -> None:
    config = changed(("trainer", "max_steps"), 2)
    config["trainer"]["callbacks"] = [{"class_path": "full.Full"}]
    workdir = runs.prepare(tmp_path, config)
    (workdir / "full.py").write_text(
        "import lightning.pytorch as pl\n"
        "class Full(pl.Callback):\n"
        "    def on_before_backward(self, *_):\n"
        "        raise MemoryError()\n"
    )
    result = program("fit", "--config", "c.yaml", cwd=workdir)
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    (line,) = [line for line in result.err.splitlines() if line.startswith("memtx: error:")]
    assert "Out of memory in training." in line
    assert "--data.batch_size 1 halves them" in line
    assert "batch size 2 x 1 segment x 16 tokens" in line

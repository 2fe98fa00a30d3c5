"""A disk that is full: one line, the last good checkpoint stays, and the run goes on from it."""

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
    """Return a folder that is a disk of 3 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if mounted.returncode:
        pytest.skip(f"a small disk could not be mounted: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(disk: Path, left: int) -> None:
    free = os.statvfs(disk)
    (disk / "filling").write_bytes(bytes(free.f_bavail * free.f_frsize - left))


@pytest.mark.parametrize(
    "writer",
    [pytest.param("training.AtomicCheckpointIO", marks=pytest.mark.slow), "async_io.AsyncAtomicCheckpointIO"],
)
def test_a_run_on_a_full_disk(program: Program, tmp_path: Path, disk: Path, writer: str) -> None:
    config = changed(("trainer", "max_steps"), 6)
    config["trainer"] |= {"plugins": [{"class_path": f"memtx.checkpoint.{writer}"}], "val_check_interval": 4}
    config["checkpoint"] = {"every_n_train_steps": 2}
    at = runs.prepare(tmp_path, config)
    assert runs.fit(program, at, "whole").code == 0
    assert runs.fit(program, at, "disk/run", "--trainer.max_steps", "2").code == 0
    folder = disk / "run" / "checkpoints"
    # Nothing is left: it is the log that cannot be written. Then there is room for that, and for no checkpoint.
    for left, what in ((0, "The disk is full"), (100_000, ".ckpt' could not be written: No space left")):
        fill(disk, left)
        done = runs.fit(program, at, "disk/run")
        (disk / "filling").unlink()
        assert done.code == 2, done.err
        assert "Traceback" not in done.err
        (line,) = [line for line in done.err.splitlines() if line.startswith("memtx: error:")]
        assert what in line
        assert "Free some space" in line
        assert not list(folder.glob(".*")), "nothing half-written is left"
        for path in folder.glob("*.ckpt"):
            checksummed_zip.verify(path)
        assert checksummed_zip.read_step(folder / "last.ckpt") == 2
    done = runs.fit(program, at, "disk/run")
    assert done.code == 0, done.err
    watched = at / "disk" / "run-watched"
    shutil.copytree(watched, at / "struck-watched")
    assert runs.weights(at, "struck") == runs.weights(at, "whole")


def test_full_memory_is_one_line(program: Program, tmp_path: Path) -> None:
    config = changed(("trainer", "max_steps"), 2)
    config["trainer"]["callbacks"] = [{"class_path": "full.Full"}]
    at = runs.prepare(tmp_path, config)
    (at / "full.py").write_text(
        "import lightning.pytorch as pl\n"
        "class Full(pl.Callback):\n"
        "    def on_before_backward(self, *_):\n"
        "        raise MemoryError()\n"
    )
    done = program("fit", "--config", "c.yaml", at=at)
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("memtx: error:")]
    assert "The machine's memory is full in training." in line
    assert "--data.batch_size 1 halves these" in line
    assert "2 rows x 1 segment x 16 tokens" in line

"""Runs keep earlier checkpoints and resume from the newest undamaged one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx.checkpoint import checksummed_zip, recovery
from memtx.checkpoint.async_io import MAX_PENDING, AsyncAtomicCheckpointIO, copy_to_cpu
from memtx.checkpoint.training import AtomicCheckpointIO, BestCheckpoint
from memtx.errors import CheckpointError, MemtxError
from tests.commands.program import HOME, Program
from tests.commands.runs import changed
from tests.training import runs
from tests.training.small import data, module, trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(path: Path, step: int, **more: Any) -> Path:
    content = {"global_step": step, "memtx": {"model": {}, **more}, "weights": torch.arange(100.0) + step}
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_newest_undamaged_checkpoint_is_found(tmp_path: Path) -> None:
    assert recovery.find_latest_valid(tmp_path) is None
    save(tmp_path / "last.ckpt", 9)
    save(tmp_path / "earlier-00000006.ckpt", 6)
    save(tmp_path / "step-00000004.ckpt", 4)
    recovered = recovery.find_latest_valid(tmp_path)
    assert recovered is not None
    assert (recovered.path.name, recovered.step, recovered.damaged, recovered.describe_damage()) == (
        "last.ckpt",
        9,
        [],
        "",
    )
    flip(tmp_path / "last.ckpt")
    recovered = recovery.find_latest_valid(tmp_path)
    assert recovered is not None
    assert (recovered.path.name, [path.name for path, _ in recovered.damaged]) == (
        "earlier-00000006.ckpt",
        ["last.ckpt"],
    )
    assert "last.ckpt' is not a valid checkpoint" in recovered.describe_damage()
    assert "earlier-00000006.ckpt' at step 6" in recovered.describe_damage()
    (tmp_path / "earlier-00000006.ckpt").write_bytes(b"")
    recovered = recovery.find_latest_valid(tmp_path)
    assert recovered is not None
    assert recovered.step == 4
    flip(tmp_path / "step-00000004.ckpt")
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is intact: .*last.ckpt"):
        recovery.find_latest_valid(tmp_path)


def test_newest_is_chosen_by_step_not_time(tmp_path: Path) -> None:
    for step in (5, 3, 4):
        save(tmp_path / f"earlier-{step:08d}.ckpt", step)
    recovered = recovery.find_latest_valid(tmp_path)
    assert recovered is not None
    assert recovered.step == 5
    recovered = recovery.find_latest_valid(tmp_path, max_step=4)
    assert recovered is not None
    assert recovered.step == 4
    assert recovery.find_latest_valid(tmp_path, max_step=2) is None


def test_checkpoint_within_a_step_is_skipped(tmp_path: Path) -> None:
    save(tmp_path / "step-00000005.ckpt", 5, has_stepped=False)
    save(tmp_path / "last.ckpt", 4, has_stepped=True)
    recovered = recovery.find_latest_valid(tmp_path)
    assert recovered is not None
    assert recovered.step == 4


def test_exchanged_checkpoints_are_detected(tmp_path: Path) -> None:
    save(tmp_path / "earlier-00000005.ckpt", 3)
    save(tmp_path / "earlier-00000003.ckpt", 5)
    with pytest.raises(CheckpointError, match="does not match its name: it is from step 5"):
        recovery.find_latest_valid(tmp_path)


def test_every_kind_of_damage_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small version of scripts/damage_checkpoints.py."""
    monkeypatch.syspath_prepend(str(HOME / "scripts"))
    import damage_checkpoints

    older = save(tmp_path / "earlier-00000003.ckpt", 3).read_bytes()
    newest = save(tmp_path / "earlier-00000005.ckpt", 5)
    content, generator = newest.read_bytes(), random.Random(0)
    for index in range(20 * len(damage_checkpoints.DAMAGES)):
        damage = damage_checkpoints.DAMAGES[index % len(damage_checkpoints.DAMAGES)]
        newest.write_bytes(damage_checkpoints.apply_damage(content, older, damage, generator))
        recovered = recovery.find_latest_valid(tmp_path)
        assert recovered is not None
        assert (recovered.step, [path for path, _ in recovered.damaged]) == (3, [newest]), damage.__name__


@pytest.mark.parametrize("plugin", [AtomicCheckpointIO, AsyncAtomicCheckpointIO])
@pytest.mark.parametrize(("keep", "earlier"), [(1, []), (2, [6]), (4, [2, 4, 6])])
def test_keep_last_checkpoints_are_kept(
    tmp_path: Path, plugin: type[AtomicCheckpointIO], keep: int, earlier: list[int]
) -> None:
    folder = tmp_path / "checkpoints"
    options = {"every_n_train_steps": 2, "keep_last": keep}
    run = trainer(
        tmp_path, BestCheckpoint(str(folder), **options), plugins=[plugin()], max_steps=8, limit_val_batches=0
    )
    run.fit(module(), datamodule=data(tmp_path))
    assert names(folder) == [f"earlier-{step:08d}.ckpt" for step in earlier] + ["last.ckpt"]
    for path in folder.iterdir():
        checksummed_zip.verify(path)
        step = int(path.stem[-8:]) if "-" in path.name else 8
        assert torch.load(path, weights_only=True)["global_step"] == checksummed_zip.read_step(path) == step


def test_temporary_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".last.ckpt.0123abcd.tmp").write_bytes(b"half of it")
    (folder / "mine.tmp").write_bytes(b"")
    run = trainer(tmp_path, BestCheckpoint(str(folder)), max_steps=1, limit_val_batches=0)
    run.fit(module(), datamodule=data(tmp_path))
    assert names(folder) == ["last.ckpt", "mine.tmp"]


def test_damaged_last_checkpoint_is_not_kept_as_earlier(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    settings: dict[str, Any] = {"limit_val_batches": 0}
    for steps in (4, 6):
        resume_path = folder / "earlier-00000002.ckpt" if folder.exists() else None
        keep = BestCheckpoint(str(folder), every_n_train_steps=2)
        run = trainer(tmp_path, keep, max_steps=steps, **settings)
        run.fit(module(), datamodule=data(tmp_path), ckpt_path=resume_path and str(resume_path))
        if resume_path is None:
            flip(folder / "last.ckpt")
    # Both runs write a checkpoint of step 4, but only the second run's is undamaged.
    assert names(folder) == ["earlier-00000004.ckpt", "last.ckpt"]
    checksummed_zip.verify(folder / "earlier-00000004.ckpt")


def test_copy_is_independent_and_shares_storage(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    values = {"a": shared, "b": shared.view(2, 3).t(), "list": [1, {"n": torch.tensor(2)}], "text": "x"}
    copied = copy_to_cpu(values)
    shared.fill_(0.0)
    values["list"][1]["n"] = 9  # type: ignore[index]
    assert copied["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copied["b"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copied["list"] == [1, {"n": torch.tensor(2)}]
    # Shared memory stays shared.
    assert copied["a"].untyped_storage().data_ptr() == copied["b"].untyped_storage().data_ptr()


def save_steps(checkpoint_io: AtomicCheckpointIO, folder: Path, count: int) -> None:
    for step in range(4, 4 + count):
        checkpoint_io.save_checkpoint({"global_step": step}, folder / f"{step}")


def test_async_writes_happen_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, written_paths = AsyncAtomicCheckpointIO(), []
    save_checkpoint = AtomicCheckpointIO.save_checkpoint

    def save_or_fail(self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Any, options: Any = None) -> None:
        written_paths.append(path)
        if checkpoint["global_step"] == 3:
            raise MemtxError("No space.")
        save_checkpoint(self, checkpoint, path, options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save_or_fail)
    counts: list[int] = []
    for step in range(1, 3):
        writer.save_checkpoint({"global_step": step}, tmp_path / f"{step}")
        writer.run_after_writes(lambda: counts.append(len(written_paths)))
    assert writer.load_checkpoint(tmp_path / "2") == {"global_step": 2}
    assert counts == [1, 2]
    writer.save_checkpoint({"global_step": 3}, tmp_path / "3")
    # Operations after a failed write are skipped: the previous checkpoint stays.
    writer.remove_checkpoint(tmp_path / "2")
    # Raised by the next save or, if that is faster than the thread, by one that waits for it.
    with pytest.raises(MemtxError, match="No space"):
        save_steps(writer, tmp_path, 1 + MAX_PENDING)
    writer.teardown()
    assert (tmp_path / "2").exists()
    assert not (tmp_path / "3").exists()
    writer.save_checkpoint({"global_step": 3}, tmp_path / "3")
    with pytest.raises(MemtxError, match="No space"):
        writer.teardown()


@pytest.mark.parametrize(
    "writer", ["training.AtomicCheckpointIO", pytest.param("async_io.AsyncAtomicCheckpointIO", marks=pytest.mark.slow)]
)
def test_run_resumes_when_last_checkpoint_is_damaged(program: Program, tmp_path: Path, writer: str) -> None:
    config = changed(("trainer", "max_steps"), 8)
    config["trainer"] |= {"plugins": [{"class_path": f"memtx.checkpoint.{writer}"}], "val_check_interval": 3}
    config["checkpoint"] = {"every_n_train_steps": 2}
    workdir = runs.prepare(tmp_path, config)
    assert runs.fit(program, workdir, "whole").code == 0
    assert runs.fit(program, workdir, "struck", strike=7).code == -9
    folder = workdir / "struck" / "checkpoints"
    last = checksummed_zip.read_step(folder / "last.ckpt")
    assert last is not None
    # A run that is killed while it writes in the background may leave a last.ckpt older than another checkpoint.
    is_newest = last == max(checksummed_zip.read_step(path) or 0 for path in folder.glob("*.ckpt"))
    assert is_newest or writer.startswith("async_io")
    flip(folder / "last.ckpt")
    shutil.copytree(folder, workdir / "copy")
    result = runs.fit(program, workdir, "struck")
    assert result.code == 0, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("memtx: ")]
    assert len(lines) == is_newest
    for line in lines:
        assert "last.ckpt' is not a valid checkpoint" in line
        assert "Resuming from 'struck/checkpoints/" in line
    assert runs.losses(workdir, "struck") == runs.losses(workdir, "whole")
    assert runs.weights(workdir, "struck") == runs.weights(workdir, "whole")
    # Without an undamaged checkpoint, the run does not start again by itself.
    for path in folder.glob("*.ckpt"):
        path.write_bytes(b"")
    result = runs.fit(program, workdir, "struck")
    assert result.code == 2
    assert "No checkpoint in 'struck/checkpoints' is intact" in result.err
    assert "Traceback" not in result.err

"""Choice of the checkpoint that a run resumes from after a crash or disk error: the newest undamaged one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memtx.checkpoint import checksummed_zip, pretrained, sharded
from memtx.errors import CheckpointError

_STEP_IN_NAME = re.compile(r".*-(\d{8,})\.ckpt")


@dataclass(frozen=True)
class RecoveredCheckpoint:
    """An undamaged checkpoint.

    Attributes:
        path: Its file, or the folder of a sharded one.
        content: Its content; for a sharded one, everything but weights and optimizer states.
        damaged: Newer damaged checkpoints, each with the reason.
    """

    path: Path
    content: dict[str, Any]
    damaged: list[tuple[Path, str]]

    @property
    def step(self) -> int:
        """Number of optimizer steps before the checkpoint."""
        return int(self.content["global_step"])

    def describe_damage(self) -> str:
        """Return a line that names the damaged checkpoints and the one used instead; empty if none is damaged."""
        if not self.damaged:
            return ""
        reasons = "; ".join(reason for _, reason in self.damaged)
        return f"{reasons} Resuming from '{self.path}' at step {self.step}."


def find_latest_valid(checkpoint_dir: Path, max_step: int | None = None) -> RecoveredCheckpoint | None:
    """Return the newest undamaged checkpoint that a run can resume from exactly; None if there is none.

    Checkpoints after ``max_step`` are ignored. Raises CheckpointError if there are checkpoints and all are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    paths = [path for path in checkpoint_dir.glob("*.ckpt") if path.is_file() or sharded.is_sharded(path)]
    steps = {path: _peek_step(path) for path in paths}
    for path in sorted(paths, key=lambda path: _recency_key(path, steps[path]), reverse=True):
        stated_step = steps[path]
        if max_step is not None and stated_step is not None and stated_step > max_step:
            continue
        try:
            content = _read_verified(path)
        except CheckpointError as error:
            damaged.append((path, error.message))
            continue
        if max_step is not None and content["global_step"] > max_step:
            continue
        if content[pretrained.CHECKPOINT_KEY].get("has_stepped", True):
            return RecoveredCheckpoint(path, content, damaged)
    if damaged:
        message = f"No checkpoint in '{checkpoint_dir}' is intact: {' '.join(reason for _, reason in damaged)}"
        raise CheckpointError(message, "Put a copy there, or start a new run with another --run_dir.")
    return None


def _recency_key(path: Path, step: int | None) -> tuple[float, bool, int]:
    """Return a key that sorts by the stated step first: copying a run changes modification times."""
    match = _STEP_IN_NAME.fullmatch(path.name)
    if step is None and match:
        step = int(match[1])
    return (math.inf if step is None else step, match is None, path.stat().st_mtime_ns)


def _peek_step(path: Path) -> int | None:
    """Return the step stated in a checkpoint, without verifying it; None if there is none."""
    if not sharded.is_sharded(path):
        return checksummed_zip.read_step(path)
    try:
        step = sharded.read_metadata(path).get("global_step")
    except CheckpointError:
        return None
    return step if isinstance(step, int) else None


def _read_verified(path: Path) -> dict[str, Any]:
    if sharded.is_sharded(path):
        sharded.verify_checksums(path)
    content = pretrained.read_metadata(path)
    if pretrained.CHECKPOINT_KEY not in content or not isinstance(step := content.get("global_step"), int):
        raise CheckpointError(f"'{path}' was not written by memtx.", "Give a checkpoint of a memtx run.")
    if (match := _STEP_IN_NAME.fullmatch(path.name)) and int(match[1]) != step:
        raise CheckpointError(f"'{path}' does not match its name: it is from step {step}.", "Give another.")
    return content

"""Which checkpoint a run goes on from: the newest that is whole, whatever a crash or a bad disk left."""

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
    """A whole checkpoint.

    Attributes:
        path: its file, or the folder that several processes wrote.
        content: what it holds; of a folder, all but weights and optimiser.
        damaged: newer ones that are not whole, with the reason of each.
    """

    path: Path
    content: dict[str, Any]
    damaged: list[tuple[Path, str]]

    @property
    def step(self) -> int:
        """Optimiser steps that it comes after."""
        return int(self.content["global_step"])

    def describe_damage(self) -> str:
        """Return one line that says what is damaged and what is used instead; empty where nothing is damaged."""
        if not self.damaged:
            return ""
        which = "; ".join(why for _, why in self.damaged)
        return f"{which} Going on from '{self.path}', of step {self.step}."


def find_latest_valid(checkpoint_dir: Path, max_step: int | None = None) -> RecoveredCheckpoint | None:
    """Return the newest whole checkpoint in a folder that a run can go on from exactly; None where there is no file.

    Args:
        checkpoint_dir: the folder.
        max_step: no checkpoint after this step.

    Raises:
        CheckpointError: there are files, and none of them is whole.
    """
    damaged: list[tuple[Path, str]] = []
    found = [path for path in checkpoint_dir.glob("*.ckpt") if path.is_file() or sharded.is_sharded(path)]
    steps = {path: _peek_step(path) for path in found}
    for path in sorted(found, key=lambda path: _recency_key(path, steps[path]), reverse=True):
        stated = steps[path]
        if max_step is not None and stated is not None and stated > max_step:
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
        raise CheckpointError(
            f"No checkpoint in '{checkpoint_dir}' is whole: {' '.join(why for _, why in damaged)}",
            "Put a copy there, or start anew with another --run_dir.",
        )
    return None


def _recency_key(path: Path, step: int | None) -> tuple[float, bool, int]:
    """Return what is greatest for the newest; by the seal, since copying a run changes when its files were written."""
    name = _STEP_IN_NAME.fullmatch(path.name)
    if step is None:
        step = int(name[1]) if name else None
    return (math.inf if step is None else step, name is None, path.stat().st_mtime_ns)


def _peek_step(path: Path) -> int | None:
    """Return the step that a checkpoint says, unchecked; None where it says none."""
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
        raise CheckpointError(f"'{path}' is a checkpoint of something else.", "Give one that memtx wrote.")
    if (name := _STEP_IN_NAME.fullmatch(path.name)) and int(name[1]) != step:
        raise CheckpointError(f"'{path}' is not the checkpoint of its name: it is of step {step}.", "Give another.")
    return content

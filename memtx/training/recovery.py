"""Which checkpoint a run goes on from: the newest that is whole, whatever a crash or a bad disk left."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memtx import sealed
from memtx.errors import CheckpointError
from memtx.models import folder, sharded

_NAMED = re.compile(r".*-(\d{8,})\.ckpt")


@dataclass(frozen=True)
class Found:
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

    def said(self) -> str:
        """Return one line that says what is damaged and what is used instead; empty where nothing is damaged."""
        if not self.damaged:
            return ""
        which = "; ".join(why for _, why in self.damaged)
        return f"{which} Going on from '{self.path}', of step {self.step}."


def newest_whole(checkpoints: Path, until: int | None = None) -> Found | None:
    """Return the newest whole checkpoint in a folder that a run can go on from exactly; None where there is no file.

    Args:
        checkpoints: the folder.
        until: no checkpoint after this step.

    Raises:
        CheckpointError: there are files, and none of them is whole.
    """
    damaged: list[tuple[Path, str]] = []
    found = [path for path in checkpoints.glob("*.ckpt") if path.is_file() or sharded.is_sharded(path)]
    steps = {path: _stated_step(path) for path in found}
    for path in sorted(found, key=lambda path: _newness(path, steps[path]), reverse=True):
        stated = steps[path]
        if until is not None and stated is not None and stated > until:
            continue
        try:
            content = _whole(path)
        except CheckpointError as error:
            damaged.append((path, error.what))
            continue
        if until is not None and content["global_step"] > until:
            continue
        if content[folder.CHECKPOINT_KEY].get("stepped", True):
            return Found(path, content, damaged)
    if damaged:
        raise CheckpointError(
            f"No checkpoint in '{checkpoints}' is whole: {' '.join(why for _, why in damaged)}",
            "Put a copy there, or start anew with another --run.",
        )
    return None


def _newness(path: Path, step: int | None) -> tuple[float, bool, int]:
    """Return what is greatest for the newest; by the seal, since copying a run changes when its files were written."""
    name = _NAMED.fullmatch(path.name)
    if step is None:
        step = int(name[1]) if name else None
    return (math.inf if step is None else step, name is None, path.stat().st_mtime_ns)


def _stated_step(path: Path) -> int | None:
    """Return the step that a checkpoint says, unchecked; None where it says none."""
    if not sharded.is_sharded(path):
        return sealed.stated_step(path)
    try:
        step = sharded.read_notes(path).get("global_step")
    except CheckpointError:
        return None
    return step if isinstance(step, int) else None


def _whole(path: Path) -> dict[str, Any]:
    if sharded.is_sharded(path):
        sharded.check(path)
    content = folder.read_notes(path)
    if folder.CHECKPOINT_KEY not in content or not isinstance(step := content.get("global_step"), int):
        raise CheckpointError(f"'{path}' is a checkpoint of something else.", "Give one that memtx wrote.")
    if (name := _NAMED.fullmatch(path.name)) and int(name[1]) != step:
        raise CheckpointError(f"'{path}' is not the checkpoint of its name: it is of step {step}.", "Give another.")
    return content

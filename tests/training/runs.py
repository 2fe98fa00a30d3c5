"""Runs of the program in processes of their own, watched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.commands.program import Done, Program
from tests.commands.runs import write, write_books

WATCH = "tests.training.watch.Watch"


def prepare(at: Path, config: dict[str, Any]) -> Path:
    write_books(at / "books")
    write(at, config)
    return at


def fit(
    program: Program,
    at: Path,
    run: str,
    *options: str,
    ranks: int = 0,
    environments: list[dict[str, str]] | None = None,
    **watch: Any,
) -> Done:
    """Train into ``run``, losses into ``run``-watched; resumes where there is something to resume.

    With ``ranks``, as so many processes under torchrun; with ``environments``, as one process in each.
    """
    callback = {"class_path": WATCH, "init_args": {"to": str(at / f"{run}-watched"), **watch}}
    fixed = ("fit", "--config", "c.yaml", "--run_dir", run, "--ckpt_path", "last")
    argv = (*fixed, "--trainer.callbacks", json.dumps([callback]), *options)
    if environments is not None:
        return program.together(*argv, cwd=at, environments=environments)
    return program(*argv, cwd=at, ranks=ranks)


def losses(at: Path, run: str, rank: int = 0) -> dict[int, str]:
    """Return every batch's loss; what was read twice has to have been the same both times."""
    losses_by_batch: dict[int, str] = {}
    for line in (at / f"{run}-watched" / f"losses-{rank}").read_text().splitlines():
        batch, loss = line.split()
        assert losses_by_batch.setdefault(int(batch), loss) == loss, f"batch {batch}"
    return losses_by_batch


def weights(at: Path, run: str, rank: int = 0) -> dict[str, str]:
    """Return the digest of each tensor after training."""
    digests: dict[str, str] = json.loads((at / f"{run}-watched" / f"weights-{rank}").read_text())
    assert digests
    return digests

"""Kills a run again and again, at random moments and within checkpoint writes: what it ends with must not change.

    python scripts/kill_runs.py [--kills 50] [--seed 0] [--json FILE] [--markdown FILE]

A small run on the texts that come with Python is trained undisturbed. Then the same run is started, killed by SIGKILL
and started again by `--ckpt_path last`, half of the kills with checkpoints written in place and half with a thread that
writes them. A kill comes after a random time, or within a write: at a random byte, before the sync, before the rename
or after it. Whenever the run comes to its end before all kills are used, another begins from nothing. Counted: after
each kill, whether the newest checkpoint is whole; at each end, whether weights and the optimiser's state are equal to
the undisturbed run's, bit for bit, and so is every row of the log. A step's row may be missing: Lightning logs it after
the callbacks that save, and a kill between the two leaves a checkpoint that goes on behind it. Ctrl-C ends it with what
was found so far.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from measuring import deliver, headline, machine, positive, progress
from torch.utils import _pytree as pytree

from memtx import sealed
from memtx.cli.main import main as memtx
from memtx.models.folder import read_checkpoint
from memtx.training import recovery

MOMENTS = ("a random time", "a byte", "before the sync", "before the rename", "after the rename")
WRITERS = {
    "in place": "memtx.training.callbacks.checkpoint.AtomicCheckpointIO",
    "in a thread": "memtx.training.callbacks.background.BackgroundCheckpointIO",
}
COMPARED = ("step", "train_loss", "val_loss", "val_bits_per_byte", "gradient_norm")


def config(steps: int, cache: Path, writer: str) -> dict[str, Any]:
    memory = {"class_path": "memtx.CompressedMemory", "init_args": {"window": 32, "rate": 4, "length": 8}}
    model = {"dim": 48, "depth": 2, "heads": 2, "dropout": 0.1, "memories": [memory]}
    return {
        "seed_everything": 0,
        "data": {
            "root": "embedded", "rows": 2, "segment": 32, "horizon": 2, "eval_tokens": 512, "cache": str(cache),
            "workers": 1,
        },
        "model": {"model": {"class_path": "memtx.MemoryTransformer", "init_args": model}, "meter": False},
        "checkpoint": {"every_n_train_steps": 3},
        "trainer": {
            "max_steps": steps, "max_epochs": -1, "val_check_interval": 20, "check_val_every_n_epoch": None,
            "log_every_n_steps": 1, "accelerator": "cpu", "plugins": [{"class_path": WRITERS[writer]}],
        },
    }  # fmt: skip


def dies(*_: Any, **options: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, number: int, share: float, size: int) -> None:
    """Have this process die within its checkpoint write of a number, from 1."""
    began = Counter[str]()
    written = [0]
    write, replace, fsync = sealed.Sealing.write, os.replace, os.fsync
    seal, init = sealed.Sealing.seal, sealed.Sealing.__init__

    def count(self: sealed.Sealing, path: Path) -> None:
        began["writes"] += 1
        written[0] = 0
        init(self, path)

    def at_a_byte(self: sealed.Sealing, data: Any) -> int:
        written[0] += memoryview(data).nbytes
        if began["writes"] == number and written[0] >= share * size:
            part = memoryview(data).cast("B")
            write(self, part[: int(share * len(part))])
            self._file.flush()
            dies()
        return write(self, data)

    def at_the_sync(handle: Any) -> None:
        if began["writes"] == number:
            dies()
        fsync(handle)

    def at_the_rename(source: Any, target: Any) -> None:
        mine = began["writes"] == number and str(target).endswith(".ckpt")
        if mine and moment == "before the rename":
            dies()
        replace(source, target)
        if mine:
            dies()

    sealed.Sealing.__init__ = count  # type: ignore[method-assign]
    if moment == "a byte":
        sealed.Sealing.write = at_a_byte  # type: ignore[method-assign]
        # The file may be shorter than the one that its size was taken from.
        sealed.Sealing.seal = lambda self, step: dies() if began["writes"] == number else seal(self, step)  # type: ignore[method-assign]
    elif moment == "before the sync":
        os.fsync = at_the_sync  # type: ignore[assignment]
    else:
        os.replace = at_the_rename  # type: ignore[assignment]


def start(at: Path, run: str, prepare: Callable[[], None] | None = None) -> int:
    """Fork a process that trains ``run`` from where it is; return its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.chdir(at)
        log = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if prepare is not None:
            prepare()
        code = memtx(["fit", "--config", f"{run}.yaml", "--run", run, "--ckpt_path", "last"])
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Return the exit code of a process, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end_of(run: Path) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Return the last checkpoint's weights and optimiser states, and what was logged of each step but its speed."""
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    with (run / "metrics.csv").open() as file:
        rows = [tuple(row.get(name) or "" for name in COMPARED) for row in csv.DictReader(file)]
    return {name: content[name] for name in ("state_dict", "optimizer_states")}, [row for row in rows if any(row[1:])]


def equal(one: Any, other: Any) -> bool:
    """Return whether two trees are equal to the bit."""
    mine, shape = pytree.tree_flatten(one)
    theirs, other_shape = pytree.tree_flatten(other)
    return shape == other_shape and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(mine, theirs, strict=True)
    )


@dataclass
class Tally:
    """What was found with one way of writing."""

    kills: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    ends: int = 0
    equal: int = 0
    missing: int = 0


class Killer:
    """Runs, kills and compares.

    Args:
        at: folder of configs, runs and logs.
        steps: of a run.
        seed: of the moments.
    """

    def __init__(self, at: Path, steps: int, seed: int) -> None:
        self.at, self.steps = at, steps
        self.drawn = random.Random(seed)
        self.tallies = {writer: Tally() for writer in WRITERS}
        self.write_config("undisturbed", "in place")
        began = time.monotonic()
        if code := ended(start(at, "undisturbed")):
            sys.exit(f"The undisturbed run ended with {code}:\n{(at / 'undisturbed.log').read_text()}")
        self.seconds = time.monotonic() - began
        self.wanted = end_of(at / "undisturbed")
        self.size = (at / "undisturbed" / "checkpoints" / "last.ckpt").stat().st_size

    def write_config(self, run: str, writer: str) -> None:
        """Write what a run is started with."""
        text = yaml.safe_dump(config(self.steps, self.at / "cache", writer))
        (self.at / f"{run}.yaml").write_text(text, encoding="utf-8")

    def kill(self, writer: str, run: str) -> bool:
        """Start a run and kill it; return whether it came to its end first."""
        tally = self.tallies[writer]
        moment = self.drawn.choice(MOMENTS[1:]) if self.drawn.random() < 0.6 else MOMENTS[0]
        if moment == MOMENTS[0]:
            child = start(self.at, run)
            time.sleep(self.drawn.uniform(0.0, self.seconds))
            os.kill(child, signal.SIGKILL)  # nothing where it ended already: it is waited for below
        else:
            number, share = self.drawn.randint(1, max(2, self.steps // 12)), self.drawn.random()
            child = start(self.at, run, lambda: arm(moment, number, share, self.size))
        code = ended(child)
        if code == 0:
            return True
        if code != -signal.SIGKILL:
            tally.wrong.append(f"{run}: ended with {code}: {(self.at / f'{run}.log').read_text()[-300:]}")
            return False
        tally.kills[moment] += 1
        try:
            found = recovery.newest_whole(self.at / run / "checkpoints")
            tally.whole[moment] += found is None or not found.damaged
        except Exception as error:
            tally.wrong.append(f"{run}, {moment}: {error}")
        return False

    def compare(self, writer: str, run: str) -> None:
        """Count a run that came to its end."""
        tally = self.tallies[writer]
        tally.ends += 1
        (weights, rows), (wanted, logged) = end_of(self.at / run), self.wanted
        if equal(weights, wanted):
            tally.equal += 1
        else:
            tally.wrong.append(f"{run}: ended with other weights than the undisturbed run")
        if strange := [row for row in rows if row not in logged]:
            tally.wrong.append(f"{run}: logged {strange[0]}, unlike the undisturbed run")
        tally.missing += len(logged) - len(rows)

    def work(self, writer: str, kills: int, advance: Callable[[], None]) -> None:
        """Kill runs so often, and let the last of them come to its end."""
        number = 0
        while True:
            run = f"{'plain' if writer == 'in place' else 'thread'}-{number}"
            self.write_config(run, writer)
            finished = False
            while not finished and (done := sum(self.tallies[writer].kills.values())) < kills:
                finished = self.kill(writer, run)
                if sum(self.tallies[writer].kills.values()) > done:
                    advance()
                if self.tallies[writer].wrong:
                    return
            if not finished and (code := ended(start(self.at, run))):
                self.tallies[writer].wrong.append(f"{run}: ended with {code}")
                return
            self.compare(writer, run)
            if not finished:
                return
            number += 1


def table(killer: Killer) -> list[str]:
    """Return the lines of both tables, in Markdown."""
    lines = ["", "| checkpoints written | killed at | kills | newest checkpoint whole |", "|---|---|---|---|"]
    for writer, tally in killer.tallies.items():
        lines += [f"| {writer} | {one} | {tally.kills[one]} | {tally.whole[one]} |" for one in MOMENTS]
        lines.append(f"| {writer} | all | {tally.kills.total()} | {tally.whole.total()} |")
    lines += [
        "",
        "| checkpoints written | runs ended | weights, optimiser equal, bit for bit | rows missing in the log |",
    ]
    lines += ["|---|---|---|---|"]
    for writer, tally in killer.tallies.items():
        rows = tally.ends * len(killer.wanted[1])
        lines.append(f"| {writer} | {tally.ends} | {tally.equal} | {tally.missing} of {rows} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=positive, default=50)
    parser.add_argument("--steps", type=positive, default=90, help="optimiser steps of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="all counts; - for standard output, instead of the table")
    parser.add_argument("--markdown", metavar="FILE", help="the table")
    arguments = parser.parse_args()
    import memtx.cli.fit  # noqa: F401  once, before the forks

    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        task = bar.add_task("the undisturbed run", total=arguments.kills)
        killer = Killer(Path(folder), arguments.steps, arguments.seed)
        bar.update(task, description="kills")
        half = arguments.kills // 2
        stopped = False
        try:
            for writer, kills in zip(WRITERS, (arguments.kills - half, half), strict=True):
                killer.work(writer, kills, lambda: bar.advance(task))
        except KeyboardInterrupt:
            stopped = True
    where = machine(torch.device("cpu"))
    head = f"{headline(where)}; {arguments.steps} steps, seed {arguments.seed}{', stopped early' if stopped else ''}"
    wrong = [one for tally in killer.tallies.values() for one in tally.wrong]
    results = {
        "machine": where,
        "seed": arguments.seed,
        "steps": arguments.steps,
        "writers": {writer: {**vars(tally)} for writer, tally in killer.tallies.items()},
        "wrong": wrong,
    }
    deliver(arguments, results, [head, *table(killer)])
    for one in wrong[:10]:
        print(one, file=sys.stderr)
    whole = all(tally.kills == tally.whole for tally in killer.tallies.values())
    same = all(tally.ends == tally.equal for tally in killer.tallies.values())
    return 0 if whole and same and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())

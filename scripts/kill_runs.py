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
from measuring import format_machine, machine_info, positive_int, progress_bar, write_results
from torch.utils import _pytree as pytree

from memtx.checkpoint import checksummed_zip, recovery
from memtx.checkpoint.pretrained import read_checkpoint
from memtx.cli.main import main as memtx

KILL_POINTS = ("a random time", "a byte", "before the sync", "before the rename", "after the rename")
WRITERS = {
    "in place": "memtx.checkpoint.training.AtomicCheckpointIO",
    "in a thread": "memtx.checkpoint.async_io.AsyncAtomicCheckpointIO",
}
COMPARED_COLUMNS = ("step", "train_loss", "val_loss", "val_bits_per_byte", "grad_norm")


def make_config(steps: int, cache: Path, writer: str) -> dict[str, Any]:
    memory = {
        "class_path": "memtx.CompressedMemory",
        "init_args": {"window": 32, "compression_rate": 4, "num_entries": 8},
    }
    model = {"dim": 48, "depth": 2, "heads": 2, "dropout": 0.1, "memories": [memory]}
    return {
        "seed_everything": 0,
        "data": {
            "root": "embedded", "batch_size": 2, "segment_length": 32, "bptt_segments": 2, "eval_tokens": 512,
            "cache_dir": str(cache), "num_workers": 1,
        },
        "model": {"model": {"class_path": "memtx.MemoryTransformer", "init_args": model}, "measure_memory_gain": False},
        "checkpoint": {"every_n_train_steps": 3},
        "trainer": {
            "max_steps": steps, "max_epochs": -1, "val_check_interval": 20, "check_val_every_n_epoch": None,
            "log_every_n_steps": 1, "accelerator": "cpu", "plugins": [{"class_path": WRITERS[writer]}],
        },
    }  # fmt: skip


def kill_self(*_: Any, **options: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def arm_kill(kill_point: str, write_index: int, fraction: float, checkpoint_bytes: int) -> None:
    """Have this process die within its checkpoint write of a number, from 1."""
    began = Counter[str]()
    written = [0]
    write, replace, fsync = checksummed_zip.ChecksummedZipWriter.write, os.replace, os.fsync
    seal, init = checksummed_zip.ChecksummedZipWriter.finalize, checksummed_zip.ChecksummedZipWriter.__init__

    def init_and_count(self: checksummed_zip.ChecksummedZipWriter, path: Path) -> None:
        began["writes"] += 1
        written[0] = 0
        init(self, path)

    def write_until_byte(self: checksummed_zip.ChecksummedZipWriter, data: Any) -> int:
        written[0] += memoryview(data).nbytes
        if began["writes"] == write_index and written[0] >= fraction * checkpoint_bytes:
            part = memoryview(data).cast("B")
            write(self, part[: int(fraction * len(part))])
            self._file.flush()
            kill_self()
        return write(self, data)

    def fsync_or_die(handle: Any) -> None:
        if began["writes"] == write_index:
            kill_self()
        fsync(handle)

    def replace_or_die(source: Any, target: Any) -> None:
        mine = began["writes"] == write_index and str(target).endswith(".ckpt")
        if mine and kill_point == "before the rename":
            kill_self()
        replace(source, target)
        if mine:
            kill_self()

    checksummed_zip.ChecksummedZipWriter.__init__ = init_and_count  # type: ignore[method-assign]
    if kill_point == "a byte":
        checksummed_zip.ChecksummedZipWriter.write = write_until_byte  # type: ignore[method-assign]
        # The file may be shorter than the one that its size was taken from.
        checksummed_zip.ChecksummedZipWriter.finalize = lambda self, step: (  # type: ignore[method-assign]
            kill_self() if began["writes"] == write_index else seal(self, step)
        )
    elif kill_point == "before the sync":
        os.fsync = fsync_or_die  # type: ignore[assignment]
    else:
        os.replace = replace_or_die  # type: ignore[assignment]


def start_run(folder: Path, run: str, setup: Callable[[], None] | None = None) -> int:
    """Fork a process that trains ``run`` from where it is; return its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.chdir(folder)
        log = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if setup is not None:
            setup()
        code = memtx(["fit", "--config", f"{run}.yaml", "--run_dir", run, "--ckpt_path", "last"])
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for_exit(pid: int) -> int:
    """Return the exit code of a process, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def final_state(run_dir: Path) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Return the last checkpoint's weights and optimiser states, and what was logged of each step but its speed."""
    content = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    with (run_dir / "metrics.csv").open() as file:
        rows = [tuple(row.get(name) or "" for name in COMPARED_COLUMNS) for row in csv.DictReader(file)]
    return {name: content[name] for name in ("state_dict", "optimizer_states")}, [row for row in rows if any(row[1:])]


def trees_equal(actual: Any, expected: Any) -> bool:
    """Return whether two trees are equal to the bit."""
    mine, shape = pytree.tree_flatten(actual)
    theirs, other_shape = pytree.tree_flatten(expected)
    return shape == other_shape and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(mine, theirs, strict=True)
    )


@dataclass
class Tally:
    """What was found with one way of writing."""

    kills: Counter[str] = field(default_factory=Counter)
    intact: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    finished: int = 0
    identical: int = 0
    missing_rows: int = 0


class Killer:
    """Runs, kills and compares.

    Args:
        folder: folder of configs, runs and logs.
        steps: of a run.
        seed: of the moments.
    """

    def __init__(self, folder: Path, steps: int, seed: int) -> None:
        self.folder, self.steps = folder, steps
        self.rng = random.Random(seed)
        self.tallies = {writer: Tally() for writer in WRITERS}
        self.write_config("undisturbed", "in place")
        began = time.monotonic()
        if code := wait_for_exit(start_run(folder, "undisturbed")):
            sys.exit(f"The undisturbed run ended with {code}:\n{(folder / 'undisturbed.log').read_text()}")
        self.run_seconds = time.monotonic() - began
        self.expected = final_state(folder / "undisturbed")
        self.checkpoint_bytes = (folder / "undisturbed" / "checkpoints" / "last.ckpt").stat().st_size

    def write_config(self, run: str, writer: str) -> None:
        """Write what a run is started with."""
        text = yaml.safe_dump(make_config(self.steps, self.folder / "cache", writer))
        (self.folder / f"{run}.yaml").write_text(text, encoding="utf-8")

    def kill(self, writer: str, run: str) -> bool:
        """Start a run and kill it; return whether it came to its end first."""
        tally = self.tallies[writer]
        moment = self.rng.choice(KILL_POINTS[1:]) if self.rng.random() < 0.6 else KILL_POINTS[0]
        if moment == KILL_POINTS[0]:
            child = start_run(self.folder, run)
            time.sleep(self.rng.uniform(0.0, self.run_seconds))
            os.kill(child, signal.SIGKILL)  # nothing where it ended already: it is waited for below
        else:
            number, share = self.rng.randint(1, max(2, self.steps // 12)), self.rng.random()
            child = start_run(self.folder, run, lambda: arm_kill(moment, number, share, self.checkpoint_bytes))
        code = wait_for_exit(child)
        if code == 0:
            return True
        if code != -signal.SIGKILL:
            tally.failures.append(f"{run}: ended with {code}: {(self.folder / f'{run}.log').read_text()[-300:]}")
            return False
        tally.kills[moment] += 1
        try:
            found = recovery.find_latest_valid(self.folder / run / "checkpoints")
            tally.intact[moment] += found is None or not found.damaged
        except Exception as error:
            tally.failures.append(f"{run}, {moment}: {error}")
        return False

    def compare(self, writer: str, run: str) -> None:
        """Count a run that came to its end."""
        tally = self.tallies[writer]
        tally.finished += 1
        (weights, rows), (wanted, logged) = final_state(self.folder / run), self.expected
        if trees_equal(weights, wanted):
            tally.identical += 1
        else:
            tally.failures.append(f"{run}: ended with other weights than the undisturbed run")
        if strange := [row for row in rows if row not in logged]:
            tally.failures.append(f"{run}: logged {strange[0]}, unlike the undisturbed run")
        tally.missing_rows += len(logged) - len(rows)

    def kill_repeatedly(self, writer: str, kills: int, advance: Callable[[], None]) -> None:
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
                if self.tallies[writer].failures:
                    return
            if not finished and (code := wait_for_exit(start_run(self.folder, run))):
                self.tallies[writer].failures.append(f"{run}: ended with {code}")
                return
            self.compare(writer, run)
            if not finished:
                return
            number += 1


def format_tables(killer: Killer) -> list[str]:
    """Return the lines of both tables, in Markdown."""
    lines = ["", "| checkpoints written | killed at | kills | newest checkpoint whole |", "|---|---|---|---|"]
    for writer, tally in killer.tallies.items():
        lines += [f"| {writer} | {one} | {tally.kills[one]} | {tally.intact[one]} |" for one in KILL_POINTS]
        lines.append(f"| {writer} | all | {tally.kills.total()} | {tally.intact.total()} |")
    lines += [
        "",
        "| checkpoints written | runs ended | weights, optimiser equal, bit for bit | rows missing in the log |",
    ]
    lines += ["|---|---|---|---|"]
    for writer, tally in killer.tallies.items():
        rows = tally.finished * len(killer.expected[1])
        lines.append(f"| {writer} | {tally.finished} | {tally.identical} | {tally.missing_rows} of {rows} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=positive_int, default=50)
    parser.add_argument("--steps", type=positive_int, default=90, help="optimiser steps of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="all counts; - for standard output, instead of the table")
    parser.add_argument("--markdown", metavar="FILE", help="the table")
    arguments = parser.parse_args()
    import memtx.cli.fit  # noqa: F401  once, before the forks

    with tempfile.TemporaryDirectory() as folder, progress_bar() as bar:
        task = bar.add_task("the undisturbed run", total=arguments.kills)
        killer = Killer(Path(folder), arguments.steps, arguments.seed)
        bar.update(task, description="kills")
        half = arguments.kills // 2
        stopped = False
        try:
            for writer, kills in zip(WRITERS, (arguments.kills - half, half), strict=True):
                killer.kill_repeatedly(writer, kills, lambda: bar.advance(task))
        except KeyboardInterrupt:
            stopped = True
    where = machine_info(torch.device("cpu"))
    head = (
        f"{format_machine(where)}; {arguments.steps} steps, seed {arguments.seed}{', stopped early' if stopped else ''}"
    )
    wrong = [one for tally in killer.tallies.values() for one in tally.failures]
    results = {
        "machine": where,
        "seed": arguments.seed,
        "steps": arguments.steps,
        "writers": {writer: {**vars(tally)} for writer, tally in killer.tallies.items()},
        "failures": wrong,
    }
    write_results(arguments, results, [head, *format_tables(killer)])
    for one in wrong[:10]:
        print(one, file=sys.stderr)
    whole = all(tally.kills == tally.intact for tally in killer.tallies.values())
    same = all(tally.finished == tally.identical for tally in killer.tallies.values())
    return 0 if whole and same and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())

"""Kill a run repeatedly, at random times and within checkpoint writes: its final state must not change.

    python scripts/kill_runs.py [--kills 50] [--steps 90] [--seed 0] [--json FILE] [--markdown FILE]

A small run on the texts that come with Python is trained undisturbed. The same run is then started, killed by SIGKILL
and resumed by `--ckpt_path last`, half of the kills with checkpoints written in place and half with checkpoints written
by a thread. A kill comes after a random time or within a write: at a random byte, before the sync, before the rename or
after it. If the run finishes before all kills are used, another run starts. After each kill, the newest checkpoint must
be valid; at each end, weights, optimizer states and all logged rows must equal the undisturbed run's, bit for bit. Rows
may be missing: Lightning logs a step after the callbacks that save, so a kill between the two leaves the checkpoint of
a step that was not logged. Ctrl-C ends the script with the results so far.
"""

from __future__ import annotations

import argparse
import csv
import itertools
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
from benchmarking import add_output_options, add_size_options, format_machine, machine_info, progress_bar, write_results
from torch.utils import _pytree as pytree

from memtx.checkpoint import recovery
from memtx.checkpoint.checksummed_zip import ChecksummedZipWriter
from memtx.checkpoint.pretrained import read_checkpoint
from memtx.cli.main import main as memtx

KILL_POINTS = ("a random time", "a byte", "before the sync", "before the rename", "after the rename")
WRITERS = {
    "in place": "memtx.checkpoint.training.AtomicCheckpointIO",
    "in a thread": "memtx.checkpoint.async_io.AsyncAtomicCheckpointIO",
}
COMPARED_COLUMNS = ("step", "train_loss", "val_loss", "val_bits_per_byte", "grad_norm")


def make_config(steps: int, cache: Path, writer: str) -> dict[str, Any]:
    """Return the config of a small run."""
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


def kill_self() -> Any:
    """Kill this process by SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm_kill(kill_point: str, write_index: int, fraction: float, checkpoint_bytes: int) -> None:
    """Make this process kill itself within its checkpoint write number ``write_index``, counted from 1."""
    num_writes = num_bytes = 0
    init, write, finalize = ChecksummedZipWriter.__init__, ChecksummedZipWriter.write, ChecksummedZipWriter.finalize
    replace, fsync = os.replace, os.fsync

    def init_and_count(self: ChecksummedZipWriter, path: Path) -> None:
        nonlocal num_writes, num_bytes
        num_writes, num_bytes = num_writes + 1, 0
        init(self, path)

    def write_until_byte(self: ChecksummedZipWriter, data: Any) -> int:
        nonlocal num_bytes
        num_bytes += memoryview(data).nbytes
        if num_writes == write_index and num_bytes >= fraction * checkpoint_bytes:
            chunk = memoryview(data).cast("B")
            write(self, chunk[: int(fraction * len(chunk))])
            self._file.flush()
            kill_self()
        return write(self, data)

    def fsync_or_die(handle: Any) -> None:
        if num_writes == write_index:
            kill_self()
        fsync(handle)

    def replace_or_die(source: Any, target: Any) -> None:
        is_target = num_writes == write_index and str(target).endswith(".ckpt")
        if is_target and kill_point == "before the rename":
            kill_self()
        replace(source, target)
        if is_target:
            kill_self()

    ChecksummedZipWriter.__init__ = init_and_count  # type: ignore[method-assign]
    if kill_point == "a byte":
        ChecksummedZipWriter.write = write_until_byte  # type: ignore[method-assign]
        # The file may be shorter than the undisturbed run's.
        ChecksummedZipWriter.finalize = lambda self, step: (  # type: ignore[method-assign]
            kill_self() if num_writes == write_index else finalize(self, step)
        )
    elif kill_point == "before the sync":
        os.fsync = fsync_or_die  # type: ignore[assignment]
    else:
        os.replace = replace_or_die  # type: ignore[assignment]


def start_run(folder: Path, run: str, setup: Callable[[], None] | None = None) -> int:
    """Fork a process that starts or resumes ``run``; return its id."""
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
    """Return the exit code of a process, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def final_state(run_dir: Path) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Return weights and optimizer states of the last checkpoint, and the logged rows without speeds."""
    content = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    with (run_dir / "metrics.csv").open() as file:
        rows = [tuple(row.get(name) or "" for name in COMPARED_COLUMNS) for row in csv.DictReader(file)]
    return {name: content[name] for name in ("state_dict", "optimizer_states")}, [row for row in rows if any(row[1:])]


def trees_equal(actual: Any, expected: Any) -> bool:
    """Return True if two trees are equal, bit for bit."""
    leaves, structure = pytree.tree_flatten(actual)
    expected_leaves, expected_structure = pytree.tree_flatten(expected)
    return structure == expected_structure and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(leaves, expected_leaves, strict=True)
    )


@dataclass
class Tally:
    """Results of one writer."""

    kills: Counter[str] = field(default_factory=Counter)
    intact: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    finished: int = 0
    identical: int = 0
    missing_rows: int = 0


class Killer:
    """Starts, kills and compares runs.

    Args:
        folder: Folder of configs, runs and logs.
        steps: Optimizer steps of a run.
        seed: Seed of the kill points.
    """

    def __init__(self, folder: Path, steps: int, seed: int) -> None:
        self.folder, self.steps = folder, steps
        self.rng = random.Random(seed)
        self.tallies = {writer: Tally() for writer in WRITERS}
        self.write_config("undisturbed", "in place")
        start = time.monotonic()
        if code := wait_for_exit(start_run(folder, "undisturbed")):
            sys.exit(f"The undisturbed run exited with code {code}:\n{(folder / 'undisturbed.log').read_text()}")
        self.run_seconds = time.monotonic() - start
        self.expected = final_state(folder / "undisturbed")
        self.checkpoint_bytes = (folder / "undisturbed" / "checkpoints" / "last.ckpt").stat().st_size

    def write_config(self, run: str, writer: str) -> None:
        """Write the config of a run."""
        text = yaml.safe_dump(make_config(self.steps, self.folder / "cache", writer))
        (self.folder / f"{run}.yaml").write_text(text, encoding="utf-8")

    def kill(self, writer: str, run: str) -> bool:
        """Start a run and kill it; return True if it finished first."""
        tally = self.tallies[writer]
        kill_point = self.rng.choice(KILL_POINTS[1:]) if self.rng.random() < 0.6 else KILL_POINTS[0]
        if kill_point == KILL_POINTS[0]:
            child = start_run(self.folder, run)
            time.sleep(self.rng.uniform(0.0, self.run_seconds))
            os.kill(child, signal.SIGKILL)  # without effect on a finished run, which is waited for below
        else:
            index, fraction = self.rng.randint(1, max(2, self.steps // 12)), self.rng.random()
            child = start_run(self.folder, run, lambda: arm_kill(kill_point, index, fraction, self.checkpoint_bytes))
        code = wait_for_exit(child)
        if code == 0:
            return True
        if code != -signal.SIGKILL:
            tally.failures.append(f"{run}: exit code {code}: {(self.folder / f'{run}.log').read_text()[-300:]}")
            return False
        tally.kills[kill_point] += 1
        try:
            latest = recovery.find_latest_valid(self.folder / run / "checkpoints")
            tally.intact[kill_point] += latest is None or not latest.damaged
        except Exception as error:
            tally.failures.append(f"{run}, {kill_point}: {error}")
        return False

    def compare(self, writer: str, run: str) -> None:
        """Compare a finished run with the undisturbed one."""
        tally = self.tallies[writer]
        tally.finished += 1
        (state, rows), (expected_state, expected_rows) = final_state(self.folder / run), self.expected
        if trees_equal(state, expected_state):
            tally.identical += 1
        else:
            tally.failures.append(f"{run}: weights or optimizer state differ from the undisturbed run")
        if unexpected := [row for row in rows if row not in expected_rows]:
            tally.failures.append(f"{run}: logged {unexpected[0]}, unlike the undisturbed run")
        tally.missing_rows += len(expected_rows) - len(rows)

    def kill_repeatedly(self, writer: str, kills: int, advance: Callable[[], None]) -> None:
        """Kill runs ``kills`` times in all, and let the last of them finish."""
        tally = self.tallies[writer]
        for index in itertools.count():
            run = f"{'plain' if writer == 'in place' else 'thread'}-{index}"
            self.write_config(run, writer)
            is_finished = False
            while not is_finished and (num_kills := tally.kills.total()) < kills:
                is_finished = self.kill(writer, run)
                if tally.kills.total() > num_kills:
                    advance()
                if tally.failures:
                    return
            if not is_finished and (code := wait_for_exit(start_run(self.folder, run))):
                tally.failures.append(f"{run}: exit code {code}")
                return
            self.compare(writer, run)
            if not is_finished:
                return


def format_tables(killer: Killer) -> list[str]:
    """Format the kills and the finished runs as two Markdown tables."""
    lines = ["", "| checkpoints written | killed at | kills | newest checkpoint intact |", "|---|---|---|---|"]
    for writer, tally in killer.tallies.items():
        lines += [f"| {writer} | {point} | {tally.kills[point]} | {tally.intact[point]} |" for point in KILL_POINTS]
        lines.append(f"| {writer} | all | {tally.kills.total()} | {tally.intact.total()} |")
    lines += [
        "",
        "| checkpoints written | runs finished | weights and optimizer equal, bit for bit | rows missing in the log |",
        "|---|---|---|---|",
    ]
    for writer, tally in killer.tallies.items():
        rows = tally.finished * len(killer.expected[1])
        lines.append(f"| {writer} | {tally.finished} | {tally.identical} | {tally.missing_rows} of {rows} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, kills=50, steps=90)
    parser.add_argument("--seed", type=int, default=0)
    add_output_options(parser)
    arguments = parser.parse_args()
    import memtx.cli.fit  # noqa: F401  Once, before the forks.

    with tempfile.TemporaryDirectory() as folder, progress_bar() as bar:
        task = bar.add_task("the undisturbed run", total=arguments.kills)
        killer = Killer(Path(folder), arguments.steps, arguments.seed)
        bar.update(task, description="kills")
        half = arguments.kills // 2
        is_interrupted = False
        try:
            for writer, kills in zip(WRITERS, (arguments.kills - half, half), strict=True):
                killer.kill_repeatedly(writer, kills, lambda: bar.advance(task))
        except KeyboardInterrupt:
            is_interrupted = True
    machine = machine_info(torch.device("cpu"))
    title = f"{format_machine(machine)}; {arguments.steps} steps, seed {arguments.seed}"
    title += ", interrupted" if is_interrupted else ""
    failures = [failure for tally in killer.tallies.values() for failure in tally.failures]
    results = {
        "machine": machine, "seed": arguments.seed, "steps": arguments.steps,
        "writers": {writer: {**vars(tally)} for writer, tally in killer.tallies.items()}, "failures": failures,
    }  # fmt: skip
    write_results(arguments, results, [title, *format_tables(killer)])
    for failure in failures[:10]:
        print(failure, file=sys.stderr)
    tallies = killer.tallies.values()
    passed = all(tally.kills == tally.intact and tally.finished == tally.identical for tally in tallies)
    return 0 if passed and not failures else 1


if __name__ == "__main__":
    sys.exit(main())

"""Run the program on random and damaged input files: each is used, or refused with one line and exit code 2.

    python scripts/fuzz_inputs.py [--count 10000] [--seed 0] [--kinds text jsonl shards checkpoints configs]

hypothesis generates texts of arbitrary bytes, lines of JSON, damaged prepared folders and checkpoints, and configs with
replaced keys and values. The program's entry point is called in this process with its output captured; one in a hundred
refused inputs also runs in a separate process. Failures are a traceback, another exit code, more than one line, or a
file written for a refused input.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import corruption
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from memtx.cli.main import main as program

MEMORY = {
    "class_path": "memtx.CompressedMemory", "init_args": {"window": 8, "compression_rate": 4, "num_entries": 4},
}  # fmt: skip
MODEL = {
    "class_path": "memtx.MemoryTransformer", "init_args": {"dim": 16, "depth": 1, "heads": 2, "memories": [MEMORY]},
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "run_dir": "run",
    "data": {
        "root": "books", "batch_size": 2, "segment_length": 16, "bptt_segments": 1, "eval_batch_size": 2,
        "cache_dir": "cache", "num_workers": 1,
    },
    "model": {
        "model": MODEL,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "scheduler": {"class_path": "memtx.training.optimizers.WarmupCosine", "init_args": {"warmup_steps": 2}},
    },
    "checkpoint": {"every_n_train_steps": None},
    "trainer": {"max_epochs": -1, "limit_val_batches": 1, "num_sanity_val_steps": 0, "accelerator": "cpu"},
}  # fmt: skip
# Every config trains for one step on one device.
FIT = ("fit", "--config", "c.yaml", "--trainer.max_steps=1", "--trainer.devices=1", "--trainer.num_nodes=1")
PREPARE_OPTIONS = ("--output-dir", "out", "--num-workers", "1")
KIND_FRACTIONS = {"text": 0.34, "jsonl": 0.26, "checkpoints": 0.26, "shards": 0.08, "configs": 0.06}

PRESERVED = ("books", "tokens", "cache", ".originals")

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3),
    st.sampled_from([10**12, -(10**12), 10**30, float("nan"), float("inf"), -0.5, 1e-30]),
    st.sampled_from(["", " ", "text", "null", "1e3", "[", "memtx.MemoryTransformer", "torch.optim.Adam", "os.system"]),
    st.text(st.characters(exclude_characters="/~", exclude_categories=["Cs"]), max_size=12),
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncate": corruption.truncate, "flip": corruption.flip_bit, "noise": corruption.overwrite_with_noise,
    "append": corruption.append_bytes, "replace": lambda content, rng: rng.randbytes(rng.randrange(1, 60)),
}  # fmt: skip
DAMAGE = st.tuples(st.sampled_from(sorted(DAMAGES)), st.integers(0, 2**32))


@dataclass
class Tally:
    """Outcomes of the inputs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    subprocess_runs: int = 0


def run_program(argv: tuple[str, ...]) -> tuple[int, str, str]:
    """Run the program in this process; return its exit code, its standard error and a traceback or ""."""
    streams = sys.stdout, sys.stderr
    output, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    sys.stdout, sys.stderr = output, errors
    trace, code = "", 1
    try:
        code = program(list(argv))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        trace = traceback.format_exc()
    finally:
        sys.stdout, sys.stderr = streams
    content: bytes = errors.buffer.getvalue()  # type: ignore[attr-defined]
    return code, content.decode("utf-8", "replace"), trace


def list_files() -> set[str]:
    """Return the files of the working folder, except caches and hidden files, which hold unfinished work."""
    return {
        path.as_posix()
        for path in Path().rglob("*")
        if path.is_file() and path.parts[0] != "cache" and not path.parts[0].startswith(".")
    }


def check_outcome(tally: Tally, argv: tuple[str, ...], input_kind: str, outputs: tuple[str, ...]) -> None:
    """Run the program and record the outcome; ``outputs`` names the folders that a success may write."""
    before = list_files()
    code, errors, trace = run_program(argv)
    outcome = f"{input_kind}: {'used' if code == 0 else 'refused' if code == 2 else f'code {code}'}"
    tally.outcomes[outcome] += 1
    lines = [line for line in errors.splitlines() if line.startswith("memtx")]
    problem = ""
    if trace or "Traceback" in errors:
        problem = "a traceback: " + (trace or errors).strip().splitlines()[-1][:300]
    elif code not in (0, 2):
        problem = f"exit code {code}: {errors[-200:]!r}"
    elif code == 2 and len(lines) != 1:
        problem = f"{len(lines)} lines: {errors[-300:]!r}"
    elif code == 2 and (new_files := list_files() - before):
        problem = f"wrote {sorted(new_files)[:3]}"
    if not problem and code == 2 and tally.outcomes[outcome] % 100 == 1:
        command = [sys.executable, "-m", "memtx", *argv]
        process = subprocess.run(command, capture_output=True, text=True, errors="replace")
        tally.subprocess_runs += 1
        if process.returncode != 2 or process.stderr.count("\n") != 1 or "Traceback" in process.stderr:
            problem = f"in a separate process: {process.returncode} {process.stderr[-300:]!r}"
    if problem:
        tally.failures.append(f"{input_kind}: {problem} {' '.join(trace.strip().splitlines()[-4:-1])}")
        if tally.failures.count(tally.failures[-1]) == 1:
            print(tally.failures[-1], file=sys.stderr, flush=True)
    for name in outputs:
        shutil.rmtree(name, ignore_errors=True)
    for path in Path().glob(".out*"):
        shutil.rmtree(path, ignore_errors=True)


def damage_file(source: Path, target: Path, damage: tuple[str, int]) -> None:
    """Write a damaged copy of a file; ``damage`` is its kind and its seed."""
    kind, random_seed = damage
    target.write_bytes(DAMAGES[kind](source.read_bytes(), random.Random(random_seed)))


TEXT = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.tuples(st.binary(min_size=1, max_size=4), st.integers(1, 200_000)).map(lambda pair: pair[0] * pair[1]),
    st.text(max_size=100).map(lambda text: text.encode("utf-16")),
)
ROW = st.one_of(
    st.binary(max_size=80),
    VALUES.map(lambda value: json.dumps({"text": value}).encode()),
    st.dictionaries(st.sampled_from(["text", "id", "x"]), VALUES).map(lambda row: json.dumps(row).encode()),
    st.sampled_from([b"[" * 3000, b'{"text": "\\ud800 a"}', b'{"text": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}"]),
)


def fuzz_text(tally: Tally, content: bytes) -> None:
    """Prepare a text of arbitrary bytes."""
    Path("input.txt").write_bytes(content)
    check_outcome(tally, ("prepare", "input.txt", *PREPARE_OPTIONS), "text", ("out",))


def fuzz_jsonl(tally: Tally, lines: list[bytes]) -> None:
    """Prepare lines that may be JSON."""
    Path("input.jsonl").write_bytes(b"\n".join(lines))
    options = ("--id-column", "id") if len(lines) % 2 else ()
    check_outcome(tally, ("prepare", "input.jsonl", *PREPARE_OPTIONS, *options), "jsonl", ("out",))


def fuzz_checkpoint(tally: Tally, damage: tuple[str, int]) -> None:
    """Read a text with a damaged checkpoint."""
    damage_file(Path(".originals/valid.ckpt"), Path("input.ckpt"), damage)
    check_outcome(tally, ("read", "short.txt", "--checkpoint", "input.ckpt", "--device", "cpu"), "checkpoint", ())


def fuzz_shard(tally: Tally, name: str, damage: tuple[str, int]) -> None:
    """Train on a prepared folder with a damaged file."""
    shutil.copytree(".originals/tokens", "tokens", dirs_exist_ok=True)
    damage_file(Path(name), Path(name), damage)
    Path("c.yaml").write_text(yaml.safe_dump({**CONFIG, "data": {**CONFIG["data"], "root": "tokens"}}))
    check_outcome(tally, FIT, "shards", ("run",))


def fuzz_config(tally: Tally, position: float, key: str | None, value: Any) -> None:
    """Train with a config in which a key or a value was replaced."""
    config = copy.deepcopy(CONFIG)
    items: list[tuple[Any, Any]] = []

    def collect(container: Any) -> None:
        for name in container if isinstance(container, dict) else range(len(container)):
            items.append((container, name))
            if isinstance(container[name], dict | list):
                collect(container[name])

    collect(config)
    container, name = items[min(int(position * len(items)), len(items) - 1)]
    if key is not None and isinstance(container, dict):
        container[key] = container.pop(name)
    else:
        container[name] = value
    Path("c.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    check_outcome(tally, FIT, "config", ())
    # The config may name any run_dir.
    for path in Path().iterdir():
        if path.is_dir() and path.name not in PRESERVED:
            shutil.rmtree(path)


def set_up() -> list[str]:
    """Write valid books, a prepared folder and a checkpoint; return the files of the prepared folder."""
    for split in ("train", "validation", "test"):
        (Path("books") / split).mkdir(parents=True)
        for index in range(3):
            (Path("books") / split / f"{index}.txt").write_text(f"Of the {split}, night {index} was dark.\n" * 9)
    Path("short.txt").write_text("It was dark.\n" * 3)
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG))
    for argv in (("prepare", "books", "--output-dir", "tokens", "--num-workers", "1"), FIT):
        code, errors, trace = run_program(argv)
        if code:
            sys.exit(f"{argv} failed: {errors}{trace}")
    Path(".originals").mkdir()
    shutil.copy("run/checkpoints/last.ckpt", ".originals/valid.ckpt")
    shutil.rmtree("run")
    shutil.copytree("tokens", ".originals/tokens")
    return sorted(path.as_posix() for path in Path("tokens").rglob("*") if path.is_file())


def run_examples(
    function: Callable[..., None], count: int, random_seed: int, *strategies: st.SearchStrategy[Any]
) -> None:
    """Call a function with ``count`` random inputs."""

    def run(arguments: tuple[Any, ...]) -> None:
        function(*arguments)

    if count:
        options = settings(
            max_examples=count, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        options(seed(random_seed)(given(st.tuples(*strategies))(run)))()


def fuzz(counts: dict[str, int], random_seed: int) -> Tally:
    """Run the program in the working folder on ``counts`` random inputs of each kind."""
    tally, names = Tally(), set_up()
    keys = st.none() | st.text(max_size=8) | st.sampled_from(["batch_sizes", "class_path", "init_args", "dim", "lr"])
    kinds: dict[str, tuple[Callable[..., None], tuple[st.SearchStrategy[Any], ...]]] = {
        "text": (fuzz_text, (TEXT,)), "jsonl": (fuzz_jsonl, (st.lists(ROW, min_size=1, max_size=5),)),
        "checkpoints": (fuzz_checkpoint, (DAMAGE,)), "shards": (fuzz_shard, (st.sampled_from(names), DAMAGE)),
        "configs": (fuzz_config, (st.floats(0, 1), keys, VALUES)),
    }  # fmt: skip
    for kind, (function, strategies) in kinds.items():
        run_examples(partial(function, tally), counts.get(kind, 0), random_seed, *strategies)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="number of inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KIND_FRACTIONS), default=list(KIND_FRACTIONS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    total = sum(KIND_FRACTIONS[kind] for kind in arguments.kinds)
    counts = {kind: round(arguments.count * KIND_FRACTIONS[kind] / total) for kind in arguments.kinds}
    start, cwd = time.monotonic(), Path.cwd()
    with tempfile.TemporaryDirectory() as root:
        os.chdir(root)
        try:
            tally = fuzz(counts, arguments.seed)
        finally:
            os.chdir(cwd)
    figures = {
        "inputs": tally.outcomes.total(), "outcomes": dict(tally.outcomes), "failures": len(tally.failures),
        "subprocess_runs": tally.subprocess_runs, "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip
    print(json.dumps(figures))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())

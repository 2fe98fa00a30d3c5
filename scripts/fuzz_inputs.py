"""Inputs that nobody means, given to the program as files: each is used, or refused in one line with exit code 2.

    python scripts/fuzz_inputs.py [--count 10000] [--seed 0] [--kinds text jsonl shards checkpoints configs]

Texts of any bytes, lines of JSON, prepared folders and checkpoints that were cut or changed, and configs with other
keys and values are drawn by hypothesis. The program's own entry is called in this process, its output caught; one in a
hundred of what was refused is given to a process of its own as well. What is not as promised is told: a traceback,
another exit code, more than one line, or a file that was left behind.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
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
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from memtx.cli.main import main as program

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "run_dir": "run",
    "data": {
        "root": "books",
        "batch_size": 2,
        "segment_length": 16,
        "bptt_segments": 1,
        "eval_batch_size": 2,
        "cache_dir": "cache",
        "num_workers": 1,
    },
    "model": {
        "model": {
            "class_path": "memtx.MemoryTransformer",
            "init_args": {
                "dim": 16,
                "depth": 1,
                "heads": 2,
                "memories": [
                    {
                        "class_path": "memtx.CompressedMemory",
                        "init_args": {"window": 8, "compression_rate": 4, "num_entries": 4},
                    }
                ],
            },
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "scheduler": {"class_path": "memtx.training.optimizers.WarmupCosine", "init_args": {"warmup_steps": 2}},
    },
    "checkpoint": {"every_n_train_steps": None},
    "trainer": {"max_epochs": -1, "limit_val_batches": 1, "num_sanity_val_steps": 0, "accelerator": "cpu"},
}
# Whatever a config says, one step on one device is all that is made of it.
FIT = ("fit", "--config", "c.yaml", "--trainer.max_steps=1", "--trainer.devices=1", "--trainer.num_nodes=1")
KIND_FRACTIONS = {"text": 0.34, "jsonl": 0.26, "checkpoints": 0.26, "shards": 0.08, "configs": 0.06}

PRESERVED = ("books", "tokens", "cache", ".kept")

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**12, -(10**12), 10**30, float("nan"), float("inf"), -0.5, 1e-30]),
    st.sampled_from(["", " ", "text", "null", "1e3", "[", "memtx.MemoryTransformer", "torch.optim.Adam", "os.system"]),
    st.text(st.characters(exclude_characters="/~", exclude_categories=["Cs"]), max_size=12),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


@dataclass
class Tally:
    """What became of the inputs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    subprocess_runs: int = 0


def run_program(argv: tuple[str, ...]) -> tuple[int, str, str]:
    """Return exit code, what was said on stderr, and the traceback, if any, of a call in this process."""
    before = sys.stdout, sys.stderr
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    sys.stdout, sys.stderr = out, err
    trace, code = "", 1
    try:
        code = program(list(argv))
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
    except BaseException:
        trace = traceback.format_exc()
    finally:
        sys.stdout, sys.stderr = before
    said = err.buffer.getvalue()  # type: ignore[attr-defined]
    return code, said.decode("utf-8", "replace"), trace


def list_files() -> set[str]:
    """Return the files here, but for caches and what waits to be gone on with, which are no results."""
    return {
        path.as_posix()
        for path in Path().rglob("*")
        if path.is_file() and path.parts[0] != "cache" and not path.parts[0].startswith(".")
    }


def check_outcome(tally: Tally, argv: tuple[str, ...], input_kind: str, outputs: tuple[str, ...]) -> None:
    """Call the program and note what became of it; ``outputs`` names what a success may leave."""
    before = list_files()
    code, said, trace = run_program(argv)
    kind = f"{input_kind}: {'used' if code == 0 else 'refused' if code == 2 else f'code {code}'}"
    tally.outcomes[kind] += 1
    lines = [line for line in said.splitlines() if line.startswith("memtx")]
    problem = ""
    if trace or "Traceback" in said:
        problem = "a traceback: " + (trace or said).strip().splitlines()[-1][:300]
    elif code not in (0, 2):
        problem = f"exit code {code}: {said[-200:]!r}"
    elif code == 2 and len(lines) != 1:
        problem = f"{len(lines)} lines: {said[-300:]!r}"
    elif code == 2 and (left := list_files() - before):
        problem = f"left behind {sorted(left)[:3]}"
    if not problem and code == 2 and tally.outcomes[kind] % 100 == 1:
        command = [sys.executable, "-m", "memtx", *argv]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        tally.subprocess_runs += 1
        if done.returncode != 2 or done.stderr.count("\n") != 1 or "Traceback" in done.stderr:
            problem = f"in a process of its own: {done.returncode} {done.stderr[-300:]!r}"
    if problem:
        shown = trace.strip().splitlines()[-4:-1] if trace else []
        tally.failures.append(f"{input_kind}: {problem} {' '.join(shown)}")
        if tally.failures.count(tally.failures[-1]) == 1:
            print(tally.failures[-1], file=sys.stderr, flush=True)
    for name in outputs:
        shutil.rmtree(name, ignore_errors=True)
    for path in Path().glob(".out*"):
        shutil.rmtree(path, ignore_errors=True)


def damage_content(content: bytes, position: float, kind: str, noise: bytes) -> bytes:
    """Return content that was cut, changed by a bit, filled, or replaced."""
    at = min(int(position * len(content)), len(content) - 1)
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ (1 << (len(noise) % 8))]) + content[at + 1 :]
    if kind == "fill":
        return content[:at] + noise + content[at + len(noise) :]
    return noise if kind == "other" else content + noise


DAMAGE = st.tuples(
    st.floats(0, 1), st.sampled_from(["cut", "flip", "fill", "other", "grow"]), st.binary(min_size=1, max_size=60)
)
TEXT = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.tuples(st.binary(min_size=1, max_size=4), st.integers(1, 200_000)).map(lambda one: one[0] * one[1]),
    st.text(max_size=100).map(lambda text: text.encode("utf-16")),
)
ROW = st.one_of(
    st.binary(max_size=80),
    VALUES.map(lambda value: json.dumps({"text": value}).encode()),
    st.dictionaries(st.sampled_from(["text", "id", "x"]), VALUES).map(lambda row: json.dumps(row).encode()),
    st.sampled_from([b"[" * 3000, b'{"text": "\\ud800 a"}', b'{"text": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}"]),
)


def fuzz_text(tally: Tally, content: bytes) -> None:
    """A text of any bytes is encoded."""
    Path("given.txt").write_bytes(content)
    check_outcome(tally, ("prepare", "given.txt", "--output-dir", "out", "--num-workers", "1"), "text", ("out",))


def fuzz_jsonl(tally: Tally, lines: list[bytes]) -> None:
    """Lines that may be JSON are encoded."""
    Path("given.jsonl").write_bytes(b"\n".join(lines))
    options = ("--id-column", "id") if len(lines) % 2 else ()
    check_outcome(
        tally, ("prepare", "given.jsonl", "--output-dir", "out", "--num-workers", "1", *options), "jsonl", ("out",)
    )


def fuzz_checkpoint(tally: Tally, damage: tuple[float, str, bytes]) -> None:
    """A checkpoint that was damaged reads a text."""
    whole = Path(".kept/whole.ckpt").read_bytes()
    Path("given.ckpt").write_bytes(damage_content(whole, *damage))
    check_outcome(tally, ("read", "short.txt", "--checkpoint", "given.ckpt", "--device", "cpu"), "checkpoint", ())


def fuzz_shard(tally: Tally, name: str, damage: tuple[float, str, bytes]) -> None:
    """A prepared folder with a damaged file trains."""
    shutil.copytree(".kept/tokens", "tokens", dirs_exist_ok=True)
    Path(name).write_bytes(damage_content(Path(name).read_bytes(), *damage))
    Path("c.yaml").write_text(yaml.safe_dump({**CONFIG, "data": {**CONFIG["data"], "root": "tokens"}}))
    check_outcome(tally, FIT, "shards", ("run",))


def fuzz_config(tally: Tally, position: float, key: str | None, value: Any) -> None:
    """A config with another key or another value trains."""
    config = copy.deepcopy(CONFIG)
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        for name in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, name))
            if isinstance(inner[name], dict | list):
                walk(inner[name])

    walk(config)
    inner, name = places[min(int(position * len(places)), len(places) - 1)]
    if key is not None and isinstance(inner, dict):
        inner[key] = inner.pop(name)
    else:
        inner[name] = value
    Path("c.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    check_outcome(tally, FIT, "config", ())
    # A run may have been asked for under any name.
    for path in Path().iterdir():
        if path.is_dir() and path.name not in PRESERVED:
            shutil.rmtree(path)


def set_up() -> list[str]:
    """Write books, a prepared folder and a checkpoint that are whole, and return the folder's files."""
    for split in ("train", "validation", "test"):
        (Path("books") / split).mkdir(parents=True)
        for number in range(3):
            (Path("books") / split / f"{number}.txt").write_text(f"Of the {split}, night {number} was dark.\n" * 9)
    Path("short.txt").write_text("It was dark.\n" * 3)
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG))
    for argv in (("prepare", "books", "--output-dir", "tokens", "--num-workers", "1"), FIT):
        code, said, trace = run_program(argv)
        if code:
            sys.exit(f"{argv} failed: {said}{trace}")
    Path(".kept").mkdir()
    shutil.copy("run/checkpoints/last.ckpt", ".kept/whole.ckpt")
    shutil.rmtree("run")
    shutil.copytree("tokens", ".kept/tokens")
    return sorted(path.as_posix() for path in Path("tokens").rglob("*") if path.is_file())


def run_examples(
    function: Callable[..., None], count: int, random_seed: int, *strategies: st.SearchStrategy[Any]
) -> None:
    """Call a function with ``count`` drawn inputs."""
    if count:
        options = settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        options(seed(random_seed)(given(*strategies)(function)))()


def fuzz(counts: dict[str, int], random_seed: int) -> Tally:
    """Give so many inputs of each kind to the program, in the working folder, and return what became of them."""
    tally, names = Tally(), set_up()
    keys = st.none() | st.text(max_size=8) | st.sampled_from(["batch_sizes", "class_path", "init_args", "dim", "lr"])
    run_examples(lambda content: fuzz_text(tally, content), counts.get("text", 0), random_seed, TEXT)
    run_examples(
        lambda lines: fuzz_jsonl(tally, lines),
        counts.get("jsonl", 0),
        random_seed,
        st.lists(ROW, min_size=1, max_size=5),
    )
    run_examples(lambda damage: fuzz_checkpoint(tally, damage), counts.get("checkpoints", 0), random_seed, DAMAGE)
    run_examples(
        lambda name, damage: fuzz_shard(tally, name, damage),
        counts.get("shards", 0),
        random_seed,
        st.sampled_from(names),
        DAMAGE,
    )
    run_examples(
        lambda place, key, value: fuzz_config(tally, place, key, value),
        counts.get("configs", 0),
        random_seed,
        st.floats(0, 1),
        keys,
        VALUES,
    )
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KIND_FRACTIONS), default=list(KIND_FRACTIONS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    whole = sum(KIND_FRACTIONS[kind] for kind in arguments.kinds)
    counts = {kind: round(arguments.count * KIND_FRACTIONS[kind] / whole) for kind in arguments.kinds}
    began, before = time.monotonic(), Path.cwd()
    with tempfile.TemporaryDirectory() as root:
        os.chdir(root)
        try:
            tally = fuzz(counts, arguments.seed)
        finally:
            os.chdir(before)
    figures = {
        "inputs": sum(tally.outcomes.values()),
        "outcomes": dict(tally.outcomes),
        "failures": len(tally.failures),
    }
    print(
        json.dumps({**figures, "subprocess_runs": tally.subprocess_runs, "seconds": round(time.monotonic() - began, 1)})
    )
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())

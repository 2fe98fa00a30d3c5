"""The benches at a tiny size: what they report is JSON, is complete and adds up; and the GPU machine's script."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HOME = Path(__file__).parents[1]
SCRIPTS = HOME / "scripts"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME), **environment}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=HOME, env=own)


def bench(name: str, *options: str | Path) -> Any:
    done = run(sys.executable, SCRIPTS / name, "--json", "-", "--num-threads", "1", "--peak-size", "64", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_step(tmp_path: Path) -> None:
    found = bench(
        "bench_step.py", "--systems", "memtx", "memformer", "--dtypes", "fp32", "--rounds", "1", "--steps", "3",
        "--batch-size", "2", "--segment-length", "16", "--dim", "16", "--depth", "2", "--heads", "2",
        "--vocab-size", "32", "--cache-length", "16", "--memory-length", "4",
        "--plot", tmp_path / "step.png", "--markdown", tmp_path / "step.md",
    )  # fmt: skip
    assert not found["failed"]
    rows = {row["mode"]: row for row in found["rows"] if row["system"] == "memtx"}
    assert set(rows) == {"train", "read"}
    for row in rows.values():
        rate = row["tokens_per_second"]
        assert rate["median"] > 0
        assert row["state_bytes"] == 2 * (2 * (16 + 3 + 4) * 16 * 4 + 8), "cache and bank, and the position"
        assert row["peak_bytes"] is None or row["peak_bytes"] > row["state_bytes"]
        peak, share = found["matrix_peak_flops"]["fp32"], row["fraction_of_matrix_peak"]
        assert share["median"] == pytest.approx(
            row["useful_flops_per_step"] * rate["median"] / (2 * 16) / peak["median"]
        )
    # Backward costs at most twice what forward does, and less by what carried states need not be given.
    ratio = rows["train"]["useful_flops_per_step"] / rows["read"]["useful_flops_per_step"]
    assert 2 < ratio < 3
    assert "memformer" in found["absent"] or any(row["system"] == "memformer" for row in found["rows"])
    assert (tmp_path / "step-train.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "step-read.png").exists()
    assert "| memtx fp32 |" in (tmp_path / "step.md").read_text()


def test_useful_operations_by_hand() -> None:
    """With nothing carried by the memory, the count is that of the matrices and the causal half of the scores."""
    command = (
        "import sys; sys.path.insert(0, 'scripts')\n"
        "from bench_step import useful_flops\n"
        "from peers import Job\n"
        "from memtx import MemoryTransformer, NoMemory, FeedForward\n"
        "job = Job(batch_size=2, segment_length=8, dim=16, depth=3, heads=2, vocab_size=32)\n"
        "model = MemoryTransformer(32, dim=16, depth=3, heads=2, memories=[NoMemory], feed_forward=FeedForward)\n"
        "print(useful_flops(model, job, 'read'), useful_flops(model, job, 'train'))"
    )
    done = run(sys.executable, "-c", command)
    assert done.returncode == 0, done.stderr
    read, train = map(float, done.stdout.split())
    tokens, seen = 2 * 8, 2 * 8 * 9 // 2
    matrices = 3 * (4 * 16 * 16 + 2 * 16 * 64) + 16 * 32
    assert read == 2 * tokens * matrices + 3 * 4 * seen * 16
    assert train == 3 * read


def test_attention(tmp_path: Path) -> None:
    found = bench(
        "bench_attention.py", "--dtypes", "fp32", "--repeats", "2", "--batch-size", "2", "--segment-length", "16",
        "--window", "16",
        "--lengths", "64", "128", "--heads", "2", "--head-dim", "16", "--plot", tmp_path / "attention.png",
        "--max-dense-gib", "0.0001",
    )  # fmt: skip
    rows = {(row["backend"], row["num_queries"], row["pass"]): row for row in found["rows"]}
    banded = rows["banded", 64, "forward"]
    # Window 16: the first 16 queries see 1 .. 16 positions, the others 16; 4 operations a pair and channel.
    assert banded["useful_flops"] == 4 * 2 * 16 * (16 * 17 // 2 + 48 * 16)
    assert rows["banded", 64, "forward+backward"]["useful_flops"] == 3 * banded["useful_flops"]
    assert rows["banded", 16, "forward"]["useful_flops"] == 4 * 2 * 16 * 2 * 16 * 16, "a full cache shows all 16"
    assert banded["fraction_of_matrix_peak"] == pytest.approx(
        banded["useful_flops"] / banded["seconds"]["median"] / banded["matrix_peak_flops"]
    )
    assert rows["sdpa-dense", 64, "forward"]["skipped_reason"] is None
    assert "too much memory" in rows["reference", 128, "forward"]["skipped_reason"]
    assert "gradient" in rows["flex", 16, "forward+backward"]["skipped_reason"]
    (slope,) = [one for one in found["slopes"] if one["backend"] == "banded" and one["pass"] == "forward"]
    assert (round(slope["from"]), round(slope["to"])) == (64, 128)
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_stream(tmp_path: Path) -> None:
    found = bench(
        "bench_stream.py", "--dim", "16", "--depth", "2", "--heads", "2", "--vocab-size", "32", "--window", "16",
        "--memory-length", "4", "--tokens", "128", "--call-lengths", "16", "40", "128", "--decode-tokens", "3",
        "--rounds", "2", "--plot", tmp_path / "stream.png",
    )  # fmt: skip
    (decoding,), (reading,) = found["decoding"], found["reading"]
    assert [(row["method"], row["position"]) for row in decoding["positions"]] == [
        (by, position) for by in ("decoder", "calls") for position in (2_000, 1_000_000)
    ]
    assert decoding["positions"][0]["ratio_to_first"] == 1.0
    assert [row["call_length"] for row in reading["calls"]] == [16, 40, 128]
    assert reading["tokens"] == 128
    assert all(row["equal"] for row in reading["calls"])
    # Other sums in other orders: a difference of exactly nothing would say that nothing was compared.
    assert 0 < max(row["loss_difference"] for row in reading["calls"]) < 1e-4
    assert len({row["state_bytes"] for row in reading["calls"]} | {decoding["state_bytes"]}) == 1
    assert (tmp_path / "stream-decoding.png").exists()


def test_a_device_that_is_not_there() -> None:
    done = run(sys.executable, SCRIPTS / "bench_stream.py", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "no GPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_rounds_are_refused() -> None:
    done = run(sys.executable, SCRIPTS / "bench_step.py", "--rounds", "0")
    assert done.returncode == 2
    assert "--rounds: is 0; give at least 1" in done.stderr


def test_gpu_script_says_what_is_missing(tmp_path: Path) -> None:
    done = run("bash", SCRIPTS / "gpu.sh", tmp_path, MEMTX_PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "CUDA build of torch" in done.stderr


def test_gpu_script_runs_every_part_and_tells_of_failures(tmp_path: Path) -> None:
    """With an interpreter that only takes notes, and fails at the benches of attention."""
    notes, stand_in = tmp_path / "notes", tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {notes}\ncase "$*" in *bench_attention*) exit 3;; esac\n')
    stand_in.chmod(0o755)
    done = run("bash", SCRIPTS / "gpu.sh", tmp_path / "out", MEMTX_PYTHON=str(stand_in))
    assert done.returncode == 1
    assert done.stdout.count("FAILED with exit code 3") == 2
    calls = [line for line in notes.read_text().splitlines() if not line.startswith("-c")]
    assert calls[0] == "-m pytest -m cuda"
    benches = [line.split() for line in calls[1:]]
    assert [call[0] for call in benches] == ["scripts/bench_attention.py"] * 2 + ["scripts/bench_step.py"] * 2 + [
        "scripts/bench_stream.py"
    ]
    for call in {call[0]: call for call in benches}.values():
        # The real one takes these options: it gets as far as to look for the GPU.
        real = run(sys.executable, *call, CUDA_VISIBLE_DEVICES="")
        assert "no GPU" in real.stderr, real.stderr


def test_gpu_script_ends_within_eight_minutes() -> None:
    text = (SCRIPTS / "gpu.sh").read_text()
    limits = [int(limit) for limit in re.findall(r"^(?:part|bench [\w-]+) (\d+) ", text, flags=re.MULTILINE)]
    assert len(limits) == 6
    assert sum(limits) <= 8 * 60


def test_replay(tmp_path: Path) -> None:
    done = run(
        sys.executable, SCRIPTS / "measure_replay.py", "--json", "-", "--num-threads", "1", "--bptt-segments", "3",
        "--batch-size", "2", "--segment-length", "8", "--dim", "8", "--depth", "1", "--heads", "2",
        "--vocab-size", "16", "--repeats", "1", "--memory", "recurrent",
        "--markdown", tmp_path / "replay.md", "--plot", tmp_path / "r.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["bptt_segments"], row["replay"]) for row in rows] == [(3, False), (3, True)]
    assert all(row["seconds"] > 0 and row["state_bytes"] == 2 * (7 * 8 * 4 + 8) for row in rows)
    assert "| 3 |" in (tmp_path / "replay.md").read_text()
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_killed_runs_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    options = ("--kills", "2", "--steps", "9", "--seed", "3", "--json", tmp_path / "kills.json")
    done = run(sys.executable, SCRIPTS / "kill_runs.py", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["failures"] == []
    for writer in found["writers"].values():
        assert sum(writer["kills"].values()) == sum(writer["intact"].values()) == 1
        assert writer["identical"] == writer["finished"] >= 1
    assert "| in a thread | all | 1 | 1 |" in done.stdout


def test_recall(tmp_path: Path) -> None:
    done = run(
        sys.executable, SCRIPTS / "measure_recall.py", "--json", "-", "--num-threads", "1",
        "--memories", "window", "slots", "--seeds", "0", "--steps", "2", "--batch-size", "2", "--dim", "8",
        "--num-samples", "4", "--distances", "1", "40", "--markdown", tmp_path / "recall.md",
        "--plot", tmp_path / "recall.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(row["memory"], row["seed"]) for row in found["rows"]] == [("window", 0), ("slots", 0)]
    assert all(0 <= share <= 1 for row in found["rows"] for share in row["accuracy"].values())
    assert "| 40 |" in (tmp_path / "recall.md").read_text()
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_compare_memories_keeps_what_it_found(tmp_path: Path) -> None:
    options = (
        "--tasks",
        "T1 recall",
        "--seeds",
        "0",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--dim",
        "8",
        "--max-distance",
        "3",
    )
    options = (*options, "--output-dir", tmp_path)
    first = bench("compare_memories.py", "--memories", "window", *options)
    one = first["figures"]["T1 recall/window/0"]
    assert set(one["accuracy"]) == {"3"}
    both = bench("compare_memories.py", "--memories", "window", "slots", *options, "--plot", tmp_path / "kinds.png")
    assert both["figures"]["T1 recall/window/0"] == one
    # Equal parameters: a step of the feed-forward width is all that may lie between.
    counts = [found["parameters"] for found in both["figures"].values()]
    assert len(counts) == 2
    assert max(counts) - min(counts) <= 2 * (2 * 8 + 1)
    assert (tmp_path / "kinds.png").read_bytes().startswith(b"\x89PNG")


def test_measure_retrofit_reads_in_every_way(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        (tmp_path / split).mkdir()
        for number in range(count):
            (tmp_path / split / f"{number}.txt").write_text(f"book {number} of {split}, and so on. " * 40)
    adapted = ["--lora-rank", "2"] if importlib.util.find_spec("peft") else []
    done = run(
        sys.executable, SCRIPTS / "measure_retrofit.py", "--root", tmp_path, "--json", "-", "--num-threads", "1",
        "--seeds", "0", "--steps", "10", "--batch-size", "2", "--window", "16", "--num-windows", "20", "--dim", "16",
        "--depth", "1", "--plot", tmp_path / "retrofit.png", *adapted,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "retrofit.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["variant"]: row for row in json.loads(done.stdout)["rows"]}
    assert len(rows) == 6 + 3 * bool(adapted)
    assert rows["all keys"]["state_bytes"] > 5 * rows["window, sinks and memory"]["state_bytes"]
    assert all(0 < value < 20 for row in rows.values() for value in row["ranges"])
    # Before the first border nothing tells the ways of one model apart.
    assert rows["cut off at every window"]["ranges"][0] == pytest.approx(
        rows["window and sinks"]["ranges"][0], abs=1e-5
    )

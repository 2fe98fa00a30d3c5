"""Scripts at a tiny size report complete and consistent JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO_ROOT = Path(__file__).parents[1]
SCRIPTS = REPO_ROOT / "scripts"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO_ROOT), **environment}
    arguments = [str(argument) for argument in command]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=REPO_ROOT, env=environment)


def bench(name: str, *options: str | Path) -> Any:
    process = run(sys.executable, SCRIPTS / name, "--json", "-", "--num-threads", "1", "--peak-size", "64", *options)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_bench_step_counts_flops_state_and_memory(tmp_path: Path) -> None:
    results = bench(
        "bench_step.py", "--systems", "memtx", "memformer", "--dtypes", "fp32", "--rounds", "1", "--steps", "3",
        "--batch-size", "2", "--segment-length", "16", "--dim", "16", "--depth", "2", "--heads", "2",
        "--vocab-size", "32", "--cache-length", "16", "--memory-length", "4",
        "--plot", tmp_path / "step.png", "--markdown", tmp_path / "step.md",
    )  # fmt: skip
    assert not results["failed"]
    rows = {row["mode"]: row for row in results["rows"] if row["system"] == "memtx"}
    assert set(rows) == {"train", "read"}
    for row in rows.values():
        rate = row["tokens_per_second"]
        assert rate["median"] > 0
        assert row["state_bytes"] == 2 * (2 * (16 + 3 + 4) * 16 * 4 + 8), "cache, bank and position"
        assert row["peak_bytes"] is None or row["peak_bytes"] > row["state_bytes"]
        peak, fraction = results["matrix_peak_flops"]["fp32"], row["fraction_of_matrix_peak"]
        assert fraction["median"] == pytest.approx(
            row["useful_flops_per_step"] * rate["median"] / (2 * 16) / peak["median"]
        )
    # Backward costs at most twice the forward pass, and less since carried states get no gradient.
    ratio = rows["train"]["useful_flops_per_step"] / rows["read"]["useful_flops_per_step"]
    assert 2 < ratio < 3
    assert "memformer" in results["absent"] or any(row["system"] == "memformer" for row in results["rows"])
    assert (tmp_path / "step-train.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "step-read.png").exists()
    assert "| memtx fp32 |" in (tmp_path / "step.md").read_text()


def test_useful_flops_equal_a_manual_count() -> None:
    """Without a memory, FLOPs are those of the matrices and the causal half of the scores."""
    command = (
        "import sys; sys.path.insert(0, 'scripts')\n"
        "from bench_step import useful_flops\n"
        "from peers import Job\n"
        "from memtx import MemoryTransformer, NoMemory, FeedForward\n"
        "job = Job(batch_size=2, segment_length=8, dim=16, depth=3, heads=2, vocab_size=32)\n"
        "model = MemoryTransformer(32, dim=16, depth=3, heads=2, memories=[NoMemory], feed_forward=FeedForward)\n"
        "print(useful_flops(model, job, 'read'), useful_flops(model, job, 'train'))"
    )
    process = run(sys.executable, "-c", command)
    assert process.returncode == 0, process.stderr
    read, train = map(float, process.stdout.split())
    tokens, pairs = 2 * 8, 2 * 8 * 9 // 2
    matrices = 3 * (4 * 16 * 16 + 2 * 16 * 64) + 16 * 32
    assert read == 2 * tokens * matrices + 3 * 4 * pairs * 16
    assert train == 3 * read


def test_bench_attention_counts_visible_pairs_and_skips_dense_backends(tmp_path: Path) -> None:
    results = bench(
        "bench_attention.py", "--dtypes", "fp32", "--repeats", "2", "--batch-size", "2", "--segment-length", "16",
        "--window", "16",
        "--lengths", "64", "128", "--heads", "2", "--head-dim", "16", "--plot", tmp_path / "attention.png",
        "--max-dense-gib", "0.0001",
    )  # fmt: skip
    rows = {(row["backend"], row["num_queries"], row["pass"]): row for row in results["rows"]}
    banded = rows["banded", 64, "forward"]
    # Window 16: the first 16 queries see 1 .. 16 positions, the others 16; 4 FLOPs per pair and channel.
    assert banded["useful_flops"] == 4 * 2 * 16 * (16 * 17 // 2 + 48 * 16)
    assert rows["banded", 64, "forward+backward"]["useful_flops"] == 3 * banded["useful_flops"]
    assert rows["banded", 16, "forward"]["useful_flops"] == 4 * 2 * 16 * 2 * 16 * 16, "a full cache shows all 16"
    assert banded["fraction_of_matrix_peak"] == pytest.approx(
        banded["useful_flops"] / banded["seconds"]["median"] / banded["matrix_peak_flops"]
    )
    assert rows["sdpa-dense", 64, "forward"]["skipped_reason"] is None
    assert "too much memory" in rows["reference", 128, "forward"]["skipped_reason"]
    assert "gradient" in rows["flex", 16, "forward+backward"]["skipped_reason"]
    (fit,) = [fit for fit in results["slopes"] if fit["backend"] == "banded" and fit["pass"] == "forward"]
    assert (round(fit["from"]), round(fit["to"])) == (64, 128)
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_bench_stream_gets_equal_results_from_all_call_lengths(tmp_path: Path) -> None:
    results = bench(
        "bench_stream.py", "--dim", "16", "--depth", "2", "--heads", "2", "--vocab-size", "32", "--window", "16",
        "--memory-length", "4", "--tokens", "128", "--call-lengths", "16", "40", "128", "--decode-tokens", "3",
        "--rounds", "2", "--plot", tmp_path / "stream.png",
    )  # fmt: skip
    (decoding,), (reading,) = results["decoding"], results["reading"]
    assert [(row["method"], row["position"]) for row in decoding["positions"]] == [
        (method, position) for method in ("decoder", "calls") for position in (2_000, 1_000_000)
    ]
    assert decoding["positions"][0]["ratio_to_first"] == 1.0
    assert [row["call_length"] for row in reading["calls"]] == [16, 40, 128]
    assert reading["tokens"] == 128
    assert all(row["equal"] for row in reading["calls"])
    # Sums in another order: a difference of exactly zero would mean that nothing was compared.
    assert 0 < max(row["loss_difference"] for row in reading["calls"]) < 1e-4
    assert len({row["state_bytes"] for row in reading["calls"]} | {decoding["state_bytes"]}) == 1
    assert (tmp_path / "stream-decoding.png").exists()


def test_a_missing_device_is_refused() -> None:
    process = run(sys.executable, SCRIPTS / "bench_stream.py", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 1
    assert "no GPU" in process.stderr
    assert "Traceback" not in process.stderr


def test_zero_rounds_are_refused() -> None:
    process = run(sys.executable, SCRIPTS / "bench_step.py", "--rounds", "0")
    assert process.returncode == 2
    assert "--rounds: is 0; give at least 1" in process.stderr


def test_measure_replay_compares_steps_with_and_without_replay(tmp_path: Path) -> None:
    process = run(
        sys.executable, SCRIPTS / "measure_replay.py", "--json", "-", "--num-threads", "1", "--bptt-segments", "3",
        "--batch-size", "2", "--segment-length", "8", "--dim", "8", "--depth", "1", "--heads", "2",
        "--vocab-size", "16", "--repeats", "1", "--memory", "recurrent",
        "--markdown", tmp_path / "replay.md", "--plot", tmp_path / "r.png",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    rows = json.loads(process.stdout)["rows"]
    assert [(row["bptt_segments"], row["replay"]) for row in rows] == [(3, False), (3, True)]
    assert all(row["seconds"] > 0 and row["state_bytes"] == 2 * (7 * 8 * 4 + 8) for row in rows)
    assert "| 3 |" in (tmp_path / "replay.md").read_text()
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_killed_runs_end_like_undisturbed_ones(tmp_path: Path) -> None:
    options = ("--kills", "2", "--steps", "9", "--seed", "3", "--json", tmp_path / "kills.json")
    process = run(sys.executable, SCRIPTS / "kill_runs.py", *options)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "kills.json").read_text())
    assert results["failures"] == []
    for writer in results["writers"].values():
        assert sum(writer["kills"].values()) == sum(writer["intact"].values()) == 1
        assert writer["identical"] == writer["finished"] >= 1
    assert "| in a thread | all | 1 | 1 |" in process.stdout


def test_compare_memories_measures_recall_at_any_distance(tmp_path: Path) -> None:
    results = bench(
        "compare_memories.py", "--tasks", "T1 recall", "--memories", "window", "slots", "--seeds", "0", "--steps", "2",
        "--batch-size", "2", "--dim", "8", "--hidden-dim", "32", "--num-samples", "4", "--distances", "1", "40",
        "--output-dir", tmp_path, "--markdown", tmp_path / "recall.md", "--plot", tmp_path / "recall.png",
    )  # fmt: skip
    assert list(results["figures"]) == ["T1 recall/window/0", "T1 recall/slots/0"]
    for figures in results["figures"].values():
        assert list(figures["accuracy"]) == ["1", "40"]
        assert all(0 <= accuracy <= 1 for accuracy in figures["accuracy"].values())
    assert "| 40 segments |" in (tmp_path / "recall.md").read_text()
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_compare_babilong_adds_rows_to_those_it_saved(tmp_path: Path) -> None:
    story = "1 Ann moved to the garden.\n2 Bob went to the attic.\n3 Where is Ann?\tgarden\t1\n"
    for split in ("train", "test"):
        (tmp_path / f"qa1_where_{split}.txt").write_text(story * 20)
    options = (
        "--babi-dir", tmp_path, "--root", "embedded", "--seconds", "1", "--dim", "8", "--batch-size", "4",
        "--vocab-size", "300", "--num-samples", "2", "--output-dir", tmp_path, "--json", "-", "--curricula", "yes",
    )  # fmt: skip
    for memories in (["RMT"], ["RMT", "ARMT", "gated delta net"]):
        process = run(sys.executable, SCRIPTS / "compare_babilong.py", *options, "--memories", *memories)
        assert process.returncode == 0, process.stderr
        rows = json.loads(process.stdout.splitlines()[-1])["rows"]
        assert list(rows) == [f"{memory}/yes/0" for memory in memories]
        assert all(set(row["accuracy"]) == {"1", "2", "10"} and row["chance"] == 1.0 for row in rows.values())


def test_compare_memories_continues_from_saved_figures(tmp_path: Path) -> None:
    options = (
        "--tasks", "T1 recall", "--seeds", "0", "--steps", "1", "--batch-size", "2", "--dim", "8", "--distances", "3",
        "--output-dir", tmp_path,
    )  # fmt: skip
    first = bench("compare_memories.py", "--memories", "window", *options)
    window = first["figures"]["T1 recall/window/0"]
    assert set(window["accuracy"]) == {"3"}
    both = bench("compare_memories.py", "--memories", "window", "slots", *options, "--plot", tmp_path / "memories.png")
    assert both["figures"]["T1 recall/window/0"] == window
    # Equal parameters, up to one step of the feed-forward width.
    counts = [figures["parameters"] for figures in both["figures"].values()]
    assert len(counts) == 2
    assert max(counts) - min(counts) <= 2 * (2 * 8 + 1)
    assert (tmp_path / "memories.png").read_bytes().startswith(b"\x89PNG")


def test_measure_retrofit_reads_every_variant(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        (tmp_path / split).mkdir()
        for index in range(count):
            (tmp_path / split / f"{index}.txt").write_text(f"book {index} of {split}, and so on. " * 40)
    lora = ["--lora-rank", "2"] if importlib.util.find_spec("peft") else []
    process = run(
        sys.executable, SCRIPTS / "measure_retrofit.py", "--root", tmp_path, "--json", "-", "--num-threads", "1",
        "--seeds", "0", "--steps", "10", "--batch-size", "2", "--window", "16", "--num-windows", "20", "--dim", "16",
        "--depth", "1", "--plot", tmp_path / "retrofit.png", *lora,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "retrofit.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["variant"]: row for row in json.loads(process.stdout)["rows"]}
    assert len(rows) == 6 + 3 * bool(lora)
    assert rows["all keys"]["state_bytes"] > 5 * rows["window and sinks"]["state_bytes"]
    assert all(0 < value < 20 for row in rows.values() for value in row["ranges"])
    # In the first window, the variants of one model are equal.
    assert rows["nothing carried"]["ranges"][0] == pytest.approx(rows["window and sinks"]["ranges"][0], abs=1e-5)

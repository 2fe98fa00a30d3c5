"""`memtx plan` says what training takes: its figures are those of the model that `memtx fit` makes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.commands.program import Program
from tests.commands.runs import changed, write, write_books
from tests.commands.test_mistakes import refused


def test_a_plan_and_the_run_agree(program: Program, tmp_path: Path) -> None:
    write(tmp_path, changed(("data", "root"), None))
    options = ("--config", "c.yaml", "--peak-tflops", "1", "--mfu", "0.5")
    done = program("plan", *options, "--tokens", "1e9", "--devices", "2", "--json", at=tmp_path)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert not (tmp_path / "run").exists()
    write_books(tmp_path / "books")
    throughput = {"class_path": "memtx.training.callbacks.throughput.Throughput", "init_args": {"every_n_batches": 1}}
    throughput["init_args"]["peak_tflops"] = 1.0  # type: ignore[index]
    write(tmp_path, changed(("trainer", "callbacks"), [throughput]))
    done = program("fit", "--config", "c.yaml", at=tmp_path)
    assert done.code == 0, done.err
    kept = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    names = [name for name in kept["state_dict"] if name.startswith("model.") and name != "model.head.weight"]
    assert found["num_parameters"] == sum(kept["state_dict"][name].numel() for name in names)
    moments = [state for one in kept["optimizer_states"] for state in one["state"].values()]
    held = sum(value.nbytes for state in moments for value in state.values() if isinstance(value, torch.Tensor))
    assert found["memory_bytes"]["optimizer"] == held
    (row,) = kept["memtx"]["ranks"]
    carried = sum(tensor.nbytes for tensor in row["carry"].values())
    assert found["state_bytes_per_stream"] * found["batch_size"] == carried
    rate = 2 * 0.5 * 1e12 / found["flops_per_token"]["training"]
    assert abs(found["tokens_per_second"] / rate - 1) < 1e-9
    assert found["corpus_seconds"] == found["corpus_tokens"] / found["tokens_per_second"]
    assert found["tokens_per_step"] == 2 * 2 * 16
    logged = (tmp_path / "run" / "metrics.csv").read_text()
    for name in ("mfu", "model_tflops", "memory_mib", "tokens_per_second"):
        assert name in logged


def test_mistakes(program: Program, tmp_path: Path) -> None:
    write(tmp_path)
    refused(
        program("plan", "--config", "c.yaml", "--devices", "0", at=tmp_path), "--devices: must be at least 1, got 0"
    )
    refused(
        program("plan", "--config", "c.yaml", "--peak-tflops", "-1", at=tmp_path),
        "--peak-tflops: must be above 0, got -1",
    )
    refused(program("plan", "--config", "none.yaml", at=tmp_path), "'none.yaml' does not exist")
    refused(
        program("plan", "--config", "c.yaml", "--data.batch_sizes", "3", at=tmp_path),
        "Did you mean '--data.batch_size'?",
    )

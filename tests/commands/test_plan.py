"""The figures of `memtx plan` are those of the model and the run of `memtx fit`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.commands.program import Program
from tests.commands.runs import changed, write, write_books
from tests.commands.test_mistakes import refused


def test_the_plan_agrees_with_the_run(program: Program, tmp_path: Path) -> None:
    write(tmp_path, changed(("data", "root"), None))
    options = ("--config", "c.yaml", "--peak-tflops", "1", "--mfu", "0.5")
    result = program("plan", *options, "--tokens", "1e9", "--devices", "2", "--json", cwd=tmp_path)
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert not (tmp_path / "run").exists()
    write_books(tmp_path / "books")
    throughput = {"class_path": "memtx.training.callbacks.throughput.Throughput", "init_args": {"every_n_batches": 1}}
    throughput["init_args"]["peak_tflops"] = 1.0  # type: ignore[index]
    write(tmp_path, changed(("trainer", "callbacks"), [throughput]))
    result = program("fit", "--config", "c.yaml", cwd=tmp_path)
    assert result.code == 0, result.err
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    names = [name for name in checkpoint["state_dict"] if name.startswith("model.") and name != "model.head.weight"]
    assert plan["num_parameters"] == sum(checkpoint["state_dict"][name].numel() for name in names)
    moments = [state for optimizer in checkpoint["optimizer_states"] for state in optimizer["state"].values()]
    num_bytes = sum(value.nbytes for state in moments for value in state.values() if isinstance(value, torch.Tensor))
    assert plan["memory_bytes"]["optimizer"] == num_bytes
    (rank,) = checkpoint["memtx"]["ranks"]
    state_bytes = sum(tensor.nbytes for tensor in rank["carry"].values())
    assert plan["state_bytes_per_stream"] * plan["batch_size"] == state_bytes
    rate = 2 * 0.5 * 1e12 / plan["flops_per_token"]["training"]
    assert abs(plan["tokens_per_second"] / rate - 1) < 1e-9
    assert plan["corpus_seconds"] == plan["corpus_tokens"] / plan["tokens_per_second"]
    assert plan["tokens_per_step"] == 2 * 2 * 16
    logged = (tmp_path / "run" / "metrics.csv").read_text()
    for name in ("mfu", "model_tflops", "memory_mib", "tokens_per_second"):
        assert name in logged


def test_errors_are_one_line(program: Program, tmp_path: Path) -> None:
    write(tmp_path)
    refused(
        program("plan", "--config", "c.yaml", "--devices", "0", cwd=tmp_path), "--devices: must be at least 1, got 0"
    )
    refused(
        program("plan", "--config", "c.yaml", "--peak-tflops", "-1", cwd=tmp_path),
        "--peak-tflops: must be above 0, got -1",
    )
    refused(program("plan", "--config", "none.yaml", cwd=tmp_path), "'none.yaml' does not exist")
    refused(
        program("plan", "--config", "c.yaml", "--data.batch_sizes", "3", cwd=tmp_path),
        "Did you mean '--data.batch_size'?",
    )

"""Weights sharded over two processes: equal gradients and runs, and checkpoints."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx import files
from memtx.checkpoint import pretrained, sharded
from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.errors import CheckpointError
from tests.commands.program import Program
from tests.commands.runs import changed
from tests.training import runs

FSDP2 = ("--trainer.strategy", "fsdp2")


def config(batch_size: int, **trainer: Any) -> dict[str, Any]:
    content = changed(("data", "batch_size"), batch_size)
    content["data"]["bptt_segments"] = 2
    content["trainer"] |= {"val_check_interval": 3, "max_steps": 6} | trainer
    content["checkpoint"] = {"every_n_train_steps": 2}
    content["model"]["model"]["init_args"] |= {"depth": 2, "dropout": 0.0}
    content["model"]["scheduler"]["init_args"]["total_steps"] = 100
    return content


@pytest.fixture(autouse=True, scope="module")
def _gloo() -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")


@pytest.fixture(scope="module")
def folder(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a whole run of two processes, and one of a single process on the same streams."""
    at = runs.prepare(tmp_path_factory.mktemp("runs"), config(1))
    done = runs.fit(program, at, "whole", *FSDP2, ranks=2, gradients=True)
    assert done.code == 0, done.err
    done = runs.fit(program, at, "one", "--data.batch_size", "2", gradients=True)
    assert done.code == 0, done.err
    return at


def last(at: Path, run: str) -> Path:
    return at / run / "checkpoints" / "last.ckpt"


def assert_same_weights(checkpoint: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert checkpoint["state_dict"].keys() == other["state_dict"].keys()
    for name, weight in checkpoint["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], weight, atol=tolerance, rtol=0.0)


def test_gradients_and_metrics_equal_one_process(folder: Path) -> None:
    single, parallel = (
        files.load_tensors(folder / f"{name}-watched" / "gradients", kind="gradients", version=1)[0]
        for name in ("one", "whole")
    )
    assert single.keys() == parallel.keys()
    for name, gradient in single.items():
        assert float(gradient.abs().max()) > 0, name
        # float32: sums in another order
        torch.testing.assert_close(parallel[name], gradient, atol=1e-6, rtol=1e-4)
    best = [json.loads((folder / name / "checkpoints" / "best.json").read_text()) for name in ("one", "whole")]
    # six steps of Adam make of such differences more
    assert best[0]["score"] == pytest.approx(best[1]["score"], rel=1e-3)
    # A weight whose gradient is near zero moves by a whole step of Adam in either direction
    assert_same_weights(*(pretrained.read_checkpoint(last(folder, name)) for name in ("one", "whole")), tolerance=1e-3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_resumes_exactly(program: Program, folder: Path, number: signal.Signals) -> None:
    run = f"struck-{number}"
    done = runs.fit(program, folder, run, *FSDP2, ranks=2, strike=3, signal=int(number), rank=1)
    assert done.code != 0
    done = runs.fit(program, folder, run, *FSDP2, ranks=2)
    assert done.code == 0, done.err
    for rank in (0, 1):
        assert runs.losses(folder, run, rank) == runs.losses(folder, "whole", rank)
        assert runs.weights(folder, run, rank) == runs.weights(folder, "whole", rank)
    assert not [path for path in (folder / run / "checkpoints").iterdir() if path.name.startswith(".")]


def test_the_strategy_may_change(program: Program, folder: Path) -> None:
    """A run goes on from the other kind of checkpoint: weights, optimizer, memory and data."""
    three = ("--trainer.max_steps", "3")
    for run, ranks, first, then in (
        ("apart-then-whole", (2, 0), FSDP2, ("--data.batch_size", "2")),
        ("whole-then-apart", (0, 2), ("--data.batch_size", "2"), FSDP2),
    ):
        done = runs.fit(program, folder, run, *three, *first, ranks=ranks[0])
        assert done.code == 0, done.err
        done = runs.fit(program, folder, run, *then, ranks=ranks[1])
        assert done.code == 0, done.err
        assert last(folder, run).is_dir() == (ranks[1] == 2)
        contents = [pretrained.read_checkpoint(last(folder, name)) for name in ("whole", run)]
        assert_same_weights(*contents, tolerance=1e-3)  # six steps of Adam on gradients summed in another order
        steps = [
            [float(state["step"]) for state in content["optimizer_states"][0]["state"].values()] for content in contents
        ]
        assert set(steps[0]) == set(steps[1]) == {6.0}


def test_damaged_checkpoints_are_rejected(folder: Path, tmp_path: Path) -> None:
    checkpoint = last(folder, "whole")
    sharded.verify_checksums(checkpoint)
    for file in sorted(checkpoint.iterdir()):
        copy = tmp_path / "copy.ckpt"
        shutil.copytree(checkpoint, copy)
        content = bytearray((copy / file.name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / file.name).write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a valid checkpoint"):
            pretrained.read_checkpoint(copy)
        (copy / file.name).unlink()
        with pytest.raises(CheckpointError, match="is not a valid checkpoint"):
            pretrained.read_checkpoint(copy)
        shutil.rmtree(copy)


class Evil:
    """Runs when it is unpickled."""

    ran: list[int] = []  # noqa: RUF012

    def __reduce__(self) -> Any:
        return (Evil.ran.append, (1,))


def test_loading_executes_no_code(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.ckpt"
    shutil.copytree(last(folder, "whole"), copy)
    for name, content in ((sharded.DCP_METADATA_FILE, pickle.dumps(Evil())), (sharded.META_FILE, pickle.dumps(Evil()))):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        sharded.write_checksums(
            copy, {path.name: files.checksum(path) for path in copy.iterdir() if path.name != sharded.CHECKSUMS_FILE}
        )
        with pytest.raises(CheckpointError, match="is not a valid checkpoint"):
            pretrained.read_checkpoint(copy)
        (copy / name).write_bytes(before)
    assert Evil.ran == []


def test_a_sharded_checkpoint_is_consolidated(program: Program, folder: Path) -> None:
    """The checkpoint of two processes is one model, for convert and for every loader."""
    for source in ("whole", "whole/checkpoints/last.ckpt", "one"):
        done = program("convert", source, "out", "--overwrite", cwd=folder)
        assert done.code == 0, done.err
        assert "'out': MemoryTransformer with " in done.out
        assert sorted(path.name for path in (folder / "out").iterdir()) == [
            "config.json", "model.safetensors", "tokenizer.json",
        ]  # fmt: skip
        model, tokenizer = load_model_and_tokenizer(folder / source)
        converted, converted_tokenizer = load_model_and_tokenizer(folder / "out")
        assert converted.fingerprint == model.fingerprint
        assert converted_tokenizer.to_json() == tokenizer.to_json()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    for command in (
        ("read", "books/test/0.txt", "--checkpoint", "whole"),
        ("read", "books/test/0.txt", "--checkpoint", "out"),
        ("test", "--run_dir", "whole", "--trainer.strategy", "auto"),
    ):
        done = program(*command, cwd=folder)
        assert done.code == 0, done.err


def test_unsupported_options_are_reported_in_one_line(program: Program, folder: Path) -> None:
    for options, message in (
        (
            ("--model.distillation", "memtx.training.distillation.SelfDistillation"),
            "does not support a strategy that shards",
        ),
        (("--trainer.strategy", "deepspeed_stage_2"), "DeepSpeed"),
        (("--trainer.strategy", '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'), "Use fsdp2"),
    ):
        done = runs.fit(program, folder, "refused", *FSDP2, *options, ranks=2)
        assert done.code == 2, done.err
        assert "Traceback" not in done.err
        assert message in done.err
        assert not (folder / "refused" / "config.yaml").exists()

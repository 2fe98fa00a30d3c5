"""Resuming with another batch size or number of processes loses no token and no memory of remaining streams."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.checkpoint.pretrained import read_checkpoint
from memtx.checkpoint.training import BestCheckpoint
from memtx.errors import CheckpointError
from memtx.training.carry import reassign_streams, restore_rank_state
from tests.commands.program import Program
from tests.commands.runs import changed
from tests.training import runs
from tests.training.small import Record, data, module, trainer


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 4))
def test_the_first_streams_continue(saved: list[int], batch_size: int, ranks: int) -> None:
    tokens = torch.arange(1, 1 + 2 * sum(saved)).view(-1, 2)
    parts: list[dict[str, torch.Tensor]] = [
        {"layers[0].hidden": part, "position": part[:, 0]} if len(part) else {} for part in tokens.split(saved)
    ]
    reassigned = [reassign_streams(parts, batch_size, rank) for rank in range(ranks)]
    if not sum(saved):
        assert reassigned == [{}] * ranks
        return
    together = torch.cat([state["layers[0].hidden"] for state in reassigned])
    assert len(together) == batch_size * ranks
    num_kept = min(len(tokens), len(together))
    assert torch.equal(together[:num_kept], tokens[:num_kept])
    assert not together[num_kept:].any()
    assert torch.equal(together[:, 0], torch.cat([state["position"] for state in reassigned]))


def test_different_memories_are_rejected() -> None:
    with pytest.raises(CheckpointError, match="different memories"):
        reassign_streams([{"position": torch.zeros(2)}, {"other": torch.zeros(2)}], 2, 0)
    with pytest.raises(CheckpointError, match="different memories"):
        reassign_streams([{"position": torch.tensor(1)}], 2, 0)


def test_a_plain_data_loader_does_not_tell_its_streams() -> None:
    """torch's DataLoader has a batch_size too, which need not be a number of streams."""
    states = [{"position": torch.tensor([rank])} for rank in range(2)]
    loader = torch.utils.data.DataLoader(torch.zeros(4), batch_size=4)
    assert restore_rank_state(states, loader, 1, 2) is states[1]
    with pytest.raises(CheckpointError, match="from 2 processes, this run has 1"):
        restore_rank_state(states, loader, 0, 1)
    streams = SimpleNamespace(batch_size=2, position=0)
    assert restore_rank_state(states, streams, 0, 1)["position"].tolist() == [0, 1]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_run_resumes_with_another_batch_size(
    tmp_path: Path, batch_size: int, accumulate: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every token of an epoch is read, and the epoch ends where its tokens do, whichever streams read its rest."""
    folder = str(tmp_path / "checkpoints")
    first = data(tmp_path, bptt_segments=1)
    keep, options = BestCheckpoint(folder), {"limit_val_batches": 0, "accumulate_grad_batches": accumulate}
    trainer(tmp_path, keep, max_steps=7, **options).fit(module(), datamodule=first)
    assert first._streams is not None
    epoch, epoch_tokens = len(first._streams), first._streams.store.num_tokens
    num_batches = 7 * accumulate
    assert num_batches < epoch
    second, record = data(tmp_path, bptt_segments=1, batch_size=batch_size), Record()
    resumed_run = trainer(tmp_path, record, max_epochs=2, **options)
    resumed_module = module(seed=5)
    resumed_run.fit(resumed_module, datamodule=second, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    # To within a batch and an accumulation, which the pass's end rounds to.
    num_tokens = 8 * (2 * num_batches + batch_size * len(record.losses))
    assert abs(num_tokens - 2 * epoch_tokens) <= 8 * (2 + batch_size * (2 + accumulate))
    assert resumed_run.current_epoch == 2
    assert resumed_module.tokens_seen == num_tokens
    batches = sorted(record.losses)
    assert batches == list(range(batches[0], batches[0] + len(batches)))


def test_a_memory_follows_its_stream(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    options: dict[str, Any] = {"limit_val_batches": 0}
    trainer(tmp_path, BestCheckpoint(folder), max_steps=3, **options).fit(module(), datamodule=data(tmp_path))
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    stored = read_checkpoint(last)["memtx"]["ranks"][0]["carry"]["position"]
    for batch_size in (1, 4):
        language_module = module(seed=5)
        trainer(tmp_path, max_steps=4, **options).fit(
            language_module, datamodule=data(tmp_path, batch_size=batch_size), ckpt_path=last
        )
        position = language_module.carry.state_dict("train")["position"]
        assert len(position) == batch_size
        # A batch of 16 tokens more, unless a document ended within it.
        for stream, before in itertools.product(range(min(2, batch_size)), [stored]):
            assert int(position[stream]) == int(before[stream]) + 16 or int(position[stream]) < 16
        assert (position[2:] <= 16).all()


def test_a_run_resumes_with_other_processes(program: Program, tmp_path: Path) -> None:
    """Two processes of one stream each and one process of two are the same run, wherever it changes over."""
    config = changed(("data", "batch_size"), 2)
    config["trainer"] |= {"max_steps": 6, "limit_val_batches": 0}
    config["model"]["scheduler"]["init_args"]["total_steps"] = 100
    # Each process draws by itself.
    config["model"]["model"]["init_args"]["dropout"] = 0.0
    at = runs.prepare(tmp_path, config)
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp_fork", "--data.batch_size", "1")
    assert runs.fit(program, at, "whole").code == 0
    for name, parts in (("fewer", (two, ())), ("more", ((), two))):
        done = runs.fit(program, at, name, "--trainer.max_steps", "3", *parts[0])
        assert done.code == 0, done.err
        done = runs.fit(program, at, name, *parts[1])
        assert done.code == 0, done.err
        last = [read_checkpoint(at / run / "checkpoints" / "last.ckpt") for run in ("whole", name)]
        for key, weight in last[0]["state_dict"].items():
            # float32, six steps of Adam: sums in another order
            torch.testing.assert_close(last[1]["state_dict"][key], weight, atol=1e-4, rtol=1e-3)
        ranks = [content["memtx"]["ranks"] for content in last]
        before, after = (torch.cat([state["carry"]["position"] for state in states]) for states in ranks)
        assert torch.equal(before, after)
        assert len(last[1]["memtx"]["ranks"]) == (1 if name == "fewer" else 2)
    # Another number of streams is reported.
    done = runs.fit(program, at, "whole", "--trainer.max_steps", "7", "--data.batch_size", "3")
    assert done.code == 0, done.err
    assert "The checkpoint has 2 streams, this run 3" in done.err

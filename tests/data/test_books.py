from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.data.books import BookDataModule
from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer
from memtx.errors import CheckpointError, DataError

WORDS = ["whale", "ship", "sea", "captain", "harpoon", "night", "storm", "sail"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("books")
    generator = np.random.default_rng(0)
    for split, count in (("train", 7), ("validation", 2), ("test", 3)):
        (root / split).mkdir()
        for number in range(count):
            text = " ".join(generator.choice(WORDS, 60 + 40 * number))
            (root / split / f"{number}.txt").write_text(text + "\n")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


class Recorder(LightningModule):
    """Learns nothing worth having, but notes every batch it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[list[int]]] = []
        self.scored = [0, 0, 0]

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, Batch)
        self.seen.append(batch.tokens.tolist())
        return self.weight * batch.tokens.sum()

    def _evaluated(self, batch: Batch) -> None:
        for index, amount in enumerate((batch.num_words, batch.num_bytes, batch.labels != IGNORE_INDEX)):
            self.scored[index] += int(amount.sum())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluated(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluated(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def data(root: Path, cache: str, **options: Any) -> BookDataModule:
    options = {"batch_size": 2, "segment_length": 32, "bptt_segments": 2, "seed": 5, **options}
    return BookDataModule(str(root), cache_dir=cache, num_workers=1, **options)


@pytest.mark.parametrize(
    ("accumulate", "epochs", "rest", "options"),
    [
        (1, 0, 5, {}),
        (3, 0, 4, {}),
        (1, 1, 0, {}),
        (3, 1, 3, {}),
        (2, 2, 1, {"limit_train_batches": 7}),
        (2, 1, 1, {"limit_train_batches": 0.25}),
    ],
    ids=["mid-epoch", "accumulated", "at an epoch's end", "second epoch", "limited epochs", "a part of each pass"],
)
def test_a_resumed_run_sees_the_very_same_batches(
    root: Path, cache: str, tmp_path: Path, accumulate: int, epochs: int, rest: int, options: dict[str, Any]
) -> None:
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 3, **options}
    recorder = Recorder()
    module = data(root, cache)
    trainer(tmp_path, enable_checkpointing=False, **options).fit(recorder, datamodule=module)
    per_epoch = len(module.train_dataloader())
    if limit := options.get("limit_train_batches"):
        per_epoch = limit if isinstance(limit, int) else int(per_epoch * limit)
    assert len(recorder.seen) == 3 * per_epoch
    # The last accumulation of an epoch is a step, complete or not.
    steps = epochs * -(-per_epoch // accumulate) + rest
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=steps, save_top_k=-1, filename="{step}")
    first = Recorder()
    trainer(tmp_path, callbacks=[keep], **options).fit(first, datamodule=data(root, cache))
    second = Recorder()
    trainer(tmp_path, enable_checkpointing=False, **options).fit(
        second, datamodule=data(root, cache), ckpt_path=str(tmp_path / f"step={steps}.ckpt"), weights_only=True
    )
    assert second.seen
    assert second.seen == recorder.seen[epochs * per_epoch + rest * accumulate :]


def test_a_second_fit_begins_at_the_start(root: Path, cache: str, tmp_path: Path) -> None:
    module = data(root, cache)
    seen = []
    for _ in range(2):
        recorder = Recorder()
        trainer(tmp_path, enable_checkpointing=False, max_steps=5).fit(recorder, datamodule=module)
        seen.append(recorder.seen)
    assert seen[0] == seen[1]


def test_streams_continue_across_epochs(root: Path, cache: str) -> None:
    streams = data(root, cache).train_dataloader()
    streams_of_tokens = torch.cat([batch.tokens for _ in range(2) for batch in streams], 1)
    labels_end = streams.get_batch(len(streams) - 1).labels[:, -1]
    following = streams_of_tokens[:, len(streams) * 64]
    assert all(label in (IGNORE_INDEX, int(token)) for label, token in zip(labels_end.tolist(), following, strict=True))
    assert streams_of_tokens.shape == (2, 2 * len(streams) * 64)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer, lambda: BytePairTokenizer(280)], ids=["byte", "bpe"])
@pytest.mark.parametrize("eval_batch_size", [1, 3])
def test_the_test_stage_scores_the_whole_split(
    root: Path, cache: str, tmp_path: Path, tokenizer: Any, eval_batch_size: int
) -> None:
    recorder = Recorder()
    module = data(root, cache, tokenizer=tokenizer(), eval_batch_size=eval_batch_size)
    trainer(tmp_path).test(recorder, datamodule=module, verbose=False)
    texts = [path.read_text() for path in sorted((root / "test").iterdir())]
    tokens = sum(len(module.tokenizer.encode(text)) for text in texts)
    assert recorder.scored == [sum(len(text.split()) for text in texts), sum(map(len, texts)), tokens]


def test_the_tokenizer_is_trained_once_and_its_size_is_known_before(
    root: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = data(root, cache, tokenizer=BytePairTokenizer(290))
    assert module.vocab_size == 290
    module.prepare_data()
    module.setup()
    assert module.tokenizer.is_trained
    again = data(root, cache, tokenizer=BytePairTokenizer(290))
    monkeypatch.setattr(BytePairTokenizer, "train", None)  # calling it would fail
    again.setup("fit")
    assert again.tokenizer.fingerprint == module.tokenizer.fingerprint
    assert len(module.state_dict()["tokenizer"]) > 500


def test_a_checkpoint_of_other_data_is_rejected(root: Path, cache: str) -> None:
    module = data(root, cache)
    next(iter(module.train_dataloader()))
    saved = module.state_dict()
    assert saved["position"] == 1
    other = data(root, cache, seed=6)
    other.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="seed 5, this run has 6"):
        other.train_dataloader()
    elsewhere = BookDataModule(
        "embedded", batch_size=2, segment_length=32, bptt_segments=2, seed=5, cache_dir=cache, num_workers=1
    )
    elsewhere.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="corpus"):
        elsewhere.train_dataloader()
    with pytest.raises(CheckpointError, match="another tokenizer"):
        data(root, cache, tokenizer=BytePairTokenizer(290)).load_state_dict(saved)
    with pytest.raises(CheckpointError, match="no whole tokenizer"):
        data(root, cache).load_state_dict({**saved, "tokenizer": "{"})
    assert {type(value) for value in saved.values()} <= {int, str, list}  # so that weights_only loads it


def test_evaluation_uses_the_tokenizer_of_the_checkpoint(root: Path, cache: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    options = {"max_steps": 2, "limit_val_batches": 0}
    first = data(root, cache, tokenizer=BytePairTokenizer(290))
    trainer(tmp_path, callbacks=[keep], **options).fit(Recorder(), datamodule=first)
    recorder = Recorder()
    other = BookDataModule("embedded", batch_size=2, segment_length=512, cache_dir=cache, num_workers=1)
    trainer(tmp_path).test(recorder, datamodule=other, ckpt_path=str(tmp_path / "step=2.ckpt"), verbose=False)
    assert other.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert recorder.scored[1] == sum(document.size for document in other.corpus.get_split("test"))


def test_training_without_a_validation_split(tmp_path: Path, cache: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.txt").write_text("words " * 500)
    recorder = Recorder()
    trainer(tmp_path, max_steps=3, enable_checkpointing=False).fit(recorder, datamodule=data(tmp_path, cache))
    assert len(recorder.seen) == 3
    with pytest.raises(DataError, match="no split 'test'"):
        trainer(tmp_path).test(recorder, datamodule=data(tmp_path, cache), verbose=False)


def test_yaml_configures_every_argument(cache: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BookDataModule, "data")
    tokenizer = {"class_path": "memtx.data.tokenizers.BytePairTokenizer", "init_args": {"vocab_size": 300}}
    config = parser.parse_object(
        {"data": {"tokenizer": tokenizer, "segment_length": 8, "bptt_segments": 3, "cache_dir": cache}}
    )
    module = parser.instantiate(config).data
    assert (module.vocab_size, module.length, module.root) == (300, 24, "embedded")
    with pytest.raises(DataError, match="batch_size is 0"):
        BookDataModule(batch_size=0)
    with pytest.raises(DataError, match="seed is -1"):
        BookDataModule(seed=-1)

"""Each pretraining objective learns a repeated text, scores its predictions, and resumes exactly."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from memtx.data.books import BookDataModule
from memtx.errors import MemtxError
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.longformer import LongformerAttention
from memtx.layers.reformer import LocalAttention, LSHAttention
from memtx.models.encoder import Encoder
from memtx.models.reformer import Reformer
from memtx.models.xlnet import XLNet
from memtx.training.permutation_lm import PermutedModule
from memtx.training.pretraining import CausalModule, MaskedModule
from tests.training.small import assert_equal, weights
from tests.training.test_finetuning import trainer

ENCODER = partial(
    Encoder, dim=32, depth=1, heads=2, attentions=[partial(LongformerAttention, window=32)],
    embeddings=partial(TextEmbeddings, num_positions=32),
)  # fmt: skip
REFORMER = partial(
    Reformer,
    dim=32,
    heads=2,
    attentions=[partial(LocalAttention, chunk_length=8), partial(LSHAttention, chunk_length=8, seed=0)],
)
MODULES: dict[str, Any] = {
    "masked": partial(MaskedModule, ENCODER),
    "whole words": partial(MaskedModule, ENCODER, whole_words=True),
    "permuted": partial(PermutedModule, partial(XLNet, dim=32, depth=2, heads=2), 257, 32),
    "permuted, with memory": partial(
        PermutedModule,
        partial(XLNet, dim=32, depth=2, heads=2, memory_length=24, reuse_length=32),
        257,
        32,
        num_targets=12,
        whole_words=True,
    ),
    "causal": partial(CausalModule, REFORMER),
}


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=3e-3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("texts")
    for split in ("train", "validation", "test"):
        (at / split).mkdir()
        (at / split / "a.txt").write_text(("abcdefgh ijklmn " * 60)[:-1])
    return at


def parts(name: str, root: Path) -> tuple[Any, BookDataModule]:
    pl.seed_everything(0)
    data = BookDataModule(
        str(root), batch_size=4, segment_length=32, eval_batch_size=1, cache_dir=str(root / "cache"), num_workers=1
    )
    sizes = {} if "permuted" in name else {"vocab_size": data.vocab_size}
    return MODULES[name](**sizes, optimizer=adam, scheduler=None), data


@pytest.mark.parametrize("name", MODULES)
def test_each_objective_learns_repetition(name: str, root: Path) -> None:
    module, data = parts(name, root)
    steps = {"permuted": 400, "permuted, with memory": 250}.get(name, 150)
    run = trainer(max_steps=steps, max_epochs=-1, val_check_interval=steps, check_val_every_n_epoch=None)
    run.fit(module, data)
    # Fifteen kinds of letters, one of them twice, make 2.7 nats where nothing is known of the others.
    assert float(run.callback_metrics["val_loss"]) < 1.0
    again = run.validate(module, data, verbose=False)
    assert again == run.validate(module, data, verbose=False)


@pytest.mark.parametrize("name", ["masked", "permuted", "permuted, with memory", "causal"])
def test_resuming_is_exact(name: str, root: Path, tmp_path: Path) -> None:
    final_weights = []
    for stop in (None, 3):
        module, data = parts(name, root)
        if stop is not None:
            run = trainer(max_steps=stop, max_epochs=-1, limit_val_batches=0)
            run.fit(module, data)
            run.save_checkpoint(tmp_path / "half.ckpt")
            module, data = parts(name, root)
            pl.seed_everything(99)
        path = None if stop is None else str(tmp_path / "half.ckpt")
        trainer(max_steps=6, max_epochs=-1, limit_val_batches=0).fit(module, data, ckpt_path=path)
        final_weights.append(weights(module.model))
    assert_equal(*final_weights)


def test_the_mask_token_is_added_or_given() -> None:
    assert MaskedModule(ENCODER, 50).model.vocab_size == 51
    module = MaskedModule(ENCODER, 50, mask_id=4)
    assert (module.model.vocab_size, module.mask_id) == (50, 4)
    module = MaskedModule(ENCODER, 50, mask_token_id=4)
    assert (module.model.vocab_size, module.mask_id) == (50, 4)
    assert MaskedModule(ENCODER, 50, mask_id=3, mask_token_id=4).mask_id == 3


def test_spans_of_words_are_masked(root: Path) -> None:
    _, data = parts("masked", root)
    torch.manual_seed(0)
    module = MaskedModule(ENCODER, data.vocab_size, mask_spans=True, mask_prob=0.5, optimizer=adam, scheduler=None)
    trainer(max_steps=1, max_epochs=-1, limit_val_batches=0).fit(module, data)
    batch = next(iter(data.val_dataloader()))
    masked = module._mask_batch(batch, torch.Generator().manual_seed(0))
    selected = masked.labels >= 0
    word_ids = torch.from_numpy(np.stack([data.tokenizer.word_ids(text) for text in batch.tokens.tolist()]))
    for row, words in zip(selected, word_ids, strict=True):
        assert 0 < row.sum() <= len(row) // 2
        assert all(row[words == word].unique().numel() == 1 for word in words.unique())
    with pytest.raises(MemtxError, match="mask_spans whole words"):
        MaskedModule(ENCODER, 50, mask_spans=True, mask_smoothing=0.7)


def test_only_masked_tokens_are_scored() -> None:
    encoder = ENCODER(50)
    tokens = torch.randint(0, 50, (2, 9))
    scored = torch.rand(2, 9) < 0.5
    torch.testing.assert_close(encoder(tokens, logits_mask=scored).logits, encoder(tokens).logits[scored])

"""Encoder-decoders trained on texts and summaries: batches, losses, ROUGE, and predictions by the run alone."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from memtx.data.tasks.text_to_text import TextToTextDataModule
from memtx.errors import DataError, MemtxError
from memtx.inference.predictor import load_predictor
from memtx.models.encoder import Encoder
from memtx.models.encoder_decoder import EncoderDecoder
from memtx.training.text_to_text import TextToTextModule
from tests.commands.conftest import Program, program  # noqa: F401

CONFIG = Path(__file__).parents[2] / "configs" / "led-summaries.yaml"
WORDS = ["a", "king", "queen", "river", "boat", "house", "tree", "stone", "bird", "wolf"]
SMALL = [
    "--data.tokenizer.vocab_size=120", "--data.max_length=64", "--data.max_target_length=12", "--data.batch_size=4",
    *(f"--model.model.init_args.encoder.init_args.{name}=16" for name in ("dim", "hidden_dim")),
    "--model.model.init_args.encoder.init_args.depth=1", "--model.model.init_args.depth=1",
    "--model.model.init_args.hidden_dim=16", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of two sentences, whose first is the summary."""
    folder, draw = tmp_path_factory.mktemp("summaries"), random.Random(0)
    for split, count in (("train", 12), ("validation", 5), ("test", 3)):
        lines = []
        for _ in range(count):
            first, second = (" ".join(draw.choices(WORDS, k=4)) + "." for _ in range(2))
            lines.append(json.dumps({"text": f"{first} {second}", "summary": first}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def test_a_batch_has_special_tokens_masks_and_labels(root: Path) -> None:
    data = TextToTextDataModule(str(root), batch_size=3)
    data.tokenizer.__init__(120)  # type: ignore[misc]
    examples = data.encoded_examples("train")[:3]
    batch = data._collate(examples)
    for row, example in enumerate(examples):
        length, target_length = len(example.ids), len(example.target_ids)
        assert batch.tokens[row, :length].tolist() == example.ids.tolist()
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.tokens.shape[1] - length)
        assert batch.labels[row, :target_length].tolist() == example.target_ids.tolist()
        assert (batch.labels[row, target_length:] == -100).all()
        assert (int(example.ids[0]), int(example.ids[-1])) == (data.tokenizer.cls_token_id, data.tokenizer.sep_token_id)
    assert batch.global_attention_mask.sum(0).tolist() == [3] + [0] * (batch.tokens.shape[1] - 1)


def test_longer_texts_are_an_error_or_cut(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    (tmp_path / "data" / "validation.jsonl").write_text(json.dumps({"text": "a " * 40, "summary": "a king"}))
    data = TextToTextDataModule(str(tmp_path / "data"), max_length=20)
    with pytest.raises(DataError, match=r"validation.jsonl', line 1: The text has 42 tokens, max_length is 20"):
        data.encoded_examples("validation")
    data = TextToTextDataModule(str(tmp_path / "data"), max_length=20, max_target_length=3, truncate=True)
    (example,) = data.encoded_examples("validation")
    assert (len(example.ids), len(example.target_ids)) == (20, 3)
    assert example.ids[-1] == example.target_ids[-1] == data.tokenizer.sep_token_id


def test_the_loss_is_that_of_the_labels(root: Path) -> None:
    data = TextToTextDataModule(str(root))
    batch = data._collate(data.encoded_examples("validation"))
    torch.manual_seed(0)
    encoder = partial(Encoder, dim=16, depth=1, heads=2, add_mlm_head=False)
    module = TextToTextModule(
        partial(EncoderDecoder, encoder=encoder, depth=1, heads=2),
        vocab_size=data.vocab_size, label_smoothing=0.2,
    )  # fmt: skip
    logits = module.model(*batch[:3], labels=batch.labels).logits
    log_probs, scored = F.log_softmax(logits, dim=-1), batch.labels != -100
    label_term = -log_probs.gather(2, batch.labels.clamp(min=0)[..., None])[..., 0][scored].mean()
    expected = 0.8 * label_term + 0.2 * -log_probs.mean(-1)[scored].mean()
    # float32, sums in another order
    assert module._loss(batch, 0.2).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_run_resumes_tests_and_predicts(
    program: Program,  # noqa: F811
    root: Path,
    tmp_path: Path,
) -> None:
    result = program("fit", "--config", str(CONFIG), "--data.root", str(root), *SMALL, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "ROUGE-L 0." in result.err + result.out
    run = tmp_path / "runs" / "led-summaries"
    assert {"val_loss", "val_rouge1", "val_rougeL"} <= set((run / "metrics.csv").read_text().splitlines()[0].split(","))
    result = program("test", "--run_dir", str(run), cwd=tmp_path)
    assert result.code == 0, result.err
    assert "test_rougeL" in result.out
    result = program("predict", "--checkpoint", str(run), "--text", "a king. a wolf.", cwd=tmp_path)
    assert result.code == 0, result.err
    assert set(json.loads(result.out)) >= {"summary", "complete"}
    result = program("predict", "--checkpoint", str(run), "--text", "a " * 99, cwd=tmp_path)
    assert result.code == 2
    assert "The text has 101 tokens, the model reads 64 at once." in result.err
    # Another run may begin with its weights.
    module = TextToTextModule(pretrained=str(run), vocab_size=120)
    assert torch.equal(module.model.position_embeddings.weight, load_predictor(run).model.position_embeddings.weight)
    with pytest.raises(MemtxError, match="has 120 tokens, the tokenizer has 500"):
        TextToTextModule(pretrained=str(run), vocab_size=500)


def test_there_must_be_a_model() -> None:
    with pytest.raises(MemtxError, match=r"Give model\.model or model\.pretrained"):
        TextToTextModule()

"""Span corruption: the text can be put together again from inputs and targets, and a model learns to do so."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.cli.main import main
from memtx.errors import MemtxError
from memtx.models.encoder import Encoder
from memtx.models.encoder_decoder import EncoderDecoder
from memtx.training.objectives import mask_geometric_spans
from memtx.training.span_corruption import SpanCorruptionModule, corrupt_spans, sample_noise_spans
from tests.commands.program import HOME
from tests.commands.runs import write_books
from tests.training.small import adam, data, trainer

SENTINELS = list(range(1000, 1100))


def restore(inputs: list[int], targets: list[int]) -> list[int]:
    """Put the spans of the targets in place of their sentinels."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token >= SENTINELS[0]:
            spans[token] = span = []
        else:
            span.append(token)
    assert list(spans) == SENTINELS[: len(spans)]
    assert spans.popitem()[1] == []
    return [restored for token in inputs for restored in spans.get(token, [token])]


@given(st.integers(2, 90), st.floats(0.05, 0.9), st.floats(1.0, 8.0), st.integers(0, 99))
def test_a_text_is_in_inputs_and_targets_once(length: int, density: float, mean: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spans = torch.stack([sample_noise_spans(length, density, mean, generator) for _ in range(3)])
    num_noise = min(max(round(length * density), 1), length - 1)
    assert spans.sum(1).tolist() == [num_noise] * 3
    assert not spans[:, 0].any()
    tokens = torch.randint(1000, (3, length), generator=generator)
    corrupted = corrupt_spans(tokens, spans, SENTINELS)
    for row in range(3):
        assert restore(corrupted.inputs[row].tolist(), corrupted.targets[row].tolist()) == tokens[row].tolist()


def test_the_figure_of_the_paper() -> None:
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]
    tokens = torch.arange(len(words))[None]
    is_noise = torch.tensor([[word in ("for", "inviting", "last") for word in words]])
    corrupted = corrupt_spans(tokens, is_noise, [100, 101, 102])
    names = {**dict(enumerate(words)), 100: "<X>", 101: "<Y>", 102: "<Z>"}
    inputs, targets = ([names[token] for token in part[0].tolist()] for part in corrupted)
    assert " ".join(inputs) == "Thank you <X> me to your party <Y> week ."
    assert " ".join(targets) == "<X> for inviting <Y> last <Z>"
    with pytest.raises(MemtxError, match="2 sentinels for 2 spans"):
        corrupt_spans(tokens, is_noise, [100, 101])


@given(st.integers(1, 60), st.integers(0, 99))
def test_geometric_spans_are_whole_words_within_the_budget(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 50, (2, length), generator=generator)
    tokens[:, length // 2] = 1
    word_ids = torch.randint(2, (2, length), generator=generator).cumsum(1)
    masked = mask_geometric_spans(
        tokens, mask_token_id=0, vocab_size=50, mask_prob=0.3, word_ids=word_ids, special_token_ids=[1],
        generator=generator,
    )  # fmt: skip
    selected = masked.labels >= 0
    assert torch.equal(masked.labels[selected], tokens[selected])
    assert torch.equal(masked.tokens[~selected], tokens[~selected])
    assert not selected[tokens == 1].any()
    assert (selected.sum(1) <= max(1, round(0.3 * length))).all()
    for row in range(2):
        for word in word_ids[row].unique():
            assert selected[row, word_ids[row] == word].unique().numel() == 1


def test_geometric_spans_have_the_published_mean() -> None:
    tokens = torch.zeros(1, 40_000, dtype=torch.int64)
    masked = mask_geometric_spans(
        tokens, mask_token_id=1, vocab_size=2, mask_prob=0.02, generator=torch.Generator().manual_seed(0)
    )
    selected = torch.nn.functional.pad(masked.labels >= 0, (1, 1))[0].int()
    lengths = (selected.diff() == -1).nonzero() - (selected.diff() == 1).nonzero()
    # The mean of about 210 spans, whose standard deviation is 2.7.
    assert lengths.double().mean() == pytest.approx(3.8, abs=0.6)


def test_an_encoder_decoder_is_trained(tmp_path: Path) -> None:
    encoder = partial(Encoder, dim=16, depth=1, heads=2, add_mlm_head=False)
    make: Any = partial(EncoderDecoder, encoder=encoder, depth=1, heads=2, num_positions=40)
    torch.manual_seed(0)
    run = SpanCorruptionModule(make, mean_span_length=2.0, num_sentinels=8, optimizer=adam)
    assert run.model.vocab_size == 257 + 8
    fitted = trainer(tmp_path, max_steps=30, limit_val_batches=2)
    fitted.fit(run, datamodule=data(tmp_path, segment_length=32, bptt_segments=1))
    (results,) = fitted.validate(run, datamodule=data(tmp_path, segment_length=32, bptt_segments=1), verbose=False)
    assert results["val_loss"] < 5.0  # 5.6 untrained
    for options in ({"noise_density": 1.0}, {"mean_span_length": 0.5}, {"model": None}):
        with pytest.raises(MemtxError):
            SpanCorruptionModule(**({"model": make} | options))


def fit(root: Path, *options: str) -> int:
    """Run two steps of the config at a small size."""
    sizes = {"depth": 1, "hidden_dim": 16, "encoder.dim": 16, "encoder.depth": 1, "encoder.hidden_dim": 16}
    sizes |= {"encoder.attentions": "[memtx.layers.encoder_attention.FullAttention]"}
    model = (word for name, value in sizes.items() for word in (f"--model.model.{name}", str(value)))
    return main([
        "fit", "--config", str(HOME / "configs" / "span-corruption.yaml"), "--data.root", str(root), *model,
        "--run_dir", str(root.parent / f"{root.name}-run"), "--data.cache_dir", str(root.parent / "cache"),
        "--data.batch_size", "2", "--data.segment_length", "40", "--trainer.max_steps", "2", "--trainer.accelerator",
        "cpu", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1", *options,
    ])  # fmt: skip


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_tokenizer(path: Path, sentinels: int) -> str:
    """Write a Unigram tokenizer with T5's special tokens, its sentinels in descending order as there."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in "\u2581abcdefgh")]
    backend = Tokenizer(models.Unigram(vocabulary, 2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens([f"<extra_id_{index}>" for index in reversed(range(sentinels))])
    backend.save(str(path))
    return str(path)


def test_the_config_trains_on_books_and_on_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_books(tmp_path / "books")
    lines = write_lines(tmp_path / "lines.jsonl", ["abc deaf gab " * 40] * 20)
    size = ("--data.tokenizer.vocab_size", "120")
    assert fit(tmp_path / "books", *size) == 0
    tokenizer = ("--data.tokenizer", "memtx.data.hf_tokenizers.HFTokenizer", "--data.tokenizer.path")
    path = write_tokenizer(tmp_path / "tokenizer.json", 4)
    assert fit(lines, *tokenizer, path, "--model.num_sentinels", "0") == 0
    capsys.readouterr()
    # Published models have ids for their own tokens alone.
    led = ("--model.pretrained", str(tmp_path / "lines.jsonl-run"))
    bare = write_tokenizer(tmp_path / "bare.json", 0)
    for options, message in (
        ((*tokenizer, write_tokenizer(tmp_path / "few.json", 2)), "2 spans in 40 tokens need 3 sentinels, one"),
        ((*tokenizer, bare, "--model.num_sentinels", "2"), "there are 2, 1 are missing. Set model.num_sentinels to 3"),
        ((*tokenizer, bare, *led), "are missing, and the tokenizer has no <extra_id_0>. Give ids of tokens"),
        (("--model.sentinel_ids", "[5,5,6]"), "sentinel_ids repeat an id"),
    ):
        assert fit(lines, "--run_dir", str(tmp_path / "other"), *options) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    other = ("--run_dir", str(tmp_path / "next"), "--model.sentinel_ids", "[9,8,7]")
    assert fit(lines, *tokenizer, bare, *led, *other) == 0


def test_sentinels_are_the_tokenizers(tmp_path: Path) -> None:
    from memtx.data.hf_tokenizers import HFTokenizer

    write_books(tmp_path / "books")
    tokenizer = HFTokenizer(write_tokenizer(tmp_path / "tokenizer.json", 5))
    books = data(tmp_path, tokenizer=tokenizer)
    assert books.sentinel_token_ids == [16, 15, 14, 13, 12]
    assert data(tmp_path).sentinel_token_ids == []

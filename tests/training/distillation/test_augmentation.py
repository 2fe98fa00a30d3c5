"""TinyBERT's data augmentation: which words are replaced, by what, how often, and that labels keep their places."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memtx
from memtx.cli.main import main
from memtx.data.hf_tokenizers import HFTokenizer
from memtx.data.tasks.examples import read_examples
from memtx.errors import DataError, MemtxError
from memtx.models.encoder import Encoder
from memtx.training.distillation.augmentation import STOP_WORDS, Augmenter
from memtx.training.distillation.word_vectors import WordVectors, find_words
from tests.inference.test_published_tasks import folder_of
from tests.tasks import WORDS, folder

TEXT = "The whale saw the Captain, and harpooners won't sink!"
"""Words of one piece in the tests' vocabularies, stop words, and words of several pieces."""


@pytest.fixture(scope="module", params=["Bert", "Roberta"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("published") / "model", request.param, "MaskedLM")


def augmenter_of(path: Path, **options: Any) -> Augmenter:
    model = memtx.from_pretrained(path)
    assert isinstance(model, Encoder)
    return Augmenter(model, HFTokenizer(str(path)), max_length=60, **options)


class Fixed:
    """Neighbors that are known."""

    def find(self, word: str, count: int) -> list[str]:
        return [f"{word}{index}" for index in range(count)]


def test_candidates_are_predictions_for_single_pieces_and_neighbors_for_others(published: Path) -> None:
    augmenter = augmenter_of(published, neighbors=Fixed(), num_candidates=3)
    tokenizer, model = augmenter.tokenizer, augmenter.model
    single = next(word for word in WORDS if len(tokenizer.encode(f" {word}")) == 1 and word not in STOP_WORDS)
    words = ["the", single, "harpooners", "not", "x1", single.title()]
    text = " " + " ".join(words)
    spans = [(text.index(word), text.index(word) + len(word)) for word in words]
    candidates = augmenter.find_candidates(text, spans)
    assert candidates[0] == candidates[3] == candidates[4] == []  # stop words, and no word of letters alone
    assert candidates[2] == ["harpooners0", "harpooners1", "harpooners2"]
    # By hand: the masked text alone, its likeliest words.
    ids = tokenizer.encode(text).astype("int64")
    position = 1 + [tokenizer.decode([token]).strip() for token in ids].index(single)
    tokens = torch.tensor([[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]])
    tokens[0, position] = tokenizer.mask_token_id
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits is not None
    order = logits[0, position, : tokenizer.vocab_size].argsort(descending=True).tolist()
    likely = [tokenizer.decode([token]).strip() for token in order if tokenizer.token_bytes(token)[:1] == b" "]
    assert candidates[1] == [word for word in likely if word.isalpha()][:3]
    assert len(candidates[5]) == 3  # predicted, or found for its pieces
    assert all(word.istitle() for word in candidates[5])


def test_words_are_replaced_at_the_published_rate_and_the_rest_is_kept(published: Path) -> None:
    augmenter = augmenter_of(published, neighbors=Fixed(), num_variants=400)
    variants = augmenter.augment(TEXT, random.Random(0))
    assert len(set(variants)) == len(variants)
    assert TEXT not in variants
    changed: Counter[str] = Counter()
    originals = TEXT.replace(",", "").replace("!", "").split()
    for variant in variants:
        assert variant.count(",") == variant.count("!") == variant.count("'") == 1
        for word, other in zip(originals, variant.replace(",", "").replace("!", "").split(), strict=True):
            changed[word] += word != other
    assert not {"The", "the", "and", "won't"} & {word for word, count in changed.items() if count}
    # p_t = 0.4, of 400 draws: four standard deviations.
    assert changed["harpooners"] / len(variants) == pytest.approx(0.4, abs=0.1)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["whale", "the", "harpooners", "1851", "ship", "?!", "Ahab", "Zürich"]), min_size=1))
def test_words_keep_their_number_and_order(published: Path, words: list[str]) -> None:
    augmenter = augmenter_of(published, num_variants=5)
    variants = augmenter.augment_words(words, random.Random(1))
    assert len(variants) <= 5
    for variant in variants:
        assert len(variant) == len(words)
        for word, other in zip(words, variant, strict=True):
            assert other == word or (word.isalpha() and word.lower() not in STOP_WORDS and other.strip())
    assert variants == augmenter.augment_words(words, random.Random(1))


def test_each_text_of_a_pair_is_augmented_and_labels_stay(published: Path) -> None:
    augmenter = augmenter_of(published, num_variants=4, replace_prob=1.0)
    pair = {"text_a": "the whale", "text_b": "a ship", "label": "same", "source": "log"}
    variants = augmenter.augment_record(pair, random.Random(0))
    assert {(item["text_a"] == "the whale", item["text_b"] == "a ship") for item in variants} == {
        (True, False), (False, True)
    }  # fmt: skip
    assert all((item["label"], item["source"]) == ("same", "log") for item in variants)
    tagged = {"tokens": ["whale", "of", "Ahab"], "tags": ["O", "O", "B-WHO"]}
    assert all(item["tags"] == tagged["tags"] for item in augmenter.augment_record(tagged, random.Random(0)))
    with pytest.raises(DataError, match="Examples with 'answers' cannot be augmented"):
        augmenter.augment_record({"text": "a whale", "answers": []}, random.Random(0))
    with pytest.raises(DataError, match="There is no text in"):
        augmenter.augment_record({"sentence": "a whale"}, random.Random(0))


def test_a_long_text_is_read_in_windows(published: Path) -> None:
    augmenter = augmenter_of(published, num_candidates=2)
    text = " ".join(["whale", "ship"] * 100)
    spans = [(index, index + 5) for index in (0, 550, len(text) - 10)]
    assert all(len(words) == 2 for words in augmenter.find_candidates(text, spans))


def test_vectors_of_a_file_and_of_an_encoder(published: Path, tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    path.write_text("3 2\nking 1.0 0.1\nqueen 1.0 0.2\n. . . 0 1\ncabbage -1.0 0.0\n")
    vectors = WordVectors.read(path)
    assert vectors.find("King", 2) == ["queen", ". . ."]
    assert vectors.find("unheard", 2) == []
    for content, line in (("king 1.0 0.1\nqueen 1.0\n", 2), ("king x y\n", 1), ("king nan 1\n", 1)):
        path.write_text(content)
        with pytest.raises(DataError, match=f"line {line}: no word with its vector"):
            WordVectors.read(path)
    path.write_text("")
    with pytest.raises(DataError, match="holds no word"):
        WordVectors.read(path)
    model, tokenizer = memtx.from_pretrained(published), HFTokenizer(str(published))
    assert isinstance(model, Encoder)
    table = model.embedding.word_embeddings.weight.detach().numpy()
    ids = np.flatnonzero(find_words(tokenizer))
    mean = table[tokenizer.encode("harpooners").tolist()].mean(0)
    cosine = table[ids] @ mean / np.linalg.norm(table[ids], axis=1)
    expected = [tokenizer.decode([index]).strip() for index in ids[np.argsort(-cosine)][:3].tolist()]
    assert WordVectors.from_encoder(model, tokenizer).find("harpooners", 3) == expected


def test_the_command_writes_a_folder_to_train_on(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path / "data", "tagging", 3)
    command = ["distil", "augment", "--model", str(published), "--data", str(data), "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    originals = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    assert len(lines) > 3 * 15  # up to 20 variants of each
    assert [line for line in lines if line in originals] == originals
    for split in ("validation", "test"):
        assert (tmp_path / "out" / f"{split}.jsonl").read_text() == (data / f"{split}.jsonl").read_text()
    assert main([*command, "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "train.jsonl").read_text() == (tmp_path / "out" / "train.jsonl").read_text()
    capsys.readouterr()
    bad = folder(tmp_path / "bad", "questions", 3)
    for arguments, message in (
        ([*command, "--output", str(tmp_path / "out")], "exists and is no empty folder"),
        ([*command, "--output", str(tmp_path / "o"), "--vectors", "nowhere"], "'nowhere' cannot be read"),
        (
            [*command, "--output", str(tmp_path / "o"), "--data", str(bad)],
            "train.jsonl', line 1: Examples with 'answers'",
        ),
        ([*command, "--output", str(tmp_path / "o"), "--model", "nowhere"], "'nowhere' does not exist"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()
    assert len(read_examples(tmp_path / "out" / "train.jsonl", lambda record, labelled: record)) == len(lines)


def test_a_model_without_a_head_is_rejected(published: Path) -> None:
    with pytest.raises(MemtxError, match="no head for masked tokens"):
        Augmenter(Encoder(300, 8, 1, 2, add_mlm_head=False), HFTokenizer(str(published)))

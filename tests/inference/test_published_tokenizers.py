"""Reading and generating with the tokenizers of published folders: begin tokens, bytes of tokens, cut characters."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memtx.data.tokenizers import BytePairTokenizer, load_tokenizer, tokenizer_from_json
from memtx.errors import DataError, MemtxError
from memtx.inference.generate import GenerationConfig, TokenGenerator, generate
from memtx.inference.reader import StreamReader
from memtx.inference.sampling import SamplingParams
from memtx.inference.sessions.file import load_session, save_session
from tests.data.tokenizer_zoo import NAMES, PARAGRAPHS, backend_json
from tests.inference.conftest import tiny_model

TEXT = "\n".join(PARAGRAPHS) + "\u2603 two  spaces"
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


def folder_of(path: Path, name: str = "llama3", template: bool = False, **config_files: Any) -> Path:
    description = json.loads(backend_json(name))
    if template:
        description["post_processor"] = TEMPLATE
    (path / "tokenizer.json").write_text(json.dumps(description))
    for file, content in config_files.items():
        (path / f"{file}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("template", "config_files", "bos_token_id"),
    [
        (False, {}, None),
        (True, {}, 1),
        # Named in the files, but not put before a text.
        (False, {"config": {"bos_token_id": 2}, "tokenizer_config": {"bos_token": "<s>"}}, None),
        (False, {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": True}}, 1),
        (False, {"tokenizer_config": {"bos_token": {"content": "</s>"}, "add_bos_token": True}}, 2),
        (False, {"special_tokens_map": {"bos_token": "<s>"}, "tokenizer_config": {"add_bos_token": True}}, 1),
        (False, {"generation_config": {"bos_token_id": 2}, "tokenizer_config": {"add_bos_token": True}}, 2),
        (False, {"config": {"bos_token_id": 1}, "tokenizer_config": {"add_bos_token": True, "bos_token": None}}, 1),
        (True, {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": False}}, None),
    ],
)
def test_the_files_of_a_folder_decide_on_the_begin_token(
    tmp_path: Path, template: bool, config_files: dict[str, Any], bos_token_id: int | None
) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path, template=template, **config_files))
    assert tokenizer.bos_token_id == bos_token_id
    assert tokenizer.vocab_size == len(json.loads(backend_json("llama3"))["model"]["vocab"])
    again = tokenizer_from_json(tokenizer.to_json())
    assert (again.bos_token_id, again.fingerprint) == (bos_token_id, tokenizer.fingerprint)


def test_without_a_begin_token_the_first_token_is_not_scored(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path))
    model = tiny_model(tokenizer.vocab_size)
    reader = StreamReader(model, tokenizer, 7, num_logprobs=2)
    results = [*reader.feed(TEXT), *reader.finish()]
    ids = torch.from_numpy(np.concatenate([result.tokens for result in results]))
    assert ids.tolist() == tokenizer.encode(TEXT).tolist()
    logits = model(ids[None, :-1], model.init_state(1)).logits
    expected = torch.nn.functional.cross_entropy(logits[0], ids[1:], reduction="none").detach().numpy()
    nll = np.concatenate([result.nll for result in results])
    assert nll[0] == 0
    np.testing.assert_allclose(nll[1:], expected, rtol=1e-4, atol=1e-4)  # Segments round differently.
    assert all(len(result.top_tokens) == len(result.tokens) for result in results if result.top_tokens is not None)
    assert list(generate(model, tokenizer, "It was", max_tokens=3))
    with pytest.raises(MemtxError, match="no begin token"):
        list(generate(model, tokenizer, ""))


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_tokens_add_up_to_the_text(name: str, tmp_path: Path) -> None:
    tokenizer = BytePairTokenizer.from_backend_json(backend_json(name), 0)
    model, draw = tiny_model(tokenizer.vocab_size), random.Random(0)
    tokenizer._restore({"bos_token_id": None})
    reader, results, start = StreamReader(model, tokenizer, 16), [], 0
    while start < len(TEXT):
        size = draw.randrange(1, 90)
        results += reader.feed(TEXT[start : start + size])
        start += size
        save_session(tmp_path / "session", reader)
        reader = StreamReader(model, tokenizer, 16)
        load_session(tmp_path / "session", reader)
    results += reader.finish()
    contents = [content for result in results for content in result.token_bytes]
    assert b"".join(contents) == TEXT.encode()
    assert [token for result in results for token in result.tokens.tolist()] == tokenizer.encode(TEXT).tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2", "gemma"])
def test_a_character_cut_between_prompt_and_generated_text_is_whole(name: str) -> None:
    tokenizer = BytePairTokenizer.from_backend_json(backend_json(name), 0)
    tokenizer._restore({"bos_token_id": None})
    prompt, rest = next(
        (ids[:index], ids[index:])
        for ids in (tokenizer.encode(f"It was {letter}").tolist() for letter in "\U00010348\u0f40\u4e94\u2603")
        for index in range(len(ids) - 1, 0, -1)
        if "\ufffd" in tokenizer.decode(ids[:index])
    )
    letter = tokenizer.decode([*prompt, *rest]).removeprefix("It was ")
    assert tokenizer.decode(prompt, complete_only=True) == "It was "
    reader = StreamReader(tiny_model(tokenizer.vocab_size), tokenizer, 4)
    for _ in [*reader.feed_tokens(prompt), *reader.finish()]:
        pass
    config = GenerationConfig(len(rest), SamplingParams(greedy=True), logprobs=0)
    incomplete = reader.fork().incomplete_bytes
    generator = TokenGenerator(tokenizer, reader.last_token, [], config, incomplete_bytes=incomplete)
    deltas = []
    for token in rest:
        logits = torch.zeros(tokenizer.vocab_size)
        logits[token] = 9
        deltas.append(generator.advance(logits))
    assert "".join(delta.text for delta in deltas) == letter
    assert [entry.text_offset for delta in deltas for entry in delta.token_logprobs] == [0] * len(rest)


def test_older_files_of_a_folder_are_read(tmp_path: Path) -> None:
    model = json.loads(backend_json("gpt2"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])))
    expected = BytePairTokenizer.from_backend_json(backend_json("gpt2"), 0).encode(TEXT)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXT).tolist() == expected.tolist()
    assert tokenizer.decode(expected) == TEXT
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(DataError, match=r"SentencePiece.*Convert it"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="SentencePiece"):
        load_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)

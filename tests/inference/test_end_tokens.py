"""Generation ends at the end tokens of a published folder, as vLLM has it."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memtx.checkpoint.convert import convert
from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.cli.main import main
from memtx.data.tokenizers import BytePairTokenizer, Tokenizer, load_tokenizer, tokenizer_from_json
from memtx.errors import DataError, MemtxError
from memtx.inference.generate import GenerationConfig, TextDelta, TokenGenerator, generate
from memtx.inference.sampling import SamplingParams
from tests.hf import plain
from tests.hf.folders import write

SPECIAL = ("<|begin|>", "<|im_end|>", "<|eot|>")
GREEDY = SamplingParams(greedy=True)


@functools.cache
def trained_backend() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        ["a b"], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return backend


def chain(tensors: dict[str, Tensor], sequence: list[int]) -> dict[str, Tensor]:
    """Return weights with which each id of a sequence is followed by the next, whatever came before."""
    dim = len(tensors["model.embed_tokens.weight"][0])
    tensors = {name: x if "norm" in name else torch.zeros_like(x) for name, x in tensors.items()}
    directions = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)))[0]
    for token, successor in itertools.pairwise(sequence):
        direction = directions[sequence.index(token)]
        tensors["model.embed_tokens.weight"][token] = direction
        tensors["lm_head.weight"][successor] = 10 * direction
    tensors["model.norm.weight"] = torch.ones(dim)
    return tensors


def folder_of(path: Path, sequence: list[int], **config_files: Any) -> Path:
    """Write a Llama that says ``sequence``, with files by their names without suffix."""
    config = {**plain.LLAMA, "vocab_size": 320, "hidden_size": 16, **config_files.pop("config", {})}
    write(path, config, chain(plain.llama(config), sequence))
    trained_backend().save(str(path / "tokenizer.json"))
    for name, content in config_files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode(text)]


BEGIN, IM_END, EOT = 256, 257, 258
A, B, C = 64, 65, 66  # the letters a, b and c in the byte-level alphabet


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({"generation_config": {"eos_token_id": IM_END}}, IM_END),
        ({"generation_config": {"eos_token_id": [7, EOT]}}, EOT),
        ({"config": {"eos_token_id": EOT}}, EOT),
        ({"config": {"eos_token_id": [EOT, IM_END]}, "generation_config": {"eos_token_id": 7}}, IM_END),
        ({"config": {"text_config": {"eos_token_id": EOT}}}, EOT),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, IM_END),
        ({"tokenizer_config": {"eos_token": {"content": "<|eot|>", "special": True}}}, EOT),
        ({"tokenizer_config": {"eos_token_id": EOT, "eos_token": None}}, EOT),
        ({"special_tokens_map": {"eos_token": "<|eot|>"}}, EOT),
        ({"config": {"eos_token_id": BEGIN}}, BEGIN),  # which is also the begin token
        ({"config": {"eos_token_id": C}}, C),  # which is plain text
    ],
)
def test_generation_ends_at_every_end_token_of_the_folder(tmp_path: Path, files: dict[str, Any], end: int) -> None:
    folder = folder_of(tmp_path, [A, B, end, A], **files)
    model, tokenizer = load_model_and_tokenizer(folder)
    assert ids_of(tokenizer, "abc") == [A, B, C]
    assert end in tokenizer.eos_token_ids
    options: dict[str, Any] = {"max_tokens": 9, "sampling_params": GREEDY}
    assert "".join(generate(model, tokenizer, "a", **options)) == "b"
    # The next token after an ignored end token is that of the chain; the end token prints nothing.
    ignored = "".join(generate(model, tokenizer, "a", ignore_eos=True, **options))
    assert ignored.startswith("bab")
    assert "<|" not in ignored
    assert "".join(generate(model, tokenizer, "a", stop_token_ids=[A], ignore_eos=True, **options)) == "b"


def test_an_unknown_or_missing_end_token_ends_nothing(tmp_path: Path) -> None:
    # -1 stands for no token.
    files = {
        "generation_config": {"eos_token_id": -1},
        "tokenizer_config": {"eos_token": "</s>", "add_bos_token": True},
        "config": {"eos_token_id": [31999, -1], "bos_token_id": -1},
    }
    model, tokenizer = load_model_and_tokenizer(folder_of(tmp_path, [A, B, IM_END, A], **files))
    assert len("".join(generate(model, tokenizer, "a", max_tokens=9, sampling_params=GREEDY))) >= 6
    assert tokenizer.bos_token_id is None
    config = GenerationConfig(9, min_tokens=2)  # masks end tokens, of which 31999 has no logit
    TokenGenerator(tokenizer, A, [], config).advance(torch.zeros(320))


@pytest.mark.parametrize("stop_strings", ["ab", ["x", "ab"]])
def test_generation_ends_at_a_stop_string_of_the_folder(tmp_path: Path, stop_strings: Any) -> None:
    folder = folder_of(tmp_path, [A, B, C, A], generation_config={"stop_strings": stop_strings})
    model, tokenizer = load_model_and_tokenizer(folder)
    for restored in (tokenizer, tokenizer_from_json(tokenizer.to_json())):
        assert "".join(generate(model, restored, "a", max_tokens=9, sampling_params=GREEDY)) == "bc"
    assert tokenizer.fingerprint == load_tokenizer(folder / "tokenizer.json").fingerprint
    options: dict[str, Any] = {"max_tokens": 9, "sampling_params": GREEDY}
    assert "".join(generate(model, tokenizer, "a", stop=["c"], **options)) == "b"
    assert "".join(generate(model, tokenizer, "a", ignore_eos=True, **options)) == "bcabcabca"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"generation_config": {"eos_token_id": "end"}}, "generation_config.json' has eos_token_id = 'end'"),
        ({"config": {"eos_token_id": [1, True]}}, "config.json' has eos_token_id = True"),
        ({"tokenizer_config": {"eos_token": 3}}, "tokenizer_config.json' has eos_token = 3"),
        ({"generation_config": {"stop_strings": ["b", ""]}}, "generation_config.json' has stop_strings = ''"),
    ],
)
def test_a_damaged_end_token_is_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_model_and_tokenizer(folder_of(tmp_path, [A, B], **files))


def test_end_tokens_are_stored_with_the_tokenizer_but_are_not_part_of_its_identity(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", [A, B], generation_config={"eos_token_id": [EOT, IM_END]})
    tokenizer = BytePairTokenizer(path=str(folder / "tokenizer.json"))
    assert tokenizer_from_json(tokenizer.to_json()).eos_token_ids == {EOT, IM_END}
    tokenizer.save(tmp_path / "own.json")
    assert load_tokenizer(tmp_path / "own.json").eos_token_ids == {EOT, IM_END}
    convert(folder, tmp_path / "converted")
    assert load_model_and_tokenizer(tmp_path / "converted")[1].eos_token_ids == {EOT, IM_END}
    other = BytePairTokenizer(path=str(folder_of(tmp_path / "b", [A, B]) / "tokenizer.json"))
    assert other.fingerprint == tokenizer.fingerprint
    assert tokenizer_from_json(tokenizer.to_json()).fingerprint == tokenizer.fingerprint
    with pytest.raises(DataError, match="eos_token_ids is 'x'"):
        tokenizer_from_json(json.dumps({**json.loads(tokenizer.to_json()), "eos_token_ids": "x"}))


@pytest.fixture
def end_tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(folder_of(tmp_path, [A, B], generation_config={"eos_token_id": EOT}) / "tokenizer.json")


def say(tokenizer: Tokenizer, tokens: list[int], **options: Any) -> tuple[TokenGenerator, list[TextDelta]]:
    """Return the generator and its output for greedy tokens; tokens that it does not allow give the next best, b."""
    token_generator = TokenGenerator(tokenizer, A, [], GenerationConfig(sampling_params=GREEDY, **options))
    deltas = []
    for token in tokens:
        if token_generator.finish_reason is None:
            logits = torch.zeros(320)
            logits[B], logits[token] = 1, 2
            deltas.append(token_generator.advance(logits))
    return token_generator, deltas


def text_of(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_an_end_token_is_counted_but_is_no_text(end_tokenizer: Tokenizer) -> None:
    token_generator, deltas = say(end_tokenizer, [A, EOT, A], logprobs=1, stop=("ab",))
    # The a was held back, since it might have begun the stop string.
    assert text_of(deltas) == "a"
    assert [entry.token for delta in deltas for entry in delta.token_logprobs] == [A, EOT]
    assert (token_generator.finish_reason, token_generator.num_generated) == ("stop", 2)
    # At the last token of the budget, the reason is the end token.
    assert say(end_tokenizer, [A, EOT], max_tokens=2)[0].finish_reason == "stop"


def test_an_incomplete_character_before_the_end_is_replaced(end_tokenizer: Tokenizer) -> None:
    (first, _) = ids_of(end_tokenizer, "é")
    _, deltas = say(end_tokenizer, [A, first, EOT], logprobs=0)
    assert text_of(deltas) == "a\ufffd"
    assert sum(len(delta.token_logprobs) for delta in deltas) == 3


def test_min_tokens_comes_before_every_end(end_tokenizer: Tokenizer) -> None:
    for options in ({}, {"stop_token_ids": (C,)}):
        end = C if options else EOT
        token_generator, deltas = say(end_tokenizer, [A, end, end, end], min_tokens=2, **options)
        assert text_of(deltas) == "ab"  # the end is not allowed as the second token
        assert (token_generator.finish_reason, token_generator.num_generated) == ("stop", 3)
    token_generator, deltas = say(end_tokenizer, [A, C, A, A, C, A], min_tokens=3, stop=("ac",))
    assert (text_of(deltas), token_generator.finish_reason) == ("aca", "stop")
    # A stop string may begin in the first tokens if it ends after them.
    token_generator, deltas = say(end_tokenizer, [A, C, A], min_tokens=1, stop=("ac",))
    assert (text_of(deltas), token_generator.finish_reason) == ("", "stop")
    # An ignored end token is no end: it may be one of the first tokens.
    token_generator, deltas = say(end_tokenizer, [EOT, A], min_tokens=2, max_tokens=2, ignore_eos=True)
    assert (text_of(deltas), token_generator.finish_reason) == ("a", "length")


def test_invalid_ends_are_refused(end_tokenizer: Tokenizer) -> None:
    with pytest.raises(MemtxError, match=r"min_tokens \(5\) must be at most max_tokens \(4\)"):
        GenerationConfig(4, min_tokens=5)
    with pytest.raises(MemtxError, match="min_tokens is -1"):
        GenerationConfig(min_tokens=-1)
    with pytest.raises(MemtxError, match="stop_token_ids is -3"):
        GenerationConfig(stop_token_ids=(1, -3))
    with pytest.raises(DataError, match="Token 400 is not in the vocabulary"):
        TokenGenerator(end_tokenizer, A, [], GenerationConfig(stop_token_ids=(400,)))


def test_the_command_line_and_requests_have_the_options(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = folder_of(tmp_path, [A, B, EOT, C, A], config={"eos_token_id": EOT})
    base = ["generate", "--checkpoint", str(folder), "--prompt", "a", "--greedy", "--max-tokens", "4"]
    for options, expected in (
        ([], "b\n"),
        (["--ignore-eos"], "bca\n"),
        (["--ignore-eos", "--stop-token-ids", str(A), str(C)], "b\n"),
        (["--ignore-eos", "--stop-token-ids", str(C), "--min-tokens", "2"], "b\n"),
    ):
        assert main([*base, *options]) == 0
        assert capfdbinary.readouterr().out.decode() == expected
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    from fastapi.testclient import TestClient

    from memtx.inference.sessions.pool import SessionPool
    from memtx.serving.app import create_app

    pool = SessionPool(*load_model_and_tokenizer(folder))
    request = {"model": "m", "prompt": "a", "temperature": 0, "max_tokens": 4}
    with TestClient(create_app(pool, model_name="m")) as web:
        for options, expected, reason in (
            ({}, "b", "stop"),
            ({"ignore_eos": True}, "bca", "length"),
            ({"ignore_eos": True, "stop_token_ids": [C]}, "b", "stop"),
            ({"ignore_eos": True, "stop_token_ids": [C], "min_tokens": 4}, None, "length"),
        ):
            choice = web.post("/v1/completions", json=request | options).json()["choices"][0]
            assert choice["finish_reason"] == reason
            assert expected is None or choice["text"] == expected
        assert web.post("/v1/completions", json=request | {"min_tokens": 9}).status_code == 400

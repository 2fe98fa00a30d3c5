"""Details of completions: scored prompts, likely tokens by text, begin tokens, and wrong requests."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("httpx", reason="the package 'httpx' is not installed")

from fastapi.testclient import TestClient

from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer, Tokenizer
from memtx.inference.deadline import DeadlineExceededError
from memtx.inference.generate import GenerationConfig, TokenGenerator
from memtx.inference.reader import SegmentResult, StreamReader
from memtx.inference.sampling import SampledToken
from memtx.inference.sessions.pool import SessionPool
from memtx.serving.app import create_app
from memtx.serving.limits import Limits
from memtx.serving.responses import get_prompt_logprobs
from tests.data.tokenizer_zoo import PARAGRAPHS, backend_json
from tests.inference.conftest import TEXT, tiny_model
from tests.serving.test_app import error

BOS = ByteTokenizer.bos_token_id


class TwoSpellings(ByteTokenizer):
    """Bytes, with 200 spelled as 97 is."""

    def token_bytes(self, token_id: int) -> bytes:
        return b"a" if token_id == 200 else super().token_bytes(token_id)


def client(folder: Path, tokenizer: Tokenizer | None = None, vocab_size: int = 257, **limits: Any) -> TestClient:
    pool = SessionPool(tiny_model(vocab_size), tokenizer or ByteTokenizer(), folder, segment_length=32)
    app = create_app(pool, model_name="m", limits=Limits(**limits))
    return TestClient(app, raise_server_exceptions=False)


def complete(web: TestClient, prompt: Any = "x", **options: Any) -> Any:
    return web.post("/v1/completions", json={"model": "m", "prompt": prompt, "max_tokens": 0, **options})


def echoed(web: TestClient, prompt: Any, **options: Any) -> dict[str, Any]:
    response = complete(web, prompt, echo=True, **{"logprobs": 0, **options})
    assert response.status_code == 200, response.text
    logprobs: dict[str, Any] = response.json()["choices"][0]["logprobs"]
    return logprobs


def test_scoring_ranks_the_ids_of_the_tokenizer_alone(tmp_path: Path) -> None:
    text = TEXT[:150]
    with client(tmp_path, vocab_size=400) as web:
        logprobs = echoed(web, text, logprobs=20)
        session = web.post("/v1/sessions", json={}).json()["id"]
        scored = web.post(f"/v1/sessions/{session}/score", json={"text": text, "logprobs": 20}).json()
    reader = StreamReader(tiny_model(400), ByteTokenizer(), 32)
    nll = np.concatenate([result.nll for result in (*reader.feed(text), *reader.finish())])
    assert logprobs["token_logprobs"] == pytest.approx((-nll).tolist(), abs=1e-5)
    assert all(len(top) in (20, 21) for top in logprobs["top_logprobs"])
    assert all(max(ids) < 257 for part in scored["segments"] for ids in part["top_token_ids"])


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TwoSpellings()], ids=lambda kind: type(kind).__name__)
def test_the_token_itself_is_among_the_likely_ones_under_its_own_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def check(logprobs: dict[str, Any], count: int) -> None:
        for token, logprob, top in zip(
            *(logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
        ):
            assert top[token] == logprob
            assert len(top) in (count, count + 1), "no token is lost to another with its text"
            assert sorted(top.values(), reverse=True)[0] >= logprob

    with client(tmp_path, tokenizer) as web:
        for count in (0, 1, 20):
            check(echoed(web, "banana " * 8, logprobs=count), count)
            options: dict[str, Any] = {"max_tokens": 30, "logprobs": count, "temperature": 3, "seed": 4}
            check(complete(web, **options).json()["choices"][0]["logprobs"], count)


@pytest.mark.parametrize("name", ["llama2", "gemma", "metaspace-first+added", "bert", "t5", "qwen"])
def test_a_text_begins_with_its_token_at_every_offset(name: str, tmp_path: Path) -> None:
    tokenizer = BytePairTokenizer.from_backend_json(backend_json(name), 0)
    tokenizer._restore({"bos_token_id": 1})
    with client(tmp_path, tokenizer, tokenizer.vocab_size) as web:
        text = f"{' '.join(PARAGRAPHS)} \U0001f642"
        ids, options = tokenizer.encode(text).tolist(), {"max_tokens": 20, "temperature": 0.0, "logprobs": 2}
        choices = [complete(web, prompt, **options).json()["choices"][0] for prompt in ([1], ids[:9])]
        prompts = (text, ids, [2, *ids])  # the last one begins with a special token
        choices += [complete(web, prompt, echo=True, logprobs=2).json()["choices"][0] for prompt in prompts]
    assert choices[2]["text"] == text
    for choice in choices:
        logprobs = choice["logprobs"]
        for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
            assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
    assert "bytes:" in str(choices[2]["logprobs"]["tokens"]) or "".join(choices[2]["logprobs"]["tokens"]) == text


@pytest.mark.parametrize("name", ["llama2", "gemma", "qwen", "bytes"])
def test_a_token_begins_after_a_character_that_it_leaves_incomplete(name: str) -> None:
    """The character becomes U+FFFD only when the token is known, and precedes it."""
    tokenizer: Any = ByteTokenizer()
    if name != "bytes":
        tokenizer = BytePairTokenizer.from_backend_json(backend_json(name), 0)
        tokenizer._restore({"bos_token_id": 1})
    by_content = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    letter = by_content[b"e"]
    smile = [by_content[bytes([byte])] for byte in "\U0001f642".encode()]
    for ids in ([letter, smile[0], letter, smile[0], smile[1], letter, letter], [letter, *smile, letter]):
        generator = TokenGenerator(tokenizer, letter, [], GenerationConfig(len(ids), logprobs=0))
        deltas = [generator.accept(SampledToken(token, 0.0)) for token in ids]
        text = "".join(delta.text for delta in deltas)
        entries = [entry for delta in deltas for entry in delta.token_logprobs]
        assert [entry.token for entry in entries] == ids
        for entry in entries:
            assert entry.token != letter or text[entry.text_offset] == "e", (ids, text, entry)


def test_an_echoed_token_begins_after_a_character_that_it_leaves_incomplete(tmp_path: Path) -> None:
    with client(tmp_path) as web:
        smile = "\U0001f642".encode()
        ids = [*b"ab", *smile[:2], *b"c", *smile, *b"d", *smile[:1], *b"e"]
        choice = complete(web, ids, echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    for token, offset in zip(ids, choice["logprobs"]["text_offset"], strict=True):
        assert token >= 0x80 or choice["text"][offset] == chr(token)


def test_two_ids_of_one_text_are_told_apart(tmp_path: Path) -> None:
    with client(tmp_path, TwoSpellings()) as web:
        tops = echoed(web, [*b"ban", 200, 97, 97], logprobs=20)
        both = [top for top in tops["top_logprobs"] if any(name.startswith("token_id:") for name in top)]
        assert tops["tokens"] == ["b", "a", "n", "a", "a", "a"]
        assert both, "the model ranks 97 and 200 together somewhere"


def test_a_begin_token_is_the_beginning_or_begins_a_new_document(tmp_path: Path) -> None:
    first, second = list(TEXT[:80].encode()), list(TEXT[100:150].encode())
    with client(tmp_path) as web:
        alone = [echoed(web, ids, logprobs=2) for ids in (first, second)]
        joined = echoed(web, [BOS, *first, BOS, *second], logprobs=2)
        assert joined["tokens"] == ["", *alone[0]["tokens"], "", *alone[1]["tokens"]]
        for key in ("token_logprobs", "top_logprobs"):
            parts = [None, *alone[0][key], None, *alone[1][key]]
            for actual, expected in zip(joined[key], parts, strict=True):
                assert actual == (expected if expected is None else pytest.approx(expected, abs=1e-5))
        assert joined["text_offset"][-len(second) :] == [80 + offset for offset in alone[1]["text_offset"]]
        for prompt, equal in (([BOS, *first], first), ([*first, BOS, *second], second), ([*first, BOS], [BOS])):
            texts = [complete(web, ids, max_tokens=20, seed=1) for ids in (prompt, equal)]
            assert texts[0].json()["choices"] == texts[1].json()["choices"]
            assert texts[0].json()["usage"]["prompt_tokens"] == len(prompt)


def test_a_document_may_begin_anywhere_in_a_segment() -> None:
    model, ids = tiny_model(257), list(TEXT[:70].encode())
    expected = StreamReader(model, ByteTokenizer(), 16)
    nll = np.concatenate([result.nll for result in (*expected.feed_tokens(ids), *expected.finish())])
    for prefix in ([], [5], [5] * 15, [5] * 16, [5] * 17, [5] * 40, [BOS], [5, BOS]):
        reader = StreamReader(model, ByteTokenizer(), 16)
        tokens = [*prefix, BOS, *ids]
        results = [result for token in tokens for result in reader.feed_tokens([token])]
        results += reader.finish()
        assert np.concatenate([result.nll for result in results])[-len(ids) :] == pytest.approx(nll, abs=1e-5)
        assert reader.totals.num_bytes == len(bytes(token for token in tokens if token != BOS))
        for name, tensor in reader.state.named_tensors().items():
            assert tensor.allclose(expected.state.named_tensors()[name], atol=1e-5), name


def test_offsets_take_time_in_proportion_to_the_prompt() -> None:
    def seconds(count: int) -> float:
        ids = np.frombuffer(("é" * (count // 2)).encode(), dtype=np.uint8).astype(np.int64)
        results = [SegmentResult(ids, np.zeros(count, np.float32), [bytes([token]) for token in ids], 0)]
        start = time.process_time()
        entries = get_prompt_logprobs(results, "", ByteTokenizer(), time.monotonic() + 60)
        assert [entry.text_offset for entry in entries[-2:]] == [count // 2 - 1] * 2
        return time.process_time() - start

    seconds(1000)
    assert min(seconds(40_000) for _ in range(3)) < 10 * min(seconds(10_000) for _ in range(3))


def test_long_prompts_are_checked_against_the_deadline(tmp_path: Path) -> None:
    result = SegmentResult(np.zeros(4, np.int64), np.zeros(4, np.float32), [b"x"] * 4, 0)
    with pytest.raises(DeadlineExceededError):
        get_prompt_logprobs([result], "xxxx", ByteTokenizer(), time.monotonic() - 1)
    with client(tmp_path, max_seconds=0.5) as web:
        start = time.monotonic()
        assert "timed out" in error(complete(web, "x" * 200_000, echo=True, logprobs=1), 408)
        assert time.monotonic() - start < 10


def test_events_have_one_line_for_every_client(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\u0085d\ve\ff\x1cg\r\nh"
    with client(tmp_path) as web:
        response = complete(web, text, echo=True, stream=True)
    assert not set("\u2028\u2029\u0085") & set(response.text)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    assert json.loads(events[0])["choices"][0]["text"] == text


def test_the_best_of_several_texts_is_returned(tmp_path: Path) -> None:
    with client(tmp_path) as web:
        options: dict[str, Any] = {"max_tokens": 12, "seed": 3, "prompt": ["x", "y"], "logprobs": 0}
        candidates = complete(web, **options, n=5).json()["choices"]
        response = complete(web, **options, n=2, best_of=5).json()
    means = [float(np.mean(choice["logprobs"]["token_logprobs"])) for choice in candidates]
    best = [sorted(range(start, start + 5), key=lambda index: -means[index])[:2] for start in (0, 5)]
    assert [choice["text"] for choice in response["choices"]] == [
        candidates[index]["text"] for group in best for index in group
    ]
    assert [choice["index"] for choice in response["choices"]] == [0, 1, 2, 3]
    assert response["usage"]["completion_tokens"] == 2 * 5 * 12


@pytest.mark.parametrize("options", [{"suffix": ""}, {"best_of": 1}, {"best_of": 1, "n": None}, {"prompt": None}])
def test_values_that_change_nothing_are_accepted(tmp_path: Path, options: dict[str, Any]) -> None:
    with client(tmp_path) as web:
        assert complete(web, **{"prompt": "x", **options}).status_code == 200


SHAPES = "prompt must be a text, a list of texts, a list of token ids, or a list of such lists"


def test_the_description_names_the_model(tmp_path: Path) -> None:
    with client(tmp_path) as web:
        name = web.get("/v1/models").json()["data"][0]["id"]
        schemas = web.get("/openapi.json").json()["components"]["schemas"]
    for schema in ("CompletionBody", "ChatBody"):
        assert schemas[schema]["properties"]["model"]["enum"] == [name]


def test_the_default_length_is_within_the_limit(tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="the package 'openai' is not installed")
    from tests.serving.test_chat import client as chat_client

    with chat_client(tmp_path, max_tokens=8) as web:
        response = web.post("/v1/completions", json={"model": "m", "prompt": "x", "ignore_eos": True})
        assert response.json()["usage"]["completion_tokens"] == 8
        response = web.post("/v1/completions", json={"model": "m", "prompt": "x", "max_tokens": 16})
        assert "max_tokens (16) must be at most 8" in error(response, 400)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_field_that_is_null_is_as_one_that_is_absent(tmp_path: Path, path: str) -> None:
    pytest.importorskip("openai", reason="the package 'openai' is not installed")
    from tests.serving.test_chat import client as chat_client

    is_chat = path.startswith("chat")
    text: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if is_chat else {"prompt": "x"}
    body = {"model": "m", **text, "seed": 1, "temperature": 0.5}
    with chat_client(tmp_path, max_tokens=16) as web:
        expected = web.post(f"/v1/{path}", json=body).json()["choices"]
        fields = web.get("/openapi.json").json()["components"]["schemas"]
        names = fields["ChatBody" if is_chat else "CompletionBody"]["properties"].keys()
        nulls = dict.fromkeys([*names, "web_search_options", "echo", "top_k"])
        response = web.post(f"/v1/{path}", json={**nulls, **body})
        assert response.status_code == 200, response.text
        assert response.json()["choices"] == expected
        for options in ({"top_k": -1}, {"safety_identifier": "a", "modalities": ["text"]} if is_chat else {}):
            assert web.post(f"/v1/{path}", json={**body, **options}).json()["choices"] == expected
        assert (
            web.post(f"/v1/{path}", json={**body, "model": None}).json()["error"]["message"].startswith("model is mi")
        )


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({"best_of": 2, "n": 3}, "best_of is 2, expected at least n (3)", "best_of"),
        ({"best_of": 2, "stream": True}, "cannot be streamed", "best_of"),
        ({"suffix": "x"}, "suffix is not supported", "suffix"),
        ({"logprobs": True}, "logprobs is true, expected an integer", "logprobs"),
        ({"logprobs": "1"}, 'logprobs is "1", expected an integer', "logprobs"),
        ({"logprobs": 21}, "logprobs is 21, expected at most 20", "logprobs"),
        ({"n": True}, "n is true, expected an integer", "n"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5, expected an integer", "max_tokens"),
        ({"temperature": "hot"}, 'temperature is "hot", expected a number', "temperature"),
        ({"top_k": -2}, "top_k is -2, expected at least -1", "top_k"),
        ({"temperature": -1}, "temperature is -1.0, expected at least 0", "temperature"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens (5) must be at most max_tokens (2)", "min_tokens"),
        ({"stream": "yes"}, 'stream is "yes", expected true or false', "stream"),
        ({"stop": {"a": 1}}, 'stop is {"a": 1}, expected a text or a list', "stop"),
        ({"stop": ["x", 1]}, "stop[1] is 1, expected a text", "stop"),
        ({"stop": ["x"] * 17}, "stop has 17 entries, expected at most 16", "stop"),
        ({"stream_options": {}}, "stream_options needs stream", "stream_options"),
        ({"prompt": [-1]}, "prompt has the token id -1", "prompt"),
        ({"prompt": [2**40]}, "prompt has the token id 1099511627776", "prompt"),
        ({"prompt": [[1], [-1]]}, "prompt has the token id -1", "prompt"),
        ({"prompt": [300]}, "Token 300 is not in the vocabulary", None),
        *(({"prompt": prompt}, SHAPES, "prompt") for prompt in ([["a"]], [[[1]]], [1, "a"], ["a", 1], [True], {}, 3)),
        ({"prompt": []}, "empty list", "prompt"),
        ({"prompt": ["x"] * 65}, "prompts (65) must be at most 64", "prompt"),
        ({"prompt": ["x"] * 40, "n": 2}, "n x prompts (80) must be at most 64", "prompt"),
        ({"n": 65}, "n (65) must be at most 64", "n"),
    ],
)
def test_wrong_values_are_explained_in_plain_words(
    tmp_path: Path, options: dict[str, Any], message: str, param: str | None
) -> None:
    with client(tmp_path) as web:
        response = complete(web, **{"prompt": "x", **options})
    assert message in error(response, 400)
    assert response.json()["error"]["param"] == param
    text = response.json()["error"]["message"]
    assert not re.search(r"\b(None|True|False|dict|str|int|tuple|instance|Value error|pydantic)\b", text)

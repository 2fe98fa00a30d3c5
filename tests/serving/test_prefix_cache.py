"""The server reads no prefix twice, says how much was cached, and answers as without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("httpx", reason="the package 'httpx' is not installed")

from fastapi.testclient import TestClient

from memtx.data.tokenizers import ByteTokenizer
from memtx.inference.sessions.pool import SessionPool
from memtx.serving.app import create_app
from tests.inference.conftest import TEXT, tiny_model

PROMPT = TEXT[:1000]
NUM_TOKENS = len(PROMPT.encode())
KEY = "k" * 16


def new_client(folder: Path, cache_bytes: int = 1 << 26) -> TestClient:
    pool = SessionPool(tiny_model(257), ByteTokenizer(), folder, segment_length=32, prefix_cache_bytes=cache_bytes)
    return TestClient(create_app(pool, model_name="m"))


def complete(web: TestClient, prompt: Any = PROMPT, key: str = "", **options: Any) -> tuple[str, int]:
    body = {"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0} | options
    response = web.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"} if key else {})
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    return response.json()["choices"][0]["text"], usage["prompt_tokens_details"]["cached_tokens"]


def metric(web: TestClient, name: str) -> float:
    lines = web.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"memtx_prefix_cache_{name} "))


def test_the_second_request_continues_from_the_first(tmp_path: Path) -> None:
    with new_client(tmp_path / "cold", 0) as cold, new_client(tmp_path / "warm") as web:
        expected = complete(cold)
        assert complete(cold) == expected
        assert expected[1] == 0
        assert complete(web) == expected
        assert complete(web) == (expected[0], NUM_TOKENS)
        assert complete(web, list(PROMPT.encode())) == (expected[0], NUM_TOKENS)
        longer = PROMPT + "and more text"
        assert complete(web, longer) == (complete(cold, longer)[0], NUM_TOKENS // 32 * 32)
        penalty = {"repetition_penalty": 1.3}
        assert complete(web, **penalty) == (complete(cold, **penalty)[0], NUM_TOKENS)
        assert [metric(web, name) for name in ("hits", "misses")] == [4, 1]
        assert metric(web, "hit_tokens") > 3 * NUM_TOKENS
        assert metric(web, "bytes") > 0
        assert metric(web, "evictions") == 0


def test_usage_of_a_stream_and_of_several_prompts(tmp_path: Path) -> None:
    with new_client(tmp_path) as web:
        complete(web)
        assert complete(web, [PROMPT, PROMPT, "unknown"], n=2)[1] == 2 * NUM_TOKENS
        body = {"model": "m", "prompt": PROMPT, "stream": True, "stream_options": {"include_usage": True}}
        assert f'"cached_tokens": {NUM_TOKENS}' in web.post("/v1/completions", json=body).text


def test_keys_share_nothing(tmp_path: Path) -> None:
    with new_client(tmp_path) as web:
        assert [complete(web, key=key)[1] for key in (KEY, "other", KEY)] == [0, 0, NUM_TOKENS]


def test_echo_scores_every_token(tmp_path: Path) -> None:
    with new_client(tmp_path) as web:
        complete(web)
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1}
        response = web.post("/v1/completions", json=body).json()
        assert len(response["choices"][0]["logprobs"]["token_logprobs"]) == NUM_TOKENS
        assert response["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_an_empty_session_uses_it_and_a_started_one_reads_on(tmp_path: Path) -> None:
    with new_client(tmp_path) as web:
        text, _ = complete(web, TEXT)
        before = metric(web, "hits")
        for fed in ("", TEXT[:1500]):
            session_id = web.post("/v1/sessions", json={"text": fed}).json()["id"]
            body = {"prompt": TEXT[len(fed) :], "max_tokens": 12, "temperature": 0}
            answer = web.post(f"/v1/sessions/{session_id}/generate", json=body).json()
            assert answer["choices"][0]["text"] == text
        assert metric(web, "hits") == before + 1

"""Special tokens in the texts of sessions: plain by default, parsed on request, however the text arrives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("httpx", reason="the package 'httpx' is not installed")
pytest.importorskip("openai", reason="the package 'openai' is not installed")

from fastapi.testclient import TestClient

from tests.serving.test_chat import client, tokens_of

TEXT = "<|im_start|>user\nWho is it, in the end?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[TestClient]:
    with client(tmp_path) as web:
        yield web


def post(web: TestClient, path: str, **body: Any) -> dict[str, Any]:
    response = web.post(f"/v1/sessions{path}", json=body)
    assert response.status_code < 300, response.text
    result: dict[str, Any] = response.json()
    return result


def ids(*responses: dict[str, Any]) -> list[int]:
    return [token for response in responses for part in response["segments"] for token in part["token_ids"]]


def plain_ids(web: TestClient, text: str) -> list[int]:
    ids: list[int] = web.app.state.service.pool.tokenizer.encode(text).tolist()  # type: ignore[attr-defined]
    return ids


@pytest.mark.parametrize("parse_special", [False, True])
def test_every_text_of_a_session_is_parsed_on_request(web: TestClient, parse_special: bool) -> None:
    expected = tokens_of(web, TEXT) if parse_special else plain_ids(web, TEXT)
    assert (257 in expected) == parse_special
    options = {"parse_special": parse_special}
    session = post(web, "", text=TEXT, **options)
    assert ids(session, post(web, f"/{session['id']}/feed", text="", end_of_text=True, **options)) == expected
    session = post(web, "")
    assert ids(post(web, f"/{session['id']}/score", text=TEXT, **options)) == expected
    settings = {"prompt": TEXT, "max_tokens": 5, "temperature": 0, **options}
    completion = web.post("/v1/completions", json={"model": "m", **settings}).json()
    generated = post(web, f"/{session['id']}/generate", **settings)
    assert generated["choices"] == completion["choices"]
    assert generated["usage"]["prompt_tokens"] == len(expected)
    updated = post(web, f"/{session['id']}/generate", update_session=True, **settings)
    assert updated["choices"] == completion["choices"]
    text = completion["choices"][0]["text"]
    post(web, f"/{session['id']}/feed", text="", end_of_text=True)
    assert web.get(f"/v1/sessions/{session['id']}").json()["tokens"] == len(expected) + len(plain_ids(web, text))


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_special_token_may_arrive_in_pieces(tmp_path: Path, size: int) -> None:
    pieces = [TEXT[start : start + size] for start in range(0, len(TEXT), size)]
    with client(tmp_path) as web:
        expected, session = tokens_of(web, TEXT), post(web, "")["id"]
        half = len(pieces) // 2
        responses = [post(web, f"/{session}/feed", text=piece, parse_special=True) for piece in pieces[:half]]
        fork = post(web, f"/{session}/fork")["id"]
    with client(tmp_path) as web:  # saved inside a special token
        for name in (session, fork):
            rest = [post(web, f"/{name}/feed", text=piece, parse_special=True) for piece in pieces[half:]]
            rest.append(post(web, f"/{name}/feed", text="", end_of_text=True, parse_special=True))
            assert ids(*responses, *rest) == expected


@pytest.mark.parametrize("parse_first", [False, True])
def test_plain_text_never_joins_a_special_token(web: TestClient, parse_first: bool) -> None:
    for cut in range(1, len("<|im_end|>")):
        first, second = "x<|im_end|>"[: cut + 1], "<|im_end|>"[cut:]
        session = post(web, "", text=first, parse_special=parse_first)
        score = post(web, f"/{session['id']}/score", text=second, parse_special=not parse_first)
        end = post(web, f"/{session['id']}/feed", text=second, parse_special=not parse_first, end_of_text=True)
        assert ids(session, score) == ids(session, end)
        assert 257 not in ids(session, end)
        assert end["bytes"] == len("x<|im_end|>")

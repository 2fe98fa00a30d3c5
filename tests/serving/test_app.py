"""API key, limits and errors, without a network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("httpx", reason="the package 'httpx' is not installed")

from fastapi.testclient import TestClient

from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import MemtxError
from memtx.inference.sessions.pool import SessionPool
from memtx.serving.app import create_app
from memtx.serving.limits import Limits
from tests.inference.conftest import TEXT, tiny_model


def client(folder: Path, limits: Limits | None = None, key: str | None = None, **options: Any) -> TestClient:
    pool = SessionPool(tiny_model(257), ByteTokenizer(), folder, segment_length=32, **options)
    return TestClient(create_app(pool, model_name="m", limits=limits, api_key=key), raise_server_exceptions=False)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[TestClient]:
    with client(tmp_path / "s") as web:
        yield web


def error(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    fields = response.json()["error"]
    assert fields["message"]
    assert fields["detail"]
    assert "Traceback" not in response.text
    return str(fields["message"])


def test_an_api_key_is_required(tmp_path: Path) -> None:
    with client(tmp_path, key="k" * 16) as web:
        assert web.get("/health").status_code == 200
        assert web.get("/").status_code == 200
        for credentials in (None, "Bearer wrong", "k" * 16, "Bearer é", "Bearer"):
            headers = {"Authorization": credentials.encode("latin-1")} if credentials is not None else {}
            assert "no valid API key" in error(web.get("/v1/models", headers=headers), 401)
            error(web.post("/v1/sessions", json={}, headers=headers), 401)
            error(web.get("/metrics", headers=headers), 401)
        good = {"Authorization": f"Bearer {'k' * 16}"}
        assert web.get("/v1/models", headers=good).status_code == 200
        # With a key, the server may have other names.
        assert web.get("/v1/models", headers=good | {"Host": "example.org"}).status_code == 200


def test_other_sites_are_rejected(web: TestClient) -> None:
    error(web.post("/v1/sessions", json={}, headers={"Origin": "http://evil.example"}), 403)
    error(web.get("/v1/models", headers={"Host": "evil.example"}), 403)
    assert web.post("/v1/sessions", json={}, headers={"Origin": "http://testserver"}).status_code == 201
    assert web.get("/v1/models", headers={"Host": "[::1]:8000"}).status_code == 200


def test_the_size_of_a_body_is_limited(tmp_path: Path) -> None:
    with client(tmp_path, Limits(max_body_bytes=1000)) as web:
        assert "more than 1000 bytes" in error(web.post("/v1/sessions", json={"text": "x" * 1000}), 413)
        parts = iter([b'{"text": "'] + [b"x" * 100] * 20)  # without Content-Length
        response = web.post("/v1/sessions", content=parts, headers={"Content-Type": "application/json"})
        assert "more than 1000 bytes" in error(response, 413)
        session_id = web.post("/v1/sessions", json={}).json()["id"]
        content = web.get(f"/v1/sessions/{session_id}/export").content
        assert len(content) > 1000
        assert web.post("/v1/sessions/import", content=content).status_code == 201


def test_a_full_server_asks_to_retry_later(tmp_path: Path) -> None:
    with client(tmp_path, Limits(max_concurrent_requests=1), max_sessions=2) as web:
        for _ in range(2):
            assert web.post("/v1/sessions", json={}).status_code == 201
        full = web.post("/v1/sessions", json={})
        assert "Session limit reached (2)" in error(full, 429)
        assert int(full.headers["Retry-After"]) > 0
        guard = web.app.middleware_stack  # type: ignore[attr-defined]
        while not hasattr(guard, "active_requests"):
            guard = guard.app
        guard.active_requests = 1
        busy = web.post("/v1/completions", json={"model": "m", "prompt": "x"})
        assert "Request limit reached (1 in progress)" in error(busy, 429)
        assert int(busy.headers["Retry-After"]) > 0
        assert web.get("/health").status_code == 200


def test_requests_time_out(tmp_path: Path) -> None:
    with client(tmp_path, Limits(max_seconds=0.3, max_tokens=10**9)) as web:
        start = time.monotonic()
        body = {"model": "m", "prompt": "x", "max_tokens": 10**9}
        assert "timed out" in error(web.post("/v1/completions", json=body), 408)
        response = web.post("/v1/completions", json=body | {"stream": True})
        assert response.status_code == 200
        assert "timed out" in response.text.rstrip().splitlines()[-1]
        session_id = web.post("/v1/sessions", json={}).json()["id"]
        error(web.post(f"/v1/sessions/{session_id}/generate", json={"max_tokens": 10**9, "update_session": True}), 408)
        assert web.get(f"/v1/sessions/{session_id}").json()["bytes"] == 0
        assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc%2fpasswd", "x", "%00", "a" * 32, "." * 32, "A" * 32, "%2e%2e", "0" * 31 + "/", "import"]
)
def test_a_session_id_is_never_a_path(web: TestClient, name: str) -> None:
    for method, path in (("GET", ""), ("GET", "/export"), ("DELETE", ""), ("POST", "/save"), ("POST", "/fork")):
        assert web.request(method, f"/v1/sessions/{name}{path}").status_code in (404, 405), (method, path)
    assert web.post(f"/v1/sessions/{name}/feed", json={"text": "x"}).status_code in (404, 405)


def test_errors_are_one_object(web: TestClient) -> None:
    session_id = web.post("/v1/sessions", json={}).json()["id"]
    feed = f"/v1/sessions/{session_id}/feed"
    assert "Did you mean 'text'?" in error(web.post(feed, json={"txt": "x"}), 400)
    error(web.post(feed, content=b"{", headers={"Content-Type": "application/json"}), 400)
    error(web.post(feed, content=b"\xff", headers={"Content-Type": "application/json"}), 400)
    error(web.post(feed, content=b'{"text": "\\ud800"}', headers={"Content-Type": "application/json"}), 400)
    error(web.post(feed, content=b'{"\\ud800": 1}', headers={"Content-Type": "application/json"}), 400)
    error(web.post(feed, content=b"[" * 100_000, headers={"Content-Type": "application/json"}), 400)
    error(web.post(feed, json={"text": 3}), 400)
    error(web.post("/v1/sessions/import", content=b"no such file"), 400)
    error(web.post(f"/v1/sessions/{session_id}/generate", json={"update_session": True, "n": 2}), 400)
    error(web.get("/nowhere"), 404)
    error(web.delete("/v1/models"), 405)


def test_generation_that_updates_the_session_can_be_streamed(web: TestClient) -> None:
    session_id = web.post("/v1/sessions", json={"text": TEXT[:50]}).json()["id"]
    body = {"max_tokens": 8, "seed": 1, "update_session": True, "stream": True, "prompt": " And"}
    text = web.post(f"/v1/sessions/{session_id}/generate", json=body).text
    assert text.endswith("data: [DONE]\n\n")
    assert web.get(f"/v1/sessions/{session_id}").json()["bytes"] > 54


def test_an_internal_error_is_not_shown_to_the_client(web: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> object:
        raise RuntimeError("secret")

    monkeypatch.setattr(SessionPool, "create", failing)
    assert "secret" not in error(web.post("/v1/sessions", json={}), 500)


def test_limits_are_checked() -> None:
    with pytest.raises(MemtxError, match=r"max_seconds \(0\) must be above 0"):
        Limits(max_seconds=0)

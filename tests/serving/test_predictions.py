"""A task's model behind HTTP: its route, and everything else as on the other servers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("httpx", reason="the package 'httpx' is not installed")

from fastapi.testclient import TestClient

from memtx.data.tokenizers import ByteTokenizer
from memtx.inference.sessions.pool import SessionPool
from memtx.serving.app import create_app, create_task_app
from memtx.serving.limits import Limits
from tests.inference.conftest import tiny_model
from tests.serving.test_app import error
from tests.tasks import KINDS, predictor, records


def client(kind: str = "classification", limits: Limits | None = None, key: str | None = None) -> TestClient:
    return TestClient(
        create_task_app(predictor(kind), model_name="m", limits=limits, api_key=key), raise_server_exceptions=False
    )


@pytest.fixture
def web() -> Iterator[TestClient]:
    with client() as made:
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_one_input_or_many(kind: str) -> None:
    given = records(kind, 3)
    wanted = predictor(kind).predict(given)
    with client(kind) as web:
        said = web.post("/v1/predict", json={"input": given, "model": "m"}).json()
        assert [one.pop("index") for one in said["data"]] == [0, 1, 2]
        assert (said["data"], said["task"], said["model"]) == (wanted, kind, "m")
        alone = web.post("/v1/predict", json={"input": given[0]}).json()["data"]
        assert len(alone) == 1
        if kind in ("classification", "tagging"):
            assert web.post("/v1/predict", json={"input": ["the whale", "Ahab"]}).status_code == 200


def test_mistakes_are_one_object(web: TestClient) -> None:
    def say(body: Any) -> str:
        return error(web.post("/v1/predict", json=body), 400)

    assert "Did you mean 'input'?" in say({"inputs": "x"})
    assert "There is no 'text'" in say({"input": {"txt": "x"}})
    assert "Input 1: The text is empty" in say({"input": ["x", " "]})
    assert "empty list" in say({"input": []})
    assert "tokens" in say({"input": "the whale " * 100})
    for body in ({"input": 3}, {"input": [3]}, {"input": None}, {}, [], {"input": [["x"]]}):
        say(body)
    bad = {"Content-Type": "application/json"}
    for content in (b"{", b"\xff", b'{"input": "\\ud800"}', b'{"input": {"text": "\\ud800"}}', b"[" * 100_000):
        error(web.post("/v1/predict", content=content, headers=bad), 400)
    assert "only 'm'" in error(web.post("/v1/predict", json={"input": "x", "model": "other"}), 404)
    assert web.post("/v1/predict", json={"input": {"txt": "x"}}).json()["error"]["param"] == "input"


def test_the_other_kinds_routes_say_so(web: TestClient, tmp_path: Any) -> None:
    for address in ("/v1/completions", "/v1/sessions", "/v1/sessions/abc/feed"):
        said = web.post(address, json={"model": "m", "prompt": "x"})
        assert "/v1/predict" in error(said, 400)
        assert said.json()["error"]["code"] == "unsupported_endpoint"
    pool = SessionPool(tiny_model(257), ByteTokenizer(), tmp_path / "s", segment_length=32)
    with TestClient(create_app(pool, model_name="m"), raise_server_exceptions=False) as texts:
        assert "/v1/completions" in error(texts.post("/v1/predict", json={"input": "x"}), 400)


def test_health_models_and_metrics(web: TestClient) -> None:
    web.post("/v1/predict", json={"input": "the whale"})
    assert web.get("/health").json() == {"status": "ok"}
    assert [one["id"] for one in web.get("/v1/models").json()["data"]] == ["m"]
    assert web.get("/v1/models/m").status_code == 200
    measured = web.get("/metrics").text
    assert 'memtx_http_requests_total{method="POST",route="/v1/predict",status="200"} 1.0' in measured
    assert "memtx_tokens_read 4.0" in measured  # two words, [CLS] and [SEP]
    error(web.get("/nowhere"), 404)
    error(web.get("/v1/predict"), 405)


def test_limits_and_key_hold() -> None:
    with client(key="k" * 16) as web:
        error(web.post("/v1/predict", json={"input": "x"}), 401)
        good = {"Authorization": f"Bearer {'k' * 16}"}
        assert web.post("/v1/predict", json={"input": "x"}, headers=good).status_code == 200
    with client(limits=Limits(max_inputs=2, max_body_bytes=1000)) as web:
        assert "(3) must be at most 2" in error(web.post("/v1/predict", json={"input": ["x"] * 3}), 400)
        error(web.post("/v1/predict", json={"input": "x" * 1000}), 413)
        error(web.post("/v1/predict", json={"input": "x"}, headers={"Origin": "http://evil.example"}), 403)


def test_time_has_an_end() -> None:
    made = predictor("classification")
    with TestClient(
        create_task_app(made, model_name="m", limits=Limits(max_seconds=0.3)), raise_server_exceptions=False
    ) as web:
        with made._lock:  # Another request is being answered.
            began = time.monotonic()
            assert "timed out" in error(web.post("/v1/predict", json={"input": "x"}), 408)
            assert time.monotonic() - began < 10
        assert web.post("/v1/predict", json={"input": "x"}).status_code == 200
        made.close()
        error(web.post("/v1/predict", json={"input": "x"}), 503)


def test_many_clients_get_their_own_answers(web: TestClient) -> None:
    given = [one["text"] for one in records("classification", 12)]
    wanted = predictor("classification").predict(given)
    found: dict[int, Any] = {}

    def ask(place: int) -> None:
        found[place] = web.post("/v1/predict", json={"input": given[place]}).json()["data"][0]

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for place, one in enumerate(wanted):
        # Asked alone it is not padded beside others: float32's noise.
        assert found[place]["scores"] == pytest.approx(one["scores"], abs=1e-3)

"""HTTP server of a task model: its route, and limits and errors as on other servers."""

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
    app = create_task_app(predictor(kind), model_name="m", limits=limits, api_key=key)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def web() -> Iterator[TestClient]:
    with client() as web:
        yield web


@pytest.mark.parametrize("kind", KINDS)
def test_one_input_or_several_are_predicted(kind: str) -> None:
    inputs = records(kind, 3)
    expected = predictor(kind).predict(inputs)
    with client(kind) as web:
        body = web.post("/v1/predict", json={"input": inputs, "model": "m"}).json()
        assert [prediction.pop("index") for prediction in body["data"]] == [0, 1, 2]
        assert (body["data"], body["task"], body["model"]) == (expected, kind, "m")
        single = web.post("/v1/predict", json={"input": inputs[0]}).json()["data"]
        assert len(single) == 1
        if kind in ("classification", "tagging"):
            assert web.post("/v1/predict", json={"input": ["the whale", "Ahab"]}).status_code == 200


def test_errors_are_one_object(web: TestClient) -> None:
    def message(body: Any) -> str:
        return error(web.post("/v1/predict", json=body), 400)

    assert "Did you mean 'input'?" in message({"inputs": "x"})
    assert "There is no 'text'" in message({"input": {"txt": "x"}})
    assert "Input 1: The text is empty" in message({"input": ["x", " "]})
    assert "empty list" in message({"input": []})
    assert "temperature is for encoder-decoders" in message({"input": "x", "temperature": 1.0})
    assert "tokens" in message({"input": "the whale " * 100})
    for body in ({"input": 3}, {"input": [3]}, {"input": None}, {}, [], {"input": [["x"]]}):
        message(body)
    headers = {"Content-Type": "application/json"}
    for content in (b"{", b"\xff", b'{"input": "\\ud800"}', b'{"input": {"text": "\\ud800"}}', b"[" * 100_000):
        error(web.post("/v1/predict", content=content, headers=headers), 400)
    assert "only 'm'" in error(web.post("/v1/predict", json={"input": "x", "model": "other"}), 404)
    assert web.post("/v1/predict", json={"input": {"txt": "x"}}).json()["error"]["param"] == "input"


def test_routes_of_the_other_kind_of_model_are_rejected(web: TestClient, tmp_path: Any) -> None:
    for address in ("/v1/completions", "/v1/sessions", "/v1/sessions/abc/feed"):
        response = web.post(address, json={"model": "m", "prompt": "x"})
        assert "/v1/predict" in error(response, 400)
        assert response.json()["error"]["code"] == "unsupported_endpoint"
    pool = SessionPool(tiny_model(257), ByteTokenizer(), tmp_path / "s", segment_length=32)
    with TestClient(create_app(pool, model_name="m"), raise_server_exceptions=False) as texts:
        assert "/v1/completions" in error(texts.post("/v1/predict", json={"input": "x"}), 400)


def test_health_models_and_metrics_are_served(web: TestClient) -> None:
    web.post("/v1/predict", json={"input": "the whale"})
    assert web.get("/health").json() == {"status": "ok"}
    assert [model["id"] for model in web.get("/v1/models").json()["data"]] == ["m"]
    assert web.get("/v1/models/m").status_code == 200
    metrics = web.get("/metrics").text
    assert 'memtx_http_requests_total{method="POST",route="/v1/predict",status="200"} 1.0' in metrics
    assert "memtx_tokens_read 4.0" in metrics  # two words, [CLS] and [SEP]
    error(web.get("/nowhere"), 404)
    error(web.get("/v1/predict"), 405)


def test_limits_and_api_key_apply() -> None:
    with client(key="k" * 16) as web:
        error(web.post("/v1/predict", json={"input": "x"}), 401)
        headers = {"Authorization": f"Bearer {'k' * 16}"}
        assert web.post("/v1/predict", json={"input": "x"}, headers=headers).status_code == 200
    with client(limits=Limits(max_inputs=2, max_body_bytes=1000)) as web:
        assert "(3) must be at most 2" in error(web.post("/v1/predict", json={"input": ["x"] * 3}), 400)
        error(web.post("/v1/predict", json={"input": "x" * 1000}), 413)
        error(web.post("/v1/predict", json={"input": "x"}, headers={"Origin": "http://evil.example"}), 403)


def test_requests_time_out() -> None:
    model = predictor("classification")
    app = create_task_app(model, model_name="m", limits=Limits(max_seconds=0.3))
    with TestClient(app, raise_server_exceptions=False) as web:
        with model._lock:  # as if another request were in progress
            start = time.monotonic()
            assert "timed out" in error(web.post("/v1/predict", json={"input": "x"}), 408)
            assert time.monotonic() - start < 10
        assert web.post("/v1/predict", json={"input": "x"}).status_code == 200
        model.close()
        error(web.post("/v1/predict", json={"input": "x"}), 503)


def test_concurrent_clients_get_their_own_predictions(web: TestClient) -> None:
    inputs = [record["text"] for record in records("classification", 12)]
    expected = predictor("classification").predict(inputs)
    predictions: dict[int, Any] = {}

    def send(index: int) -> None:
        predictions[index] = web.post("/v1/predict", json={"input": inputs[index]}).json()["data"][0]

    threads = [threading.Thread(target=send, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for index, prediction in enumerate(expected):
        # Without the padding of a batch, float32 rounds differently.
        assert predictions[index]["scores"] == pytest.approx(prediction["scores"], abs=1e-3)

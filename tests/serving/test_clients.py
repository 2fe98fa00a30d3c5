"""The server with OpenAI's package, curl, and signals that end the process."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.data.tokenizers import ByteTokenizer
from memtx.inference.generate import generate
from memtx.inference.reader import StreamReader
from memtx.inference.sampling import SamplingParams
from tests.commands.tiny import BOOK
from tests.serving.conftest import Server

openai = pytest.importorskip("openai", reason="the package 'openai' is not installed")
pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none needed", max_retries=0)


def generate_text(workdir: Path, prompt: str, **options: Any) -> str:
    model, tokenizer = load_model_and_tokenizer(workdir / "model")
    return "".join(generate(model, tokenizer, prompt, segment_length=32, **options))


def test_openai_completes_a_prompt(client: Any, workdir: Path) -> None:
    response = client.completions.create(model="model", prompt="It was", max_tokens=20, seed=3, temperature=0.8)
    choice = response.choices[0]
    assert choice.text == generate_text(
        workdir, "It was", max_tokens=20, seed=3, sampling_params=SamplingParams(temperature=0.8)
    )
    assert choice.finish_reason == "length"
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (6, 20)
    assert client.models.list().data[0].id == "model"
    assert client.models.retrieve("model").id == "model"


def test_openai_streams_several_choices(client: Any, workdir: Path) -> None:
    options = {"model": "model", "prompt": ["It was", "A"], "max_tokens": 12, "seed": 1, "n": 2}
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    response = client.completions.create(**options)
    for index in range(4):
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(part.text for part in parts) == response.choices[index].text
        assert parts[-1].finish_reason == response.choices[index].finish_reason == "length"
    assert chunks[-1].usage == response.usage
    # The index of a choice is added to the seed.
    assert response.choices[3].text == generate_text(workdir, "A", max_tokens=12, seed=4)


def test_openai_scores_by_echo(client: Any, workdir: Path) -> None:
    response = client.completions.create(model="model", prompt="störmy", max_tokens=0, echo=True, logprobs=1)
    choice = response.choices[0]
    reader = StreamReader(*load_model_and_tokenizer(workdir / "model"), 32)
    nll = [value for part in (*reader.feed("störmy"), *reader.finish()) for value in part.nll.tolist()]
    assert choice.text == "störmy"
    assert [-logprob for logprob in choice.logprobs.token_logprobs] == pytest.approx(nll, abs=1e-5)  # float32
    assert choice.logprobs.tokens == ["s", "t", "bytes:\\xc3", "bytes:\\xb6", "r", "m", "y"]
    assert choice.logprobs.text_offset == [0, 1, 2, 2, 3, 4, 5]
    for logprob, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
        assert max(top.values()) >= logprob - 1e-5
    tokens = client.completions.create(model="model", prompt=list(b"It"), max_tokens=3, echo=True, logprobs=0, seed=1)
    assert tokens.choices[0].text.startswith("It")
    assert len(tokens.choices[0].logprobs.tokens) >= 5 - 3


def test_openai_raises_the_server_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="only 'model'") as caught:
        client.completions.create(model="gpt", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    for options, message in (
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_tokens": 10**6}, r"max_tokens \(1000000\) must be at most 4096"),
        ({"n": 65}, r"n \(65\) must be at most 64"),
        ({"stop": ""}, "stop"),
        ({"extra_body": {"temprature": 1}}, "Did you mean 'temperature'"),
        ({"presence_penalty": 3}, "presence_penalty is 3.0, expected between -2 and 2"),
        ({"prompt": [999]}, "Token 999"),
        ({"prompt": []}, "empty list"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.completions.create(**({"model": "model", "prompt": "x"} | options))


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_reads_a_book(server: Server, workdir: Path) -> None:
    def curl(method: str, path: str, body: object | None = None) -> Any:
        data = ["-H", "Content-Type: application/json", "-d", json.dumps(body)] if body is not None else []
        command = ["curl", "-sS", "--fail-with-body", "-X", method, *data, f"{server.address}{path}"]
        content = subprocess.run(command, capture_output=True, check=True).stdout
        return json.loads(content) if content else None

    first = curl("POST", "/v1/sessions", {"text": BOOK[:1500]})
    address = f"/v1/sessions/{first['id']}"
    rest = curl("POST", f"{address}/feed", {"text": BOOK[1500:], "end_of_text": True})
    model, tokenizer = load_model_and_tokenizer(workdir / "model")
    reader = StreamReader(model, tokenizer, 32)
    list(reader.feed(BOOK))
    list(reader.finish())
    assert rest["nll"] == pytest.approx(reader.totals.nll, rel=1e-5)
    assert rest["bytes"] == len(BOOK.encode())
    parts = [*first["segments"], *rest["segments"]]
    assert sum(sum(part["byte_lengths"]) for part in parts) == len(BOOK.encode())
    score = curl("POST", f"{address}/score", {"text": "It was", "logprobs": 2, "return_hidden_states": True})
    assert score["tokens"] == 6
    assert len(score["segments"][0]["hidden_states"][0]) == 16
    branch = curl("POST", f"{address}/fork")
    updated = curl(
        "POST", f"/v1/sessions/{branch['id']}/generate", {"max_tokens": 9, "seed": 2, "update_session": True}
    )
    assert updated["choices"][0]["text"] == generate_text(workdir, BOOK, max_tokens=9, seed=2)
    again = curl("POST", f"{address}/generate", {"max_tokens": 9, "seed": 2})
    assert again["choices"][0]["text"] == updated["choices"][0]["text"]
    assert curl("GET", address)["tokens"] == rest["tokens"]
    assert {first["id"], branch["id"]} <= {session["id"] for session in curl("GET", "/v1/sessions")["data"]}
    assert curl("DELETE", address) is None
    assert httpx.get(f"{server.address}{address}").status_code == 404
    assert "memtx_tokens_read" in httpx.get(f"{server.address}/metrics").text
    assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}


def test_sessions_survive_the_process(workdir: Path) -> None:
    options = ["--session-dir", str(workdir / "saved")]
    first = Server(workdir, *options)
    saved = httpx.post(f"{first.address}/v1/sessions", json={"text": BOOK[:2000], "save": True}).json()
    httpx.post(f"{first.address}/v1/sessions", json={"text": BOOK[:2000]})
    assert saved["saved"]
    first.end(signal.SIGKILL)
    second = Server(workdir, *options)
    listed = httpx.get(f"{second.address}/v1/sessions").json()["data"]
    assert [session["id"] for session in listed] == [saved["id"]], "only the session acknowledged as saved"
    assert listed[0]["nll"] == saved["nll"]
    unsaved = httpx.post(f"{second.address}/v1/sessions", json={"text": BOOK[:1700]}).json()
    assert not unsaved["saved"]
    second.end(signal.SIGTERM)
    third = Server(workdir, *options)
    restored = {session["id"]: session for session in httpx.get(f"{third.address}/v1/sessions").json()["data"]}
    assert restored.keys() == {saved["id"], unsaved["id"]}
    text = {"text": BOOK[1700:], "end_of_text": True}
    rest = httpx.post(f"{third.address}/v1/sessions/{unsaved['id']}/feed", json=text).json()
    reader = StreamReader(load_model_and_tokenizer(workdir / "model")[0], ByteTokenizer(), 32)
    list(reader.feed(BOOK))
    list(reader.finish())
    assert rest["nll"] == pytest.approx(reader.totals.nll, rel=1e-5)
    third.end()


def test_a_stream_ends_with_an_error_when_the_server_stops(workdir: Path) -> None:
    server = Server(workdir, "--session-dir", str(workdir / "ended"), "--max-tokens", "1000000")
    body = {"model": "model", "prompt": "x", "max_tokens": 1_000_000, "stream": True}
    session = httpx.post(f"{server.address}/v1/sessions", json={"text": BOOK[:100]}).json()["id"]
    with httpx.stream("POST", f"{server.address}/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line][-1]
    assert "was closed" in json.loads(last.removeprefix("data: "))["error"]["message"]
    # The server stops by itself, long before responses would be cut.
    server.process.wait(5)
    assert server.process.stderr is not None
    # The last line of the start is not read by the fixture.
    assert [line for line in server.process.stderr if not line.startswith("Try it with: curl")] == []
    server.process.stderr.close()
    assert (workdir / "ended" / f"{session}.session").exists()

"""Chat completions: the folder's template and tokens, OpenAI's client, and conversations that are sessions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("httpx", reason="the package 'httpx' is not installed")

from fastapi.testclient import TestClient

from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.inference.chat_template import load_chat_template
from memtx.inference.sessions.pool import SessionPool
from memtx.serving.app import create_app
from memtx.serving.limits import Limits
from tests.hf import plain
from tests.hf.folders import write
from tests.inference.test_chat_template import CHATML
from tests.inference.test_end_tokens import trained_backend
from tests.serving.test_app import error

openai = pytest.importorskip("openai", reason="the package 'openai' is not installed")

END = "<|im_end|>"
# Each question begins with the begin token, as in Llama 2.
BEGIN_TOKENS = "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
BEGIN_TOKENS += "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"


def folder_of(path: Path, template: str | None, **config_files: Any) -> Path:
    from tokenizers import AddedToken, Tokenizer

    config = {**plain.LLAMA, "vocab_size": 320, "hidden_size": 16, "eos_token_id": 257}
    tensors = plain.llama(config)
    # The most likely token is a small letter, so that an answer is a text.
    is_letter = torch.zeros(320, 1)
    is_letter[64:90] = 3
    tensors["lm_head.weight"] *= is_letter
    write(path, config, tensors)
    backend = Tokenizer.from_str(trained_backend().to_str())
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    backend.save(str(path / "tokenizer.json"))
    content: dict[str, Any] = {"bos_token": "<|begin|>", "eos_token": END, "chat_template": template, **config_files}
    (path / "tokenizer_config.json").write_text(json.dumps(content))
    return path


def client(path: Path, template: str | None = CHATML, **limits: Any) -> TestClient:
    folder = folder_of(path / "model", template)
    pool = SessionPool(*load_model_and_tokenizer(folder), path / "sessions", segment_length=16)
    options: dict[str, Any] = {"model_name": "m", "limits": Limits(**limits)}
    app = create_app(pool, chat_template=load_chat_template(folder), **options)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[TestClient]:
    with client(tmp_path) as web:
        yield web


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def chat(web: TestClient, *messages: dict[str, Any], **options: Any) -> Any:
    body = {"model": "m", "messages": list(messages), "max_tokens": 12, "temperature": 0, **options}
    return web.post("/v1/chat/completions", json=body)


def answer(web: TestClient, *messages: dict[str, Any], **options: Any) -> dict[str, Any]:
    response = chat(web, *messages, **options)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def tokens_of(web: TestClient, text: str) -> list[int]:
    ids: list[int] = web.app.state.service.pool.tokenizer.encode(text, parse_special=True).tolist()  # type: ignore[attr-defined]
    return ids


def test_the_rendered_conversation_is_continued(web: TestClient) -> None:
    messages = ({"role": "system", "content": "Be brief."}, user("Hé?"))
    response = answer(web, *messages, logprobs=True, top_logprobs=3)
    prompt = tokens_of(
        web, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n"
    )
    body = {"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 3}
    expected = web.post("/v1/completions", json=body).json()
    choice, expected_choice = response["choices"][0], expected["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected_choice["text"], "refusal": None}
    assert choice["finish_reason"] == expected_choice["finish_reason"]
    assert response["object"] == "chat.completion"
    assert response["usage"] == expected["usage"]
    entries = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == expected_choice["logprobs"]["token_logprobs"]
    assert [entry["token"] for entry in entries] == expected_choice["logprobs"]["tokens"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"], "the choice is greedy"
    content = bytes(byte for entry in entries for byte in entry["bytes"])
    assert content.decode("utf-8", "replace") == choice["message"]["content"]


@pytest.mark.parametrize("is_session", [False, True])
def test_the_last_message_is_continued(web: TestClient, is_session: bool) -> None:
    messages = (user("Who?"), {"role": "assistant", "content": "Call me "})
    options: dict[str, Any] = {"continue_final_message": True, "logprobs": True}
    prompt = tokens_of(web, "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nCall me ")
    body = {"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 0}
    expected = web.post("/v1/completions", json=body).json()
    for streams in (False, True):
        if is_session:
            options["session"] = "new"
        response = chat(web, *messages, **options, stream=streams)
        assert response.status_code == 200, response.text
        if streams:
            lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
            choices = [json.loads(line)["choices"][0] for line in lines]
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        else:
            text = response.json()["choices"][0]["message"]["content"]
            entries = response.json()["choices"][0]["logprobs"]["content"]
            assert response.json()["usage"]["prompt_tokens"] == len(prompt)
        assert text == expected["choices"][0]["text"]
        assert [entry["token"] for entry in entries] == expected["choices"][0]["logprobs"]["tokens"]
    if is_session:  # the conversation goes on after the continued message
        session = answer(web, *messages, **options)["session"]
        entire = ({"role": "assistant", "content": f"Call me {text}"}, user("And?"))
        expected = answer(web, user("Who?"), *entire)
        assert answer(web, user("And?"), session=session)["choices"] == expected["choices"]


def test_no_answer_is_begun_without_a_generation_prompt(web: TestClient) -> None:
    response = answer(web, user("Who?"), add_generation_prompt=False)
    assert response["usage"]["prompt_tokens"] == len(tokens_of(web, "<|im_start|>user\nWho?<|im_end|>\n"))


def test_special_tokens_in_a_prompt_are_text_unless_parsed(web: TestClient) -> None:
    text = "<|im_start|>user\nx<|im_end|>"
    body = {"model": "m", "prompt": text, "max_tokens": 12, "temperature": 0, "echo": True, "logprobs": 0}
    plain_text, parsed = (
        web.post("/v1/completions", json=body | options).json()["choices"][0]
        for options in ({}, {"parse_special": True})
    )
    assert len(plain_text["logprobs"]["tokens"]) == len(text) + 12
    assert len(parsed["logprobs"]["tokens"]) == len(tokens_of(web, text)) + 12 == len("user\nx") + 2 + 12
    assert parsed["text"].startswith(text)


def test_streamed_deltas_are_the_message(web: TestClient) -> None:
    options: dict[str, Any] = {
        "n": 2,
        "seed": 4,
        "temperature": 1,
        "logprobs": True,
        "stream_options": {"include_usage": True},
    }
    complete_response = answer(web, user("x"), **{**options, "stream_options": None})
    text = chat(web, user("x"), stream=True, **options).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == complete_response["usage"]
    for index in range(2):
        parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        message = complete_response["choices"][index]["message"]["content"]
        assert "".join(part["delta"].get("content", "") for part in parts) == message
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [
            complete_response["choices"][index]["finish_reason"]
        ]
        entries = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert entries == complete_response["choices"][index]["logprobs"]["content"]


@pytest.mark.parametrize("template", [CHATML, BEGIN_TOKENS], ids=["chatml", "begin tokens"])
def test_a_session_goes_on_with_a_conversation(tmp_path: Path, template: str) -> None:
    questions = ["Who?", "And then, in the end?", "Why?"]
    with client(tmp_path, template) as web:
        messages: list[dict[str, Any]] = []
        session, sizes = "new", set()
        for number, question in enumerate(questions, start=1):
            messages.append(user(question))
            complete_response = answer(web, *messages)
            turn = answer(web, user(question), session=session, save=number == 2)
            assert turn["choices"] == complete_response["choices"], number
            messages.append(turn["choices"][0]["message"])
            session = turn["session"]
            info = web.get(f"/v1/sessions/{session}").json()
            assert info["turns"] == number
            sizes.add(info["state_bytes"])
            cached = turn["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached > 0) == (number > 1)
        assert len(sizes) == 1
    with client(tmp_path, template) as web:  # saved at the end
        assert answer(web, *messages, user("Oh?"))["choices"] == answer(web, user("Oh?"), session=session)["choices"]


def test_a_session_that_read_a_text_is_asked_about_it(web: TestClient) -> None:
    session = web.post("/v1/sessions", json={"text": "Call me Ishmael. Some years ago"}).json()["id"]
    turn = answer(web, user("Who?"), session=session, temperature=3, seed=1)
    alone = answer(web, user("Who?"), temperature=3, seed=1)
    assert turn["choices"] != alone["choices"]
    assert turn["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"] + len("Call me Ishmael. Some years ago")


def test_a_failed_turn_leaves_the_session_as_it_was(web: TestClient) -> None:
    session = answer(web, user("Who?"), session="new")["session"]
    before = web.get(f"/v1/sessions/{session}").json()
    error(chat(web, user("x"), session=session, max_tokens=10**6), 400)
    error(chat(web, {"role": "user", "content": [{"type": "image_url"}]}, session=session), 400)
    assert web.get(f"/v1/sessions/{session}").json() == before
    count = len(web.get("/v1/sessions").json()["data"])
    error(chat(web, user("x"), session="new", temperature=-1), 400)
    error(chat(web, user("x"), session="0" * 32), 404)
    assert len(web.get("/v1/sessions").json()["data"]) == count


def test_stop_strings_and_tokens_end_an_answer(web: TestClient) -> None:
    text = answer(web, user("x"))["choices"][0]["message"]["content"]
    stop = text[4:6]
    stopped = answer(web, user("x"), stop=stop)["choices"][0]
    assert stopped["message"]["content"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with client(tmp_path, None) as web:
        response = chat(web, user("x"))
        assert "has no chat template. Use /v1/completions" in error(response, 400)
        assert response.json()["error"]["code"] == "no_chat_template"


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({"messages": []}, "messages has 0 entries, expected at least 1", "messages"),
        ({"messages": "x"}, 'messages is "x", expected a list', "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing", "messages"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content is 3, expected a text or a list",
            "messages",
        ),
        ({"messages": [user([{"type": "image_url"}])]}, "messages[0].content[0].type is", "messages"),
        ({"messages": [user("\\ud800")]}, "half of a surrogate pair", "messages"),
        ({"logprobs": 3}, "logprobs is 3, expected true or false", "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs", "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format must be text", "response_format"),
        ({"tool_choice": "required"}, "tool_choice must be none or auto", "tool_choice"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message and add_generation_prompt exclude each other",
            "continue_final_message",
        ),
        (
            {"continue_final_message": True, "messages": [{"role": "assistant", "tool_calls": []}]},
            "The last message has no content to continue",
            "messages",
        ),
        ({"session": "new", "n": 2}, "a session continues with one text", "n"),
        ({"mesages": []}, "Did you mean 'messages'", "mesages"),
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0, expected at least 1", "max_completion_tokens"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs is [], expected an object", "chat_template_kwargs"),
    ],
)
def test_wrong_requests_are_explained(web: TestClient, options: dict[str, Any], message: str, param: str) -> None:
    body = json.dumps({"model": "m", "messages": [user("x")], **options}).replace("\\\\ud800", "\\ud800")
    response = web.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert message in error(response, 400)
    assert response.json()["error"]["param"] == param


def test_a_template_that_refuses_the_messages_is_quoted(tmp_path: Path) -> None:
    template = "{{ raise_exception('Only one question.') if messages | length > 1 else messages[0].content }}"
    with client(tmp_path, template) as web:
        assert "Only one question." in error(chat(web, user("x"), user("y")), 400)
        assert answer(web, user("x"))["choices"][0]["message"]["content"]


def test_openai_package_chats(web: TestClient) -> None:
    api = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=web, max_retries=0)
    options: dict[str, Any] = {"model": "m", "messages": [user("x")], "max_completion_tokens": 9, "seed": 2}
    complete_response = api.chat.completions.create(
        **options, logprobs=True, top_logprobs=2, metadata={"a": "b"}, user="u", store=False
    )
    chunks = list(api.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == complete_response.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == complete_response.usage.completion_tokens
    assert complete_response.choices[0].logprobs.content[0].top_logprobs[0].logprob <= 0
    turn = api.chat.completions.create(**options, extra_body={"session": "new"})
    again = api.chat.completions.create(**options, extra_body={"session": turn.session})
    assert again.session == turn.session
    parts = [user([{"type": "text", "text": "x"}])]
    assert api.chat.completions.create(**{**options, "messages": parts}).choices[0].message.content == text
    with pytest.raises(openai.BadRequestError, match="expected at least 1"):
        api.chat.completions.create(**{**options, "messages": []})

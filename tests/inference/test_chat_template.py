"""Chat templates render conversations as the transformers library does; its renderings are recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="the extra 'serve' is not installed")

from memtx.errors import CheckpointError, MemtxError
from memtx.inference.chat_template import ChatTemplate, load_chat_template

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "chat_templates.json").read_text(encoding="utf-8"))
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(text: str) -> ChatTemplate:
    return ChatTemplate({"default": text}, RECORDED["special_tokens"])


@pytest.mark.parametrize("name", RECORDED["templates"])
def test_conversations_are_rendered_as_recorded(name: str) -> None:
    chat_template = template(RECORDED["templates"][name])
    cases = [case for case in RECORDED["cases"] if case["template"] == name]
    assert cases
    for case in cases:
        messages = RECORDED["conversations"][case["messages"]]
        if case["text"] is None:
            with pytest.raises(MemtxError, match="The chat template"):
                chat_template.render(messages, **case["options"])
        else:
            assert chat_template.render(messages, **case["options"]) == case["text"], case


@pytest.mark.parametrize("name", [name for name in RECORDED["templates"] if "dropped" not in name])
def test_an_answer_is_continued_without_the_conversation_before_it(name: str) -> None:
    chat_template = template(RECORDED["templates"][name])
    first: list[dict[str, Any]] = [{"role": "user", "content": "Who?"}]
    rest = [{"role": "user", "content": "And then?"}]
    entire = chat_template.render([*first, {"role": "assistant", "content": "Ahab."}, *rest])
    before, _, after = entire.partition("Ahab.")
    if "namespace" not in name:  # this one counts the messages
        assert chat_template.render_continuation(rest) == after
    assert chat_template.render(first).rstrip().startswith(before.rstrip()[:20])


def test_parts_are_joined_for_a_template_of_texts() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "user\none\ntwo<|im_end|>" in template(CHATML).render([{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include 'x' %}",
        "{{ range(1000000000) | list }}",
        "{{ messages[0].content.format_map({}) + 1 }}",
        "{{ undefined.name }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_reaches_nothing_but_the_conversation(text: str) -> None:
    with pytest.raises(MemtxError, match="The chat template"):
        template(text).render([{"role": "user", "content": "x"}])


def test_templates_of_a_folder_are_found(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None

    def write(name: str, content: Any) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    def text(tools: Any = None) -> str:
        chat_template = load_chat_template(tmp_path)
        assert chat_template is not None
        return chat_template.render([{"role": "user", "content": "x"}], tools=tools)

    write("tokenizer_config.json", {"bos_token": {"content": "<b>"}, "eos_token": None})
    assert load_chat_template(tmp_path) is None
    write("special_tokens_map.json", {"bos_token": "<old>", "eos_token": "<e>"})
    config = {"bos_token": {"content": "<b>"}, "chat_template": "{{ bos_token + messages[0].content + eos_token }}"}
    write("tokenizer_config.json", config)
    assert text() == "<b>x<e>"
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "t"}]
    write("tokenizer_config.json", config | {"chat_template": named})
    assert (text(), text([{}])) == ("a", "t")
    write("chat_template.jinja", "file")
    assert (text(), text([{}])) == ("file", "file")
    write("additional_chat_templates/tool_use.jinja", "tool file")
    assert (text(), text([{}])) == ("file", "tool file")
    write("chat_template.jinja", "{% if %}")
    with pytest.raises(CheckpointError, match=r"template is damaged: .* in line 1"):
        text()
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no default chat template, only tool_use"):
        load_chat_template(tmp_path)

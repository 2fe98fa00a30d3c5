"""Chat templates: a published folder's rendering of a conversation as text, as the ``transformers`` library does it.

A template is a program of the folder's author: it runs in jinja2's sandbox and sees nothing but the conversation.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from memtx import files
from memtx.errors import CheckpointError, MemtxError, missing_package_error

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # templates read the first, some the second
MARK = "\u2420MEMTX\u2420"  # a text that no conversation holds, to find the end of a message

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """Templates of a folder by name, ``default`` among them, and the spellings of its special tokens by name."""

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation; raises MemtxError if the template refuses it, fails or is damaged.

        A message has a role, a content (a text or a list of parts) and further fields; ``tools`` are JSON schemas of
        functions and ``variables`` further variables of the template. With ``continue_final_message``, the text ends
        in the content of the last message, which is not ended, and ``add_generation_prompt`` has no effect.
        """
        conversation = [self._prepare(message) for message in messages]
        if not conversation:
            raise MemtxError("The conversation has no message.", "Give at least one message.")
        begins_answer = add_generation_prompt and not continue_final_message
        options = {"tools": tools, "documents": None, "add_generation_prompt": begins_answer}
        variables = {**self.special_tokens, **(variables or {}), **options}
        content = _mark_end(conversation[-1]) if continue_final_message else ""
        text = self._render(conversation, bool(tools), variables)
        if not continue_final_message:
            return text
        text, mark, rest = text.rpartition(MARK)
        if not mark or content.strip() not in text:
            hint = "Remove continue_final_message."
            raise MemtxError("The chat template does not end with the last message.", hint)
        # A template that trims the content takes the space after the mark.
        return text if rest.startswith(" ") else text.rstrip()

    def render_continuation(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return the text after an answer of the model, whose end token was not read: end, messages and prompt.

        The conversation before the answer is not needed; arguments and errors as in :meth:`render`.
        """
        answered = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        _, mark, rest = self.render([*answered, *messages], **options).rpartition(MARK)
        if not mark:
            raise MemtxError("The chat template drops earlier answers.", "Send the whole conversation without session.")
        return rest

    def _prepare(self, message: Mapping[str, Any]) -> Message:
        prepared = {name: value for name, value in message.items() if value is not None}
        reasoning = next((prepared[name] for name in REASONING_FIELDS if name in prepared), None)
        if reasoning is not None:
            prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
        content = prepared.get("content")
        if isinstance(content, list) and not self._reads_parts:
            prepared["content"] = "\n".join(part["text"] for part in content)
        return prepared

    @cached_property
    def _reads_parts(self) -> bool:
        """True if the template renders the text of a content that is a list of parts, not the list."""
        try:
            content = [{"type": "text", "text": MARK}]
            text = self._render([{"role": "user", "content": content}], False, {**self.special_tokens})
        except MemtxError:
            return False
        return MARK in text and "'type'" not in text and '"type"' not in text

    def _render(self, messages: list[Message], has_tools: bool, variables: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError

        template = self._compiled["tool_use" if has_tools and "tool_use" in self.templates else "default"]
        try:
            return str(template.render(messages=messages, **variables))
        except TemplateError as error:
            raise MemtxError(f"The chat template refuses the messages: {error}.", "Change the messages.") from error
        except Exception as error:  # a template can fail in any way
            reason = f"{type(error).__name__}: {error}"
            raise MemtxError(f"The chat template cannot render the messages ({reason}).", "Change them.") from error

    @cached_property
    def _compiled(self) -> Mapping[str, Any]:
        from jinja2 import TemplateSyntaxError

        try:
            return {name: _create_environment().from_string(text) for name, text in self.templates.items()}
        except TemplateSyntaxError as error:
            message = f"The chat template is damaged: {error.message} in line {error.lineno}."
            raise CheckpointError(message, "Restore the folder's chat template.") from error


def _mark_end(message: Message) -> str:
    """Put a mark and a space after the content of a message, or its last text part; return what it was."""
    content, target, key = message.get("content"), message, "content"
    if isinstance(content, list):
        message["content"] = content = [{**part} for part in content]
        target, key = next((part for part in reversed(content) if "text" in part), {}), "text"
    text = target.get(key)
    if not isinstance(text, str):
        raise MemtxError("The last message has no content to continue.", "Remove continue_final_message.")
    target[key] = f"{text}{MARK} "
    return text


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the chat template of a published folder, or None if it has none.

    Raises CheckpointError if a file is damaged, or MemtxError if jinja2 is not installed.
    """
    config = files.read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    value = config.get("chat_template") if isinstance(config, Mapping) else None
    if isinstance(value, list):
        value = {str(entry["name"]): entry["template"] for entry in value if isinstance(entry, Mapping)}
    templates: dict[str, str] = value if isinstance(value, dict) else {"default": value} if value is not None else {}
    paths = {"default": folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).is_file() else {}
    paths |= {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if paths:  # newer files replace those of tokenizer_config.json
        templates = {name: path.read_bytes().decode("utf-8", "replace") for name, path in paths.items()}
    if not templates:
        return None
    if not isinstance(templates.get("default"), str):
        names = ", ".join(sorted(templates))
        raise CheckpointError(f"'{folder}' has no default chat template, only {names}.", f"Add {TEMPLATE_FILE}.")
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise missing_package_error("The chat template", error, "serve") from error
    return ChatTemplate(templates, _read_special_tokens(folder))


def _read_special_tokens(folder: Path) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", CONFIG_FILE):
        config = files.read_json(folder / name) if (folder / name).is_file() else {}
        for key in SPECIAL_TOKENS:
            value = config.get(key) if isinstance(config, Mapping) else None
            spelling = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(spelling, str):
                tokens[key] = spelling
    return tokens


def _create_environment() -> Any:
    """Return jinja2's sandbox with the settings and functions that templates rely on."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """``{% generation %}``, which marks the answers for training and renders its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Without the escapes of jinja2's own filter, which is for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [GenerationTag, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda template: datetime.datetime.now().strftime(template)
    return environment

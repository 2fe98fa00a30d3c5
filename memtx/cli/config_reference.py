"""Reference of every YAML key of ``memtx fit``, from jsonargparse: its type, default and docstring."""

from __future__ import annotations

import html
import inspect
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule

from memtx.cli.lightning_cli import MemtxCLI, SaveConfig
from memtx.training.base_module import BaseModule

_SKIPPED_KEYS = ("help", "print_config", "config")
_MODULE_PATH = re.compile(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])")
_CLASS_NAME = re.compile(r"\b[A-Z]\w+")
_LITERAL = re.compile(r"``(.+?)``|:\w+:`~?(.+?)`")
_INTRODUCTION = (
    "<p>A config is one YAML file, and every key is also an option of the command line "
    "(<code>--trainer.max_steps 100</code>, or <code>trainer.max_steps=100</code>). A key whose type is a class takes "
    "a <code>class_path</code> and <code>init_args</code>, whose keys are listed under that class. "
    "<code>memtx fit --print_config</code> prints all keys with their values.</p>"
)


@dataclass(frozen=True)
class Key:
    """One key: its name under its section, and type, default and description as text."""

    name: str
    type_name: str
    default: str
    description: str


@dataclass(frozen=True)
class KeyTable:
    """The keys of a class, or those at the top of a config (``target`` is None)."""

    title: str
    target: type | None
    summary: str
    keys: tuple[Key, ...]


class _ParserReadyError(Exception):
    pass


class _ParserOnly(MemtxCLI):
    """The command line without a run."""

    def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
        """Hand out the parser."""
        raise _ParserReadyError(parser)


def build_parser() -> Any:
    """Return the parser of ``memtx fit`` for configs without class paths of module and data."""
    try:
        _ParserOnly.from_arguments(["fit"], "memtx", save_config_callback=SaveConfig)
    except _ParserReadyError as ready:
        return ready.args[0]._subcommands_action._name_parser_map["fit"]
    raise AssertionError("LightningCLI parsed no arguments")


def build_reference() -> list[KeyTable]:
    """Return the sections of the top of a config and of every class of memtx that a ``class_path`` can name.

    Classes are found in the types of keys, among the modules that are imported.
    """
    top = list(build_parser()._actions)
    sections = [KeyTable("config", None, "Keys of a config for books and a language model.", _read_keys(top))]
    waiting: list[Any] = [BaseModule, LightningDataModule, *map(_get_type, top)]
    classes: set[type] = set()
    while waiting:
        for base in _find_classes(waiting.pop()):
            for target in {base, *_all_subclasses(base)} - classes:
                classes.add(target)
                is_ours = target.__module__.startswith("memtx.") and not target.__name__.startswith("_")
                if not is_ours or inspect.isabstract(target) or not (actions := _class_actions(target)):
                    continue
                waiting += map(_get_type, actions)
                summary = (inspect.getdoc(target) or "").partition("\n\n")[0]
                sections.append(KeyTable(class_path(target), target, summary, _read_keys(actions)))
    return [sections[0], *sorted(sections[1:], key=lambda section: section.title)]


def class_path(target: type) -> str:
    """Return the path that a config names a class by."""
    return f"{target.__module__}.{target.__qualname__}"


def _class_actions(target: type) -> list[Any]:
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_class_arguments(target, fail_untyped=False)
    except ValueError:  # no parameters, or such as no config can write
        return []
    return list(parser._actions)


def _get_type(action: Any) -> Any:
    return getattr(action, "_typehint", None) or action.type


def _find_classes(hint: Any) -> Iterator[type]:
    """Yield the classes in a type, and those that a callable returns."""
    arguments = typing.get_args(hint)
    if inspect.isclass(hint) and not arguments and hint.__module__ != "builtins":
        yield hint
    for argument in arguments:
        yield from _find_classes(argument)


def _all_subclasses(base: type) -> set[type]:
    subclasses: set[type] = set(type.__subclasses__(base))
    return subclasses.union(*map(_all_subclasses, subclasses)) if subclasses else subclasses


def _read_keys(actions: Iterable[Any]) -> tuple[Key, ...]:
    keys = []
    for action in actions:
        last = action.dest.rpartition(".")[2]
        is_group = type(action).__name__ in ("_ActionConfigLoad", "_ActionHelpClassPath", "_HelpAction")
        if last in _SKIPPED_KEYS or is_group or action.dest == "==SUPPRESS==":
            continue
        description = " ".join(str(action.help or "").split()).removesuffix("%s").strip()
        default = "" if action.required else _format_default(action.default)
        keys.append(Key(action.dest, _format_type(_get_type(action)), default, description))
    return tuple(keys)


def _format_type(hint: Any) -> str:
    """Return a type with the names of its classes alone."""
    if hint is None:
        return ""
    text = hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint)
    return _MODULE_PATH.sub("", text).replace("NoneType", "None")


def _format_default(value: Any) -> str:
    if isinstance(value, Namespace):
        value = value.as_dict()
    if inspect.isclass(value):
        return class_path(value)
    return "null" if value is None else "" if value in (inspect.Parameter.empty, "==SUPPRESS==") else str(value)


def render(sections: Sequence[KeyTable]) -> str:
    """Return the reference as HTML, with a heading, a summary and a table for each section."""
    anchors = {section.title.rpartition(".")[2]: section.title for section in sections if section.target}
    parts = ["<h1>YAML keys</h1>", _INTRODUCTION]
    for section in sections:
        title, link = section.title, ""
        if section.target is not None:
            page = f"{section.target.__module__.replace('.', '/')}.html#{section.target.__qualname__}"
            link = f' <a href="{page}">API</a>'
        parts.append(f'<h2 id="{title}">{title}{link}</h2><p>{_to_html(section.summary)}</p>')
        if section.keys:
            parts.append('<table class="keys"><thead><tr><th>key, type, default<th>description</thead><tbody>')
        for key in section.keys:
            default = f"<br>default: <code>{html.escape(key.default)}</code>" if key.default else ""
            cell = f"<code>{key.name}</code><br>{_link_classes(key.type_name, anchors)}{default}"
            parts.append(f"<tr><td>{cell}<td>{_to_html(key.description)}</tr>")
        parts.append("</tbody></table>" if section.keys else "<p>No keys.</p>")
    return "\n".join(parts)


def render_contents(sections: Sequence[KeyTable]) -> str:
    """Return the links to the sections as an HTML list."""
    names = {section.title: section.title.removeprefix("memtx.") for section in sections}
    return "<ul>" + "".join(f'<li><a href="#{title}">{name}</a></li>' for title, name in names.items()) + "</ul>"


def _to_html(text: str) -> str:
    """Return a sentence of a docstring as HTML."""
    return _LITERAL.sub(lambda match: f"<code>{match[1] or match[2]}</code>", html.escape(text, quote=False))


def _link_classes(type_name: str, anchors: Mapping[str, str]) -> str:
    """Return a type as HTML, with links to the sections of its classes."""
    return _CLASS_NAME.sub(
        lambda match: f'<a href="#{anchors[match[0]]}">{match[0]}</a>' if match[0] in anchors else match[0],
        html.escape(type_name, quote=False),
    )

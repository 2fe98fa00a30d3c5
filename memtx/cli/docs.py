"""``memtx docs``: the guide, every public name and every YAML key as pages to read without a network."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import pkgutil
import re
import shutil
import sys
import typing
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from memtx import files
from memtx.cli import options
from memtx.errors import MemtxError, missing_package_error

ROOT = Path(__file__).parents[2]
"""The checkout, which has the guide's pictures and scripts/README.md; an installed package has neither."""

PAGES = {"index.html": "Guide", "scripts.html": "Scripts and figures", "keys.html": "YAML keys", "memtx.html": "API"}

_LINK_TARGETS = {
    "scripts/README.md": "scripts.html",
    ".readme/": "images/",
    "../.readme/": "images/",
    "../README.md": "index.html",
}
_LINK = re.compile(r'(<a\b[^>]*?) href="([^"]+)"')
_PAGE = """{% extends "default/frame.html.jinja2" %}
{% block title %}{{ title }} - memtx{% endblock %}
{% block nav %}{% include "links.html.jinja2" %}<h2>Contents</h2>{{ contents | safe }}{% endblock %}
{% block content %}<main class="pdoc guide"><section class="docstring">{{ body | safe }}</section></main>{% endblock %}
"""
_MODULE = """{% extends "default/module.html.jinja2" %}
{% block nav_title %}{% include "links.html.jinja2" %}{% endblock %}
{% block attribution %}{% endblock %}
"""
_LINKS = """{% set base = "../" * (module.modulename.count(".") if module else 0) %}
<ul>{% for page, name in pages.items() %}<li><a href="{{ base }}{{ page }}">{{ name }}</a></li>{% endfor %}</ul>
"""
_STYLE = """main.guide {max-width: 80rem}
nav.pdoc h2 {font-size: 1.2rem}
.guide table {display: block; overflow-x: auto; margin-bottom: 1rem; font-size: 0.9rem}
.guide td, .guide th {padding: 0.15rem 0.5rem; vertical-align: top}
.guide table.keys {display: table; table-layout: fixed; width: 100%; overflow-wrap: anywhere}
.guide img {max-width: 100%}
"""


def main(argv: list[str]) -> int:
    """Run ``memtx docs``."""
    parser = options.Parser(
        "memtx docs",
        "Write the guide, the API and the YAML keys as HTML pages to a folder. They need no network to be read.",
    )
    parser.add_argument("--out", default="docs", metavar="FOLDER", help="folder of the pages, replaced as a whole")
    return parser.run(argv, _run)


def _run(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.out).expanduser()
    if folder.is_file():
        raise MemtxError(f"'{folder}' is a file, expected a folder.", "Give another one with --out.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "keys.html").is_file():
        raise MemtxError(f"'{folder}' holds other files than pages of memtx docs.", "Give another one with --out.")
    notes = write_docs(folder)
    sys.stderr.writelines(f"memtx: {note}\n" for note in notes)
    sys.stdout.write(f"The pages are in '{folder}'; open {folder / 'index.html'}.\n")


def write_docs(folder: Path, modules: Sequence[str] | None = None) -> list[str]:
    """Write all pages to a folder, which appears when it is complete; return notes and warnings.

    Args:
        folder: Folder to write; an existing one is replaced.
        modules: Names of the modules on the API's pages. None documents all that can be imported.

    Raises:
        MemtxError: pdoc is not installed.
    """
    try:
        pdoc: Any = importlib.import_module("pdoc")
    except ImportError as error:
        raise missing_package_error("memtx docs", error, "docs") from error
    from memtx.cli import config_reference

    names, notes = import_modules()
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        _configure(pdoc)
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always")
            _write_api(pdoc, building, [name for name in names if modules is None or name in modules])
            notes += _write_guide(pdoc, building)
            sections = config_reference.build_reference()
            contents = config_reference.render_contents(sections)
            _write_page(pdoc, building, "keys.html", config_reference.render(sections), contents)
        _drop_dead_links(building)
        if folder.exists():
            shutil.rmtree(folder)
        building.replace(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return notes + [f"warning: {' '.join(str(record.message).split())[:300]}" for record in records]


def import_modules() -> tuple[list[str], list[str]]:
    """Import all modules of memtx; return their names, and a note for each that needs a package not installed."""
    import memtx

    names, notes = ["memtx"], list[str]()
    for module in pkgutil.walk_packages(memtx.__path__, "memtx."):
        if any(part.startswith("_") for part in module.name.split(".")):
            continue
        try:
            # A module may print or warn when it is imported, which says nothing about the pages.
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                importlib.import_module(module.name)
        except ImportError as error:
            notes.append(f"{module.name} is left out: it needs {error.name or error}.")
        else:
            names.append(module.name)
    for name in vars(memtx)["__all__"]:
        vars(memtx)[name] = getattr(memtx, name)  # pdoc looks for names that are imported already
    return names, notes


def _configure(pdoc: Any) -> None:
    jinja2: Any = importlib.import_module("jinja2")
    pdoc.render.configure(docformat="google", show_source=False)
    environment = pdoc.render.env
    environment.globals["pages"] = PAGES
    sources = {"page.html.jinja2": _PAGE, "module.html.jinja2": _MODULE, "links.html.jinja2": _LINKS}
    loader = jinja2.DictLoader({**sources, "custom.css": _STYLE})
    environment.loader = jinja2.ChoiceLoader([loader, environment.loader])


def _write_api(pdoc: Any, folder: Path, names: list[str]) -> None:
    for name in names:
        for target in vars(sys.modules[name]).values():
            if isinstance(target, type) and target.__module__ == name:
                _resolve_annotations(target)
    modules = {name: pdoc.doc.Module.from_name(name) for name in names}
    for name, module in modules.items():
        # pdoc would import those that are left out, and warn.
        module.submodules = [child for path, child in modules.items() if path.rpartition(".")[0] == name]
        files.write_text(folder / f"{name.replace('.', '/')}.html", pdoc.render.html_module(module, modules))
    files.write_text(folder / "search.js", pdoc.render.search_index(modules))


def _resolve_annotations(target: type) -> None:
    """Resolve the types of a dataclass or named tuple where each field is defined; pdoc looks in one module only."""
    constructor: Any = target.__new__ if issubclass(target, tuple) else target.__init__
    if not hasattr(target, "__dataclass_fields__") and not hasattr(target, "_fields"):
        return
    with contextlib.suppress(NameError, TypeError):  # a type for the checker alone
        hints = typing.get_type_hints(target)
        old = constructor.__annotations__
        constructor.__annotations__ = {name: hints.get(name, value) for name, value in old.items()}


def _write_page(pdoc: Any, folder: Path, name: str, body: str, contents: str = "") -> None:
    template = pdoc.render.env.get_template("page.html.jinja2")
    files.write_text(folder / name, template.render(title=PAGES[name], body=body, contents=contents))


def _write_guide(pdoc: Any, folder: Path) -> list[str]:
    """Write the README and scripts/README.md; return notes about missing parts."""
    notes = []
    is_checkout = (ROOT / "scripts" / "README.md").is_file()
    if is_checkout:
        guide, scripts = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "scripts/README.md"))
        shutil.copytree(ROOT / ".readme", folder / "images")
    else:
        guide = _read_package_readme()
        scripts = (
            "# Scripts\n\nThe scripts and their figures are in memtx's repository, not in the installed package.\n"
        )
        guide = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"*\1 (picture in the repository)*", guide)
        notes.append("the guide has no pictures and no figures of scripts: these are not in an installed package.")
    for name, text in (("index.html", guide), ("scripts.html", scripts)):
        for path, target in _LINK_TARGETS.items():
            text = text.replace(f"]({path}", f"]({target}")
        page = pdoc.render_helpers.to_html(text)
        _write_page(pdoc, folder, name, str(page), page.toc_html or "")
    return notes


def _drop_dead_links(folder: Path) -> None:
    """Shorten links to members that are not documented, such as those of torch, and remove those to missing pages."""
    pages = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    for path, text in pages.items():

        def replace(match: re.Match[str], path: Path = path) -> str:
            name, _, anchor = match[2].partition("#")
            if name.startswith(("http://", "https://")):
                return match[0]
            target = Path(os.path.normpath(path.parent / name)) if name else path
            if target not in ids:
                return match[1]
            return f'{match[1]} href="{name}"' if anchor and unquote(anchor) not in ids[target] else match[0]

        if (new := _LINK.sub(replace, text)) != text:
            files.write_text(path, new)


def _read_package_readme() -> str:
    """Return the README that the installed package carries."""
    return str(metadata.metadata("memtx").json.get("description", ""))

"""The pages of ``memtx docs``: complete, without warnings, and readable without a network."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

import memtx
from memtx.cli import config_reference
from memtx.cli.docs import ROOT, write_docs
from tests.commands.program import Program
from tests.commands.test_mistakes import refused

pytest.importorskip("pdoc", reason="pdoc is not installed (memtx[docs])")

MODULES = ("memtx", "memtx.memory", "memtx.memory.base", "memtx.memory.recurrent", "memtx.state", "memtx.data.batch")


class Page(HTMLParser):
    """Ids, links and loaded files of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if "href" in values:
            (self.links if tag == "a" else self.loaded).append(values["href"])
        if "src" in values:
            self.loaded.append(values["src"])


def check_pages(folder: Path) -> None:
    """Assert that pages load nothing from elsewhere and that each link inside has a target."""
    pages = {path: Page(path) for path in folder.rglob("*.html")}
    for path, page in pages.items():
        for address in page.loaded:
            is_inside = address.startswith("data:") or (path.parent / unquote(address)).exists()
            assert is_inside, f"{path.name} loads {address}"
        for link in page.links:
            if link.startswith(("http://", "https://")):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / unquote(name)).resolve() if name else path
            assert target in pages, f"{path.name}: {link}"
            assert not anchor or unquote(anchor) in pages[target].ids, f"{path.name}: {link}"


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs").resolve() / "pages"
    notes = write_docs(folder, MODULES)
    assert [note for note in notes if " is left out: it needs " not in note] == []
    return folder


def test_pages_have_no_warnings_and_all_links_resolve(docs: Path) -> None:
    check_pages(docs)
    assert [path.name for path in docs.parent.iterdir()] == ["pages"]


def test_every_public_name_has_its_docstring(docs: Path) -> None:
    text, page = (docs / "memtx.html").read_text(encoding="utf-8"), Page(docs / "memtx.html")
    for name in memtx.__all__:
        target = getattr(memtx, name)
        if callable(target):
            assert name in page.ids
            first = (target.__doc__ or "").split("\n")[0].split("``")[0].split(":")[0].strip()
            assert html.escape(first, quote=False)[:30] in text, name


def test_the_guide_is_complete(docs: Path) -> None:
    for name, page in (("README.md", "index.html"), ("scripts/README.md", "scripts.html")):
        headings = re.findall(r"^## (.*)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        text = (docs / page).read_text(encoding="utf-8")
        assert headings
        assert [heading for heading in headings if f">{heading}</h2>" not in text] == []
    assert "<table>" in (docs / "index.html").read_text(encoding="utf-8")


def test_every_key_of_the_shipped_configs_is_listed(docs: Path) -> None:
    sections = {section.title: {key.name for key in section.keys} for section in config_reference.build_reference()}
    short = {title.rpartition(".")[2]: keys for title, keys in sections.items()}
    ids = Page(docs / "keys.html").ids
    assert set(sections) <= ids
    assert len(sections) > 90

    def check(node: object) -> None:
        if isinstance(node, list):
            for entry in node:
                check(entry)
        if not isinstance(node, dict):
            return
        class_path = node.get("class_path", "")
        if class_path.startswith("memtx."):
            name = class_path.rpartition(".")[2]
            assert set(node.get("init_args", {})) <= short[name], class_path
        for entry in node.values():
            check(entry)

    for path in (ROOT / "configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        check(config)
        trainer = {f"trainer.{key}" for key in config.get("trainer", {})}
        assert trainer <= sections["config"], path.name


def test_keys_have_type_default_and_description() -> None:
    sections = {section.title: section for section in config_reference.build_reference()}
    keys = {key.name: key for key in sections["config"].keys}
    key = keys["checkpoint.keep_last"]
    assert (key.type_name, key.default) == ("int", "2")
    assert key.description.startswith("Number of newest checkpoints to keep")
    assert keys["data.segment_length"].default == "512"
    window = sections["memtx.memory.recurrent.RecurrentMemory"].keys
    assert next(key for key in window if key.name == "window").type_name == "int"


def test_mistakes_are_one_line(program: Program, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    refused(program("docs", "--out", "a", cwd=tmp_path), "'a' holds other files than pages of memtx docs")
    refused(program("docs", "--out", "a/notes.txt", cwd=tmp_path), "'a/notes.txt' is a file")
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_an_installed_package_says_what_its_guide_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtx.cli.docs.ROOT", tmp_path)
    monkeypatch.setattr("memtx.cli.docs._read_package_readme", lambda: "# memtx\n\n![A picture](.readme/a.png)\n")
    make: Callable[[], list[str]] = lambda: write_docs(tmp_path / "docs", ("memtx.state",))  # noqa: E731
    assert "the guide has no pictures" in " ".join(make())
    assert "picture in the repository" in (tmp_path / "docs" / "index.html").read_text()
    assert make()
    assert not (tmp_path / "docs" / "images").exists()


@pytest.mark.slow
def test_the_whole_program_writes_all_pages(program: Program, tmp_path: Path) -> None:
    result = program("docs", "--out", "docs", cwd=tmp_path)
    assert result.code == 0, result.err
    assert [line for line in result.err.splitlines() if " is left out: it needs " not in line] == []
    check_pages((tmp_path / "docs").resolve())
    assert (tmp_path / "docs" / "memtx" / "serving" / "app.html").is_file()
    assert program("docs", "--out", "docs", cwd=tmp_path).code == 0

"""README.md: its length, links, code, and the files it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.readme_memory import README, memory_source

ROOT = README.parent
PAGES = (README, ROOT / "scripts" / "README.md")


def test_the_readme_and_its_example_are_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160
    assert len(memory_source().splitlines()) <= 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text)
    for path, heading in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE) if heading else []
        slugs = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in headings}
        assert not heading or heading in slugs, heading
    files = re.findall(r"(?:configs|scripts|tests)/[\w./-]*\.(?:yaml|py|sh|md)", text)
    assert files
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_the_scripts_readme_lists_every_script() -> None:
    text = PAGES[1].read_text(encoding="utf-8")
    helpers = {
        "benchmarking",
        "corruption",
        "distillation_runs",
        "http_client",
        "memory_stacks",
        "peers",
        "training_runs",
    }
    helpers |= {"book_reading", "book_stacks", "book_tables"}
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py") if path.stem not in helpers}
    assert {name for name in scripts if name not in text} == set()

"""The page in a browser: it reads, shades and continues a text, by keyboard and on a phone."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests.commands.tiny import BOOK
from tests.serving.conftest import Server

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
PAGE = resources.files("memtx.serving").joinpath("page/index.html").read_text(encoding="utf-8")


def test_the_page_loads_nothing_from_other_sites() -> None:
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"^\s*//.*$|  // .*$", "", PAGE, flags=re.M))
    assert "@import" not in PAGE


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the package 'playwright' is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser: Any, server: Server, size: tuple[int, int]) -> tuple[Any, list[str]]:
    """Return the server's page and the list that gets its messages and errors."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(server.address)
    return page, messages


@pytest.mark.parametrize("size", [(1200, 900), (360, 740)])
def test_a_text_is_read_by_keyboard(browser: Any, server: Server, size: tuple[int, int]) -> None:
    page, messages = open_page(browser, server, size)
    page.locator("#book").fill(BOOK)
    page.locator("#book").focus()
    for _ in range(2):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "read"
    page.keyboard.press("Enter")
    page.get_by_text("Generate a continuation, or read another text.").wait_for(timeout=20_000)
    assert page.locator("#output").inner_text() == BOOK
    assert page.locator("#tokens").inner_text() == f"{len(BOOK.encode()):,} tokens"
    shades = page.evaluate("[...document.querySelectorAll('#output i')].slice(0, 300).map(i => i.style.background)")
    assert len(set(shades)) > 5, "tokens of different surprisal have different shades"
    assert page.evaluate("new Set(stateSizes.map(point => point[1])).size") == 1, "the size of the state is constant"
    assert page.locator("#loss-curve polyline").count() == 1
    page.locator("#max-tokens").fill("15")
    page.locator("#max-tokens").press("Enter")
    page.get_by_text("The model wrote this continuation").wait_for(timeout=20_000)
    assert page.locator(".generated").inner_text()
    # A phone shows the page without horizontal scrolling.
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    if shots := os.environ.get("MEMTX_SCREENSHOTS"):
        page.screenshot(path=str(Path(shots) / f"page-{size[0]}.png"), full_page=True)
    page.close()
    assert not messages


SCRIPTS = """海の夜、鯨を見た。
👩‍👩‍👧‍👦 and 🏳️‍🌈 and é (e\u0301) and नमस्ते
שלום עולם, מה שלומך?
مرحبا بالعالم
Call me Ishmael.
"""


@pytest.fixture(scope="module")
def chat_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("openai", reason="the package 'openai' is not installed")
    from tests.inference.test_chat_template import CHATML
    from tests.serving.test_chat import folder_of

    workdir = tmp_path_factory.mktemp("chat")
    folder_of(workdir / "model", CHATML)
    server = Server(workdir)
    yield server
    server.end()


@pytest.mark.parametrize("size", [(1400, 900), (360, 740)])
def test_a_conversation_is_held_beside_the_text(browser: Any, chat_server: Server, size: tuple[int, int]) -> None:
    page, messages = open_page(browser, chat_server, size)
    assert page.locator("#about-text").is_disabled()
    page.locator("#book").fill(SCRIPTS)
    page.locator("#read").click()
    page.get_by_text("Generate a continuation, or read another text.").wait_for(timeout=20_000)
    assert page.locator("#output").inner_text() == SCRIPTS
    shaded = page.evaluate("[...document.querySelectorAll('#output i')].map(i => i.textContent)")
    for character in ("海", "👩‍👩‍👧‍👦", "🏳️‍🌈", "e\u0301", "ש", "م"):
        assert any(character in part for part in shaded), f"{character} is in one piece"
    assert all("\ufffd" not in part for part in shaded)
    for box in ("#book", "#message"):  # each line has the direction of its script
        assert page.evaluate(f"getComputedStyle(document.querySelector('{box}')).unicodeBidi") == "plaintext"
    page.locator("#max-tokens").fill("24")
    page.locator("#about-text").check()
    for number, question in enumerate(("Who speaks?", "מה שלומך? 海", "And then?"), start=1):
        page.locator("#message").fill(question)
        page.locator("#message").press("Enter")
        page.locator("#send:enabled").wait_for(timeout=20_000)
        assert page.locator("#chat-status").inner_text() == ""
        assert page.locator(".message").count() == 2 * number
        assert page.locator(".message.assistant").last.inner_text()
    assert int(page.locator("#chat-cached").inner_text().removesuffix("%")) > 50
    assert "KiB" in page.locator("#chat-state").inner_text()
    assert page.evaluate("getComputedStyle(document.querySelectorAll('.message.user')[1]).direction") == "rtl"
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    if shots := os.environ.get("MEMTX_SCREENSHOTS"):
        page.screenshot(path=str(Path(shots) / f"chat-{size[0]}.png"), full_page=True)
    page.locator("#new-chat").click()
    assert page.locator(".message").count() == 0
    page.close()
    assert not messages


def test_a_model_without_a_template_says_so_on_the_page(browser: Any, server: Server) -> None:
    page = browser.new_page()
    page.goto(server.address)
    page.locator("#message").fill("Who?")
    page.locator("#send").click()
    page.get_by_text("has no chat template").wait_for(timeout=20_000)
    assert page.locator(".message").count() == 0
    assert page.locator("#message").input_value() == "Who?"
    page.close()

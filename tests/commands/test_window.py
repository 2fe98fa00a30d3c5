"""`--window` and the line that says what a published decoder sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memtx.cli.main import main
from tests.commands.tiny import BOOK, pretrained
from tests.hf import plain
from tests.hf.folders import write
from tests.inference.test_end_tokens import trained_backend


def folder_of(path: Path, layout: dict[str, Any]) -> str:
    config = {**layout, "vocab_size": 320}
    write(path, config, plain.gpt2(config) if "n_embd" in config else plain.llama(config))
    trained_backend().save(str(path / "tokenizer.json"))
    return str(path)


@pytest.mark.parametrize(
    ("layout", "options", "expected"),
    [
        (plain.LLAMA, [], "sees the last 64 tokens exactly (as trained); its state takes"),
        (plain.LLAMA, ["--window", "16"], "sees the last 16 tokens exactly (trained on 64)"),
        (plain.MISTRAL, [], "sees the last 7 tokens exactly (as trained)"),
        (plain.QWEN2, [], "sees the last 64 tokens exactly (as trained), 5 in 1 of 2 layers"),
        (plain.GPT2, ["--window", "9"], "sees the last 9 tokens exactly (trained on 64)"),
    ],
)
def test_a_line_says_what_the_model_sees(
    tmp_path: Path, layout: dict[str, Any], options: list[str], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path / "model", layout)
    (tmp_path / "book.txt").write_text(BOOK[:200], encoding="utf-8")
    assert main(["generate", "--checkpoint", folder, "--prompt", "a", "--max-tokens", "1", *options]) == 0
    assert expected in capfd.readouterr().err
    assert main(["read", str(tmp_path / "book.txt"), "--checkpoint", folder, "--json", *options]) == 0
    captured = capfd.readouterr()
    assert expected in captured.err
    assert json.loads(captured.out)["tokens"] > 100


def test_serve_and_evaluate_have_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path / "model", plain.LLAMA)
    options = ["--checkpoint", folder, "--window", "11"]
    (tmp_path / "hay.txt").write_text(BOOK, encoding="utf-8")
    haystack = ["--haystack", str(tmp_path / "hay.txt"), "--distances", "600", "--num-samples", "1"]
    assert main(["evaluate", *options, "--task", "needle", *haystack]) == 0
    assert "the last 11 tokens exactly" in capfd.readouterr().err
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    apps: list[Any] = []
    monkeypatch.setattr("memtx.serving.app.serve", lambda app, **settings: apps.append(app))
    assert main(["serve", *options, "--session-dir", str(tmp_path / "sessions")]) == 0
    assert "the last 11 tokens exactly" in capfd.readouterr().err
    assert apps[0].state.service.pool.model.blocks[0].attention.memory.window == 11
    apps[0].state.service.pool.close()


def test_other_models_have_the_window_that_they_were_built_with(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = str(pretrained(tmp_path / "model"))
    assert main(["generate", "--checkpoint", model, "--prompt", "a", "--max-tokens", "1"]) == 0
    assert capfd.readouterr().err == ""
    for arguments, message in (
        (["generate", "--prompt", "a"], "window (9) is given, but"),
        (["evaluate", "--task", "recall"], "--window does not apply to recall."),
    ):
        assert main([*arguments, "--checkpoint", model, "--window", "9"]) == 2
        assert message in capfd.readouterr().err

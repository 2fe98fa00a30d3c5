from __future__ import annotations

from pathlib import Path

import pytest

from memtx.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to other machines"),
        (["--host", "example.org"], "--host example.org is open to other machines"),
        (["--api-key", "short"], "at least 16 printable"),
        (["--port", "70000"], "--port: must be at most 65535, got 70000"),
        (["--porrt", "1"], "Did you mean '--port'?"),
        (["--max-seconds", "0", "--checkpoint", "/no/such"], "'/no/such' does not exist"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    monkeypatch.delenv("MEMTX_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["serve", "--checkpoint", str(tmp_path), *arguments])
    except SystemExit as error:
        code = error.code
    output = capsys.readouterr().err
    assert code == 2
    assert expected in output
    assert output.count("\n") == 1

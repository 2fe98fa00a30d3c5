from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from memtx.cli import options
from memtx.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to other machines"),
        (["--host", "example.org"], "--host example.org is open to other machines"),
        (["--api-key", "short"], "at least 16 printable"),
        (["--prefix-cache", "much"], "--prefix-cache: must be a number of bytes such as 2GiB, got much"),
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


def test_sizes_are_numbers_of_bytes() -> None:
    sizes = {"2GiB": 2 << 30, "0": 0, "512MiB": 512 << 20, "1.5 kB": 1500, "3G": 3 * 10**9, "7b": 7}
    assert {text: options.byte_size(text) for text in sizes} == sizes
    for text in ("", "-1", "GiB", "2XB", "nan", "1e9"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a number of bytes"):
            options.byte_size(text)

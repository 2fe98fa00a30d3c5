"""compare_peers.py at a tiny size: a system of ours, a library that is absent, and a restart."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_scripts import SCRIPTS, run

TEXT = "the king and his queen went down to the river and saw that the boat was gone"


def compare(root: Path, output_dir: Path, *options: str) -> tuple[dict[str, Any], str]:
    process = run(
        sys.executable, SCRIPTS / "compare_peers.py", "--root", root, "--output-dir", output_dir, "--seeds", "0",
        "--cpu-seconds", "0.2", "--json", "-", *options, XDG_CACHE_HOME=str(output_dir / "cache"),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout), process.stderr


@pytest.mark.slow
def test_systems_learn_for_equal_seconds_and_missing_libraries_are_named(tmp_path: Path) -> None:
    for split, length in (("train", 40_000), ("validation", 400)):
        (tmp_path / "books" / split).mkdir(parents=True)
        words = TEXT.split()
        text = " ".join(words[(index * index + index // 7) % len(words)] for index in range(length))
        (tmp_path / "books" / split / "1.txt").write_text(text)
    results, errors = compare(
        tmp_path / "books", tmp_path / "out", "--systems", "memtx windows", "recurrent-memory-transformer"
    )
    assert (
        "recurrent-memory-transformer: No module named 'recurrent_memory_transformer_pytorch'; left out."
        in " ".join(errors.split())
    )
    (record,) = results["runs"]
    assert [len(reading["bits_per_byte"]) for reading in record["readings"]] == [1] * 3
    seconds = [reading["seconds"] for reading in record["readings"]]
    assert seconds == sorted(seconds)
    assert seconds[-1] >= 0.2
    # A restart reads what is saved.
    assert compare(tmp_path / "books", tmp_path / "out", "--systems", "memtx windows")[0]["runs"] == results["runs"]

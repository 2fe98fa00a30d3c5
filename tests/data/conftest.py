from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def books() -> Path:
    """The root of a small corpus in the layout of PG-19."""
    data = os.environ.get("MEMTX_DATA")
    if not data or not (Path(data) / "pg19-mini").is_dir():
        pytest.skip("MEMTX_DATA names no folder that holds pg19-mini/")
    return Path(data) / "pg19-mini"

"""Marks of the operations' tests."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Register what is marked here."""
    config.addinivalue_line("markers", "cuda: needs a CUDA device and skips without one")

from __future__ import annotations

from tests.commands.conftest import program  # noqa: F401

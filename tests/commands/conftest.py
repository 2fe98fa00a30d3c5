from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.commands.program import Program


@pytest.fixture(scope="session")
def program() -> Iterator[Program]:
    """Yield the program as a child process."""
    server = Program()
    yield server
    server.close()

"""The memory of README.md's section "Write your own memory", executed from its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def memory_source() -> str:
    """Return the code block of the section."""
    section = README.read_text(encoding="utf-8").split("## Write your own memory\n")[1]
    return section.split("```python\n")[1].split("```")[0]


exec(compile(memory_source(), str(README), "exec", dont_inherit=True))
AverageMemory: Any = globals()["AverageMemory"]

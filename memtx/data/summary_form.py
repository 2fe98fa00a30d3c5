"""How a decoder is asked for what follows a text, in training and in use alike."""

from __future__ import annotations

from dataclasses import dataclass

from memtx.errors import DataError


@dataclass(frozen=True)
class SummaryForm:
    """The words around a text and its summary.

    Attributes:
        prompt: between them.
        end: behind the summary; no summary holds it.

    Raises:
        DataError: one of them is empty.
    """

    prompt: str = "\nSummary: "
    end: str = "\n\n"

    def __post_init__(self) -> None:
        for name in ("prompt", "end"):
            if not getattr(self, name):
                raise DataError(f"{name} is empty.", f"Give --data.{name} a text.")

    def question(self, text: str) -> str:
        """Return what a summary is asked for with."""
        return text + self.prompt

    def answer(self, summary: str) -> str:
        """Return what is to be made.

        Raises:
            DataError: the summary holds the end.
        """
        if self.end in summary:
            raise DataError(f"The summary holds {self.end!r}, which ends one.", "Change --data.end.")
        return summary + self.end

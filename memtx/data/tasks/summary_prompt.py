"""How a decoder is asked for what follows a text, in training and in use alike."""

from __future__ import annotations

from dataclasses import dataclass

from memtx.errors import DataError


@dataclass(frozen=True)
class SummaryPrompt:
    """The words around a text and its summary.

    Attributes:
        prompt: between them.
        stop_sequence: behind the summary; no summary holds it.

    Raises:
        DataError: one of them is empty.
    """

    prompt: str = "\nSummary: "
    stop_sequence: str = "\n\n"

    def __post_init__(self) -> None:
        for name in ("prompt", "stop_sequence"):
            if not getattr(self, name):
                raise DataError(f"{name} is empty.", f"Give --data.{name} a text.")

    def format_prompt(self, text: str) -> str:
        """Return what a summary is asked for with."""
        return text + self.prompt

    def format_completion(self, summary: str) -> str:
        """Return what is to be made.

        Raises:
            DataError: the summary holds the stop sequence.
        """
        if self.stop_sequence in summary:
            raise DataError(
                f"The summary holds {self.stop_sequence!r}, which ends one.", "Change --data.stop_sequence."
            )
        return summary + self.stop_sequence

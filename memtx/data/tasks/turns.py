"""Turns of dialogues: a role and what it says, as in the messages of chat interfaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memtx.data.tasks.record_fields import check_list, get_text, missing_field, preview
from memtx.errors import DataError

TURN_FIELDS = ("turns", "messages")
ANSWERING_ROLE = "assistant"


@dataclass(frozen=True)
class Turn:
    """A turn; as a text it is ``role: content``."""

    role: str
    content: str

    def __str__(self) -> str:
        return f"{self.role}: {self.content}"


def has_turns(record: Mapping[str, Any]) -> bool:
    """Return whether a record is a dialogue."""
    return not record.keys().isdisjoint(TURN_FIELDS)


def parse_turns(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Return the turns of ``{"turns": [{"role", "content"}, ...]}``, or of ``messages``, oldest first.

    Raises DataError if there are none, or one has no role or no content.
    """
    name = next((name for name in TURN_FIELDS if name in record), None)
    if name is None:
        raise missing_field(record, "turns")
    turns = []
    for index, value in enumerate(check_list(record[name], name)):
        if not isinstance(value, dict):
            raise DataError(f"{name}[{index}] is {preview(value)}, expected role and content.", "Correct it.")
        try:
            turns.append(Turn(get_text(value, "role"), get_text(value, "content")))
        except DataError as error:
            raise DataError(f"{name}[{index}]: {error.message}", error.hint) from error
    if not turns:
        raise DataError(f"'{name}' is empty.", "Give at least one turn.")
    return tuple(turns)


def parse_dialogue(record: Mapping[str, Any], labelled: bool) -> tuple[tuple[Turn, ...], str | None]:
    """Return the turns before a response, and the response; None if it is to be generated.

    The response is the field ``response``, or else the last turn if it is the assistant's. Raises DataError if there is
    none and ``labelled``, or no turn is before it.
    """
    turns = parse_turns(record)
    if record.get("response") is not None:
        return turns, get_text(record, "response")
    if turns[-1].role != ANSWERING_ROLE:
        if labelled:
            message = f"There is no 'response', and the last turn is of '{turns[-1].role}'."
            raise DataError(message, f"Give response, or end with a turn of '{ANSWERING_ROLE}'.")
        return turns, None
    if len(turns) < 2:
        raise DataError("The dialogue has no turn before the response.", "Give at least one.")
    return turns[:-1], turns[-1].content


def format_turns(turns: Sequence[Turn]) -> str:
    """Return a dialogue as one text, a line for each turn."""
    return "\n".join(map(str, turns))

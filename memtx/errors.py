"""What memtx raises for a user's mistake: what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MemtxError(ValueError):
    """A mistake in what the user gave; the command line prints it as one line and exits with code 2.

    Args:
        what: the value met and what was expected instead, as one sentence.
        cure: what to do about it, as one sentence.
    """

    def __init__(self, what: str, cure: str = "") -> None:
        self.what = what
        self.cure = cure
        super().__init__(f"{what} {cure}".strip())


class DataError(MemtxError):
    """Text, a tokenizer or a token shard cannot be used as it is."""


class CheckpointError(MemtxError):
    """A checkpoint, pretrained folder or saved state is damaged or belongs to something else."""


def not_whole(path: object, why: str) -> CheckpointError:
    """Return the error of a checkpoint that is cut, changed, or of something else; ``why`` goes on the sentence."""
    return CheckpointError(f"'{path}' is not a whole checkpoint{why}.", "Use another copy, or an earlier one.")


def missing_package(what: str, error: ImportError, extra: str) -> MemtxError:
    """Return the error of a part that needs a package of one of memtx's extras."""
    return MemtxError(f"{what} needs {error.name}.", f"Install it: pip install 'memtx[{extra}]'.")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def at_least(least: int, /, **numbers: float) -> None:
    """Raise MemtxError for the first of the named numbers that is smaller than ``least``."""
    for name, number in numbers.items():
        if number < least:
            raise MemtxError(f"{name} is {number}.", f"Give at least {least}.")


def positive(**numbers: float) -> None:
    """Raise MemtxError for the first of the named numbers that is not above 0."""
    for name, number in numbers.items():
        if not number > 0:
            raise MemtxError(f"{name} is {number}.", "Give a number above 0.")

"""What memtx raises for a user's mistake: what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MemtxError(ValueError):
    """A mistake in what the user gave; the command line prints it as one line and exits with code 2.

    Args:
        message: the value met and what was expected instead, as one sentence.
        hint: what to do about it, as one sentence.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = message
        self.hint = hint
        super().__init__(f"{message} {hint}".strip())


class DataError(MemtxError):
    """Text, a tokenizer or a token shard cannot be used as it is."""


class CheckpointError(MemtxError):
    """A checkpoint, pretrained folder or saved state is damaged or belongs to something else."""


def corrupt_checkpoint_error(path: object, reason: str) -> CheckpointError:
    """Return the error of a checkpoint that is cut, changed, or of something else; ``reason`` goes on the sentence."""
    return CheckpointError(f"'{path}' is not a whole checkpoint{reason}.", "Use another copy, or an earlier one.")


def missing_package_error(feature: str, error: ImportError, extra: str) -> MemtxError:
    """Return the error of a part that needs a package of one of memtx's extras."""
    return MemtxError(f"{feature} needs {error.name}.", f"Install it: pip install 'memtx[{extra}]'.")


def closest_match(name: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_at_least(minimum: int, /, **values: float) -> None:
    """Raise MemtxError for the first of the named numbers that is smaller than ``minimum``."""
    for name, number in values.items():
        if number < minimum:
            raise MemtxError(f"{name} is {number}.", f"Give at least {minimum}.")


def check_positive(**values: float) -> None:
    """Raise MemtxError for the first of the named numbers that is not above 0."""
    for name, number in values.items():
        if not number > 0:
            raise MemtxError(f"{name} is {number}.", "Give a number above 0.")


def check_divisible(hint: str = "Choose a divisor.", /, **values: int) -> None:
    """Raise MemtxError unless the first of the two named numbers is a multiple of the second."""
    (name, number), (divisor_name, divisor) = values.items()
    if divisor < 1 or number % divisor:
        raise MemtxError(f"{name} ({number}) must be divisible by {divisor_name} ({divisor}).", hint)

"""Exceptions for user mistakes, each with a remedy, and checks that raise them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MemtxError(ValueError):
    """A mistake in the user's input; the command line prints it on one line and exits with code 2.

    Args:
        message: One sentence: the value found and what was expected instead.
        hint: One sentence: what to do.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = message
        self.hint = hint
        super().__init__(f"{message} {hint}".strip())


class DataError(MemtxError):
    """An unusable text, tokenizer or token shard."""


class CheckpointError(MemtxError):
    """A checkpoint, pretrained folder or saved state that is damaged or does not fit."""


def corrupt_checkpoint_error(path: object, reason: str) -> CheckpointError:
    """Return the error for a truncated, modified or foreign checkpoint; ``reason`` ends its sentence."""
    return CheckpointError(f"'{path}' is not a valid checkpoint{reason}.", "Use another copy, or an earlier one.")


def missing_package_error(feature: str, error: ImportError, extra: str) -> MemtxError:
    """Return the error for a feature that needs a package from one of memtx's extras."""
    return MemtxError(f"{feature} needs {error.name}.", f"Install it: pip install 'memtx[{extra}]'.")


def pip_name(module: str) -> str:
    """Return the name to install a module by: an extra of memtx, or the package, which may differ from the module."""
    extras = {"datasets": "data", "pyarrow": "data", "faiss": "retrieval", "peft": "retrofit", "ray": "ray"}
    extras |= dict.fromkeys(("onnx", "onnx_ir", "onnxruntime", "onnxscript"), "onnx")
    packages = {"sklearn": "scikit-learn", "yaml": "pyyaml", "PIL": "pillow", "cv2": "opencv-python"}
    return f"'memtx[{extras[module]}]'" if module in extras else packages.get(module, module)


def closest_match(name: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the candidate closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def check_at_least(minimum: int, /, **values: float) -> None:
    """Raise MemtxError for the first named value below ``minimum``."""
    for name, value in values.items():
        if value < minimum:
            raise MemtxError(f"{name} is {value}.", f"Give at least {minimum}.")


def check_positive(**values: float) -> None:
    """Raise MemtxError for the first named value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise MemtxError(f"{name} is {value}.", "Give a number above 0.")


def check_probability(**values: float) -> None:
    """Raise MemtxError for the first named value that is not in [0, 1)."""
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            raise MemtxError(f"{name} is {value}.", "Give a number of at least 0 and below 1.")


def check_divisible(hint: str = "Choose a divisor.", /, **values: int) -> None:
    """Raise MemtxError unless the first of the two named numbers is a multiple of the second."""
    (name, number), (divisor_name, divisor) = values.items()
    if divisor < 1 or number % divisor:
        raise MemtxError(f"{name} ({number}) must be divisible by {divisor_name} ({divisor}).", hint)

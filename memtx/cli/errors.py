"""One-line errors of all commands on stderr, with a suggestion for a mistyped option or key."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback as tracebacks
from collections.abc import Callable, Iterable

from memtx import files
from memtx.errors import MemtxError, closest_match

EXIT_USAGE_ERROR, EXIT_INTERRUPTED = 2, 130
EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE, the code that shells report when a pipe such as ``| head`` closes early."""

MAX_MESSAGE_LENGTH = 400

_PATH_ERRORS: dict[type[OSError], str] = {
    FileNotFoundError: "does not exist",
    PermissionError: "cannot be opened (permission denied)",
    IsADirectoryError: "is a folder, expected a file",
    NotADirectoryError: "has a parent that is a file, expected a folder",
}


def print_error(message: str) -> None:
    """Write ``memtx: error: MESSAGE`` on stderr as a single line."""
    sys.stderr.write(f"memtx: error: {' '.join(message.split())}\n")


def _format_os_error(error: OSError) -> str | None:
    """Return the line for a full disk or a path given by the user; None for any other error."""
    if files.is_disk_full(error):
        target = f" '{error.filename}' could not be written." if error.filename else ""
        return f"The disk is full.{target} {files.DISK_FULL_HINT}"
    reason = _PATH_ERRORS.get(type(error))
    return f"'{error.filename}' {reason}. Check the path." if reason and error.filename is not None else None


def run(body: Callable[[], int | None], *, traceback: bool = False) -> int:
    """Call the body of a command, print a user error as one line on stderr, and return the exit code.

    The exit code is the body's (None is 0), 2 for a user error, 130 for Ctrl-C or 141 for a closed pipe. If
    ``traceback`` is True, also print the traceback of a user error.
    """
    try:
        code = body() or 0
        # A closed pipe may show only when the buffer is written, so flush while the error can still be handled.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        sys.stderr.write(f"\nmemtx: interrupted{f': {error}' if str(error) else ''}\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout again at exit, which must not fail.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (MemtxError, OSError) as error:
        message = str(error) if isinstance(error, MemtxError) else _format_os_error(error)
        if message is None:
            raise
        if traceback:
            tracebacks.print_exc()
        print_error(message)
        return EXIT_USAGE_ERROR


# The unknown name in messages of argparse and jsonargparse.
_UNKNOWN_KEY_PATTERNS = (
    re.compile(r"[Uu]nrecognized arguments:\s+(--[^\s=]+)"),
    re.compile(r"[Oo]ption '([^']+)' is not accepted"),
    re.compile(r"[Kk]ey '([^']+)' is not expected"),
    re.compile(r"[Nn]ot a valid (?:key|subclass|choice)[^'\"]*['\"]([^'\"]+)['\"]"),
    re.compile(r"No action for key [\"']([^\"']+)[\"']"),
)
# Lines that list what the parser tried but give no reason.
_NOISE_PATTERN = re.compile(
    r"^(Does not validate against any of the Union|Subtypes:|Errors:|Given value type:|Given value:|usage:|tip:)"
)


def _find_unknown_key(message: str) -> str:
    matches = (pattern.search(message) for pattern in _UNKNOWN_KEY_PATTERNS)
    return next((match[1].split("=")[0] for match in matches if match), "")


def _suggest_option(name: str, known_keys: Iterable[str]) -> str:
    """Return the hint for the closest key: by the full dotted name first, then by the last part."""
    dashes = "--" if name.startswith("--") else ""
    # A parser may know its options by their keys in a config.
    keys = [key if not dashes or key.startswith("-") else dashes + key for key in known_keys]
    if hint := closest_match(name, keys):
        return hint
    by_last_part = {key.lstrip("-").rpartition(".")[2]: key for key in keys}
    match = re.search(r"'([^']+)'", closest_match(name.lstrip("-").rpartition(".")[2], by_last_part))
    return f" Did you mean '{by_last_part[match[1]]}'?" if match else ""


def shorten_message(message: str, known_keys: Iterable[str]) -> str:
    """Shorten a message of argparse or jsonargparse to one line and suggest the closest key for a typo.

    The result, at most about 400 characters, joins the first line, which names the part, and the line about the unknown
    key, else the last line that gives a reason.
    """
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    lines = [line for line in lines if line and not _NOISE_PATTERN.match(line)]
    if not lines:
        return "the arguments could not be parsed"
    name = _find_unknown_key(message)
    reason = next((line for line in reversed(lines) if name and name in line and _find_unknown_key(line)), lines[-1])
    text = reason if lines[0] in reason else f"{lines[0].rstrip(':')}: {reason}"
    if len(text) > MAX_MESSAGE_LENGTH:
        text = text[: MAX_MESSAGE_LENGTH // 2] + " ... " + text[-MAX_MESSAGE_LENGTH // 2 :]
    hint = _suggest_option(name, known_keys) if name and "Did you mean" not in text else ""
    return text.rstrip() + ("." if hint and not text.rstrip().endswith(".") else "") + hint

"""What every command shares: mistakes become one line and exit code 2, and the nearest valid name is offered."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import traceback as tracebacks
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from memtx import files
from memtx.errors import MemtxError, closest_match

EXIT_USAGE_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE, what a shell reports where `| head` has seen enough."""

MAX_MESSAGE_LENGTH = 400


def _format_path_error(error: OSError) -> str:
    reason = {
        FileNotFoundError: "does not exist",
        PermissionError: "may not be opened (permission denied)",
        IsADirectoryError: "is a folder, expected a file",
        NotADirectoryError: "leads through a file, expected a folder there",
    }.get(type(error), error.strerror or "could not be used")
    return f"'{error.filename}' {reason}. Check the path."


def print_error(message: str) -> None:
    """Write one ``memtx: error: ...`` line on stderr, line breaks in the message made spaces."""
    sys.stderr.write(f"memtx: error: {' '.join(message.split())}\n")


def run(function: Callable[[], int | None], *, traceback: bool = False) -> int:
    """Call a command's body and turn a user's mistake into one line on stderr.

    Args:
        function: the body; returns its exit code, or None for 0.
        traceback: show where a mistake was raised as well.

    Returns:
        The exit code: the body's, 2 for a mistake, 130 for Ctrl-C, 141 for a closed output.
    """
    try:
        code = function() or 0
        # A closed pipe may show only when the buffer is written out: here it can still be answered.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        said = str(error)
        sys.stderr.write(f"\nmemtx: interrupted{': ' + said if said else ''}\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; that must not fail as well.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except MemtxError as error:
        if traceback:
            tracebacks.print_exc()
        print_error(str(error))
        return EXIT_USAGE_ERROR
    except OSError as error:
        kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
        if not files.is_disk_full(error) and (not isinstance(error, kinds) or error.filename is None):
            raise  # Not of a path that someone gave.
        if traceback:
            tracebacks.print_exc()
        where = f" '{error.filename}' could not be written." if error.filename else ""
        print_error(
            f"The disk is full.{where} {files.DISK_FULL_HINT}"
            if files.is_disk_full(error)
            else _format_path_error(error)
        )
        return EXIT_USAGE_ERROR


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest option where a name is mistyped."""

    def __init__(self, prog: str, description: str) -> None:
        # An abbreviation that works today is an ambiguity after the next option.
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self._argv: list[str] = []
        self.add_argument("--traceback", action="store_true", help="show where in the program a mistake was noticed")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Return the arguments, or exit with code 2 after one line on stderr."""
        self._argv = argv
        return self.parse_args(argv)

    def parse_known(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return the arguments and those that are another parser's, or exit as :meth:`parse` does."""
        self._argv = []
        return self.parse_known_args(argv)

    def error(self, message: str) -> NoReturn:
        """Write one line on stderr and exit with code 2."""
        options = [name for action in self._actions for name in action.option_strings]
        # argparse misses a required option before it looks at the mistyped one that was meant.
        given = [one.partition("=")[0] for one in self._argv]
        unknown = [one for one in given if one.startswith("--") and one != "--" and one not in options]
        if unknown and "are required" in message:
            message = f"unrecognized arguments: {unknown[0]}"
        sys.stderr.write(f"{self.prog}: error: {shorten_message(message, options)}\n")
        raise SystemExit(EXIT_USAGE_ERROR)


# The unknown name in argparse's and jsonargparse's messages.
_UNKNOWN_KEY_PATTERNS = (
    re.compile(r"[Uu]nrecognized arguments:\s+(--[^\s=]+)"),
    re.compile(r"[Oo]ption '([^']+)' is not accepted"),
    re.compile(r"[Kk]ey '([^']+)' is not expected"),
    re.compile(r"[Nn]ot a valid (?:key|subclass|choice)[^'\"]*['\"]([^'\"]+)['\"]"),
    re.compile(r"No action for key [\"']([^\"']+)[\"']"),
)
# Lines that only repeat what was tried; the reason stands elsewhere.
_NOISE_PATTERN = re.compile(
    r"^(Does not validate against any of the Union|Subtypes:|Errors:|Given value type:|Given value:|usage:|tip:)"
)


def _find_unknown_key(message: str) -> str:
    for pattern in _UNKNOWN_KEY_PATTERNS:
        if found := pattern.search(message):
            return found[1].split("=")[0]
    return ""


def _suggest_option(name: str, known_keys: Iterable[str]) -> str:
    """Return the hint for the nearest key: the whole dotted name first, then its last part."""
    dashes = "--" if name.startswith("--") else ""
    # A parser may know its options by their keys, as they stand in a config.
    keys = [key if not dashes or key.startswith("-") else dashes + key for key in known_keys]
    if hint := closest_match(name, keys):
        return hint
    last = name.lstrip("-").rpartition(".")[2]
    by_last = {key.lstrip("-").rpartition(".")[2]: key for key in keys}
    close = closest_match(last, by_last)
    if found := re.search(r"'([^']+)'", close):
        return f" Did you mean '{by_last[found[1]]}'?"
    return ""


def shorten_message(message: str, known_keys: Iterable[str]) -> str:
    """Make one line of a parser's message and offer the nearest key to a mistyped one.

    Args:
        message: what argparse or jsonargparse wrote, of any number of lines.
        known_keys: the keys or options that are valid here.

    Returns:
        One line of at most about 400 characters: where (the first line, if it names the part) and why (the
        line that names an unknown key, else the last line that says something).
    """
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    lines = [line for line in lines if line and not _NOISE_PATTERN.match(line)]
    if not lines:
        return "the arguments could not be understood"
    name = _find_unknown_key(message)
    reasons = [line for line in lines if name and name in line and _find_unknown_key(line)]
    reason = reasons[-1] if reasons else lines[-1]
    text = reason if reason == lines[0] or lines[0] in reason else f"{lines[0].rstrip(':')}: {reason}"
    if len(text) > MAX_MESSAGE_LENGTH:
        text = text[: MAX_MESSAGE_LENGTH // 2] + " ... " + text[-MAX_MESSAGE_LENGTH // 2 :]
    hint = _suggest_option(name, known_keys) if name and "Did you mean" not in text else ""
    return f"{text.rstrip()}{'.' if hint and not text.rstrip().endswith('.') else ''}{hint}"


def check_output_path(option: str, path: str) -> None:
    """Raise unless the file that an option names can be written, as far as can be seen before any work."""
    if not Path(path).absolute().parent.is_dir():
        raise MemtxError(f"--{option} {path}: the folder does not exist.", "Make it first.")
    if Path(path).is_dir():
        raise MemtxError(f"--{option} {path} is a folder, expected a file.")


@contextlib.contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield what advances a bar on stderr by an amount; nothing is drawn where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(description), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda amount: bar.advance(task, amount)

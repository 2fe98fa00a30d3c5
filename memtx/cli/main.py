"""Program ``memtx`` (or ``lightning``): find the command, then import it, because torch takes seconds to load."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import MutableMapping

COMMANDS = {
    "prepare": "tokenize texts from any source into a folder to train on",
    "plan": "estimate memory, speed and duration of a training run",
    "fit": "train a model, from scratch or from a checkpoint",
    "validate": "evaluate a checkpoint on the validation texts",
    "test": "evaluate a checkpoint on the test texts",
    "predict": "print labels, tags or answers for raw texts as JSON lines",
    "read": "read a text of any length and report its surprisal",
    "evaluate": "measure a memory's accuracy by distance, and its capacity",
    "distil": "compare a student with its teacher in size, speed and quality",
    "serve": "serve a model over HTTP: completions, sessions and a web page",
    "convert": "convert a checkpoint, sharded or not, to a model folder",
    "generate": "continue a prompt, or a text that was read",
    "docs": "write the guide, the API and the YAML keys as HTML pages",
}
"""Command -> one-line help. Its module in memtx.cli has ``main``, which takes arguments and returns the exit code."""


OPENMP_WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def shorten_openmp_spin(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's idle threads sleep after 0.3 ms instead of 3 ms, unless the environment says how they wait.

    Beside other busy processes, threads that spin for each other take the cores that they wait for. libgomp reads the
    variable when torch is loaded.
    """
    if not any(name in environment for name in OPENMP_WAIT_VARIABLES):
        environment["GOMP_SPINCOUNT"] = "30000"


def program_name(argv0: str) -> str:
    """Return the name that the program was called by, from ``sys.argv[0]``."""
    name = argv0.replace("\\", "/").rpartition("/")[2]
    return "memtx" if name in {"", "__main__.py", "-c"} else name.removesuffix(".exe")


def _format_help(program: str) -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        f"usage: {program} COMMAND [arguments]\n\n"
        "Train memory-augmented recurrent transformers, and read texts of any length with them.\n\n"
        f"commands:\n{commands}\n\n"
        f"`{program} COMMAND --help` explains a command; `{program} --version` prints the version.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0 for success, 2 for a user error, 130 for Ctrl-C.

    ``argv`` holds the arguments after the program's name and defaults to those of this process.
    """
    program = program_name(sys.argv[0])
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        sys.stderr.write(_format_help(program))
        return 2
    name = arguments[0]
    if name in {"-h", "--help", "help"}:
        sys.stdout.write(_format_help(program))
        return 0
    if name in {"-V", "--version"}:
        from memtx import __version__

        sys.stdout.write(f"memtx {__version__}\n")
        return 0
    if name not in COMMANDS:
        from memtx.errors import closest_match

        hint = closest_match(name, COMMANDS) or f" `{program} --help` lists the commands."
        sys.stderr.write(f"{program}: error: '{name}' is not a command.{hint}\n")
        return 2
    is_lightning = name in {"fit", "validate", "test"}  # LightningCLI also parses the subcommand
    shorten_openmp_spin(os.environ)
    try:
        from memtx.ops.cpu.malloc import retain_freed_memory

        retain_freed_memory()
        command = importlib.import_module("memtx.cli.fit" if is_lightning else f"memtx.cli.{name}")
        return int(command.main(arguments if is_lightning else arguments[1:]))
    except KeyboardInterrupt:
        # Ctrl-C during the imports; a running command handles its own.
        sys.stderr.write(f"\n{program}: interrupted\n")
        return 130

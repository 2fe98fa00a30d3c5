"""The program ``memtx`` (also installed as ``lightning``): find the command, then import it.

Only ``sys`` is imported at the top: torch takes seconds to load, which ``--help`` and a mistyped command should not.
"""

from __future__ import annotations

import sys

COMMANDS: dict[str, tuple[str, str]] = {
    "prepare": ("memtx.cli.prepare:main", "tokenize texts from any source into a folder to train on"),
    "plan": ("memtx.cli.plan:main", "estimate memory, speed and duration of a training run"),
    "fit": ("memtx.cli.fit:main", "train a model, from scratch or from a checkpoint"),
    "validate": ("memtx.cli.fit:main", "evaluate a checkpoint on the validation texts"),
    "test": ("memtx.cli.fit:main", "evaluate a checkpoint on the test texts"),
    "predict": ("memtx.cli.predict:main", "print labels, tags or answers for raw texts as JSON lines"),
    "read": ("memtx.cli.read:main", "read a text of any length and report its surprisal"),
    "evaluate": ("memtx.cli.evaluate:main", "measure a memory's accuracy by distance, and its capacity"),
    "distil": ("memtx.cli.distil:main", "compare a student with its teacher in size, speed and quality"),
    "serve": ("memtx.cli.serve:main", "serve a model over HTTP: completions, sessions and a web page"),
    "convert": ("memtx.cli.convert:main", "convert a checkpoint, sharded or not, to a model folder"),
    "generate": ("memtx.cli.generate:main", "continue a prompt, or a text that was read"),
}
"""Command -> (module:function, one-line help). The function takes the arguments and returns the exit code."""

LIGHTNING_ENTRY_POINT = "memtx.cli.fit:main"
"""Function that takes the subcommand as well, because LightningCLI parses it."""


def program_name(argv0: str) -> str:
    """Return the name that the program was called by, from ``sys.argv[0]``."""
    name = argv0.replace("\\", "/").rpartition("/")[2]
    return "memtx" if name in {"", "__main__.py", "-c"} else name.removesuffix(".exe")


def _format_help(program: str) -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: {program} COMMAND [arguments]\n\n"
        "Train memory-augmented recurrent transformers, and read texts of any length with them.\n\n"
        f"commands:\n{commands}\n\n"
        f"`{program} COMMAND --help` explains a command; `{program} --version` prints the version.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name. Defaults to those of this process.

    Returns:
        The exit code: 0 for success, 2 for a user error, 130 for Ctrl-C.
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
    target = COMMANDS[name][0]
    module, _, function = target.partition(":")
    try:
        from importlib import import_module

        from memtx.ops.cpu.malloc import retain_freed_memory

        retain_freed_memory()
        command = getattr(import_module(module), function)
        code: int = command(arguments if target == LIGHTNING_ENTRY_POINT else arguments[1:])
    except KeyboardInterrupt:
        # During the imports; a running command handles its own.
        sys.stderr.write(f"\n{program}: interrupted\n")
        return 130
    return code

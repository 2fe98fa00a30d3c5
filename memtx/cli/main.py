"""The program ``memtx`` (also installed as ``lightning``): finds the command, then imports it.

Only ``sys`` is imported up here: torch takes seconds to load, and ``--help`` or a mistyped command should not
wait for it.
"""

from __future__ import annotations

import sys

COMMANDS: dict[str, tuple[str, str]] = {
    "prepare": ("memtx.cli.prepare:main", "encode texts from anywhere into a folder to train on"),
    "plan": ("memtx.cli.plan:main", "say what a config's training takes, before any of it"),
    "fit": ("memtx.cli.fit:main", "train a model, from the start or from a checkpoint"),
    "validate": ("memtx.cli.fit:main", "measure a checkpoint on the validation texts"),
    "test": ("memtx.cli.fit:main", "measure a checkpoint on the test texts"),
    "predict": ("memtx.cli.predict:main", "say labels, tags or answers of raw texts, as lines of JSON"),
    "read": ("memtx.cli.read:main", "read a book of any length and report how surprising it was"),
    "evaluate": ("memtx.cli.evaluate:main", "measure what a memory keeps: accuracy by distance, capacity"),
    "distil": ("memtx.cli.distil:main", "put a student beside its teacher: size, speed and quality"),
    "serve": ("memtx.cli.serve:main", "serve a model over HTTP: completions, sessions and a page"),
    "convert": ("memtx.cli.convert:main", "make a pretrained folder of a checkpoint, also of one of many processes"),
    "generate": ("memtx.cli.generate:main", "continue a prompt, or a book that was read"),
}
"""Command -> (module:function, one-line help). A function takes argv and returns the exit code."""

LIGHTNING_ENTRY_POINT = "memtx.cli.fit:main"
"""LightningCLI parses the subcommand itself, so its function gets it too."""


def program_name(argv0: str) -> str:
    """Return what the program was called as, from ``sys.argv[0]``."""
    name = argv0.replace("\\", "/").rpartition("/")[2]
    return "memtx" if name in {"", "__main__.py", "-c"} else name.removesuffix(".exe")


def _format_help(program: str) -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {program} COMMAND [arguments]",
            "",
            "Train memory-augmented recurrent transformers, and read texts of any length with them.",
            "",
            "commands:",
            *lines,
            "",
            f"`{program} COMMAND --help` explains one; `{program} --version` says which release this is.",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None for those of this process.

    Returns:
        The exit code: 0 done, 2 a mistake in what was given, 130 interrupted.
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
        # While torch was being imported: a command handles its own.
        sys.stderr.write(f"\n{program}: interrupted\n")
        return 130
    return code

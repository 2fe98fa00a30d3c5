"""``memtx convert``: convert a checkpoint, sharded or not, to a model folder that all commands load."""

from __future__ import annotations

import argparse
import sys

from memtx.cli import options

MAX_NAMES_SHOWN = 3


def _convert(arguments: argparse.Namespace) -> None:
    with options.user_modules(arguments.modules):
        from memtx.checkpoint.convert import convert

        summary = convert(arguments.source, arguments.target, layout=arguments.layout, overwrite=arguments.overwrite)
    extras = ", ".join(summary.extra_files) or "no tokenizer"
    message = f"'{arguments.target}': {summary.model_class} with {summary.num_parameters:,} parameters, and {extras}; "
    message += f"from {summary.source}."
    if dropped := summary.dropped_weights:
        names = ", ".join(dropped[:MAX_NAMES_SHOWN]) + (", ..." if len(dropped) > MAX_NAMES_SHOWN else "")
        message += f" Dropped {len(dropped)} weights that the layout cannot hold ({names})."
    sys.stdout.write(f"{message}\n")
    options.print_next_command("Serve it with", "serve", "--checkpoint", arguments.target)


def main(argv: list[str]) -> int:
    """Run ``memtx convert``."""
    parser = options.Parser(
        "memtx convert",
        "Write a checkpoint, run or model as a model folder: config.json, model.safetensors and the tokenizer. "
        "The shards of a distributed checkpoint are merged.",
    )
    add = parser.add_argument
    add("source", help="a .ckpt file or folder, a run folder (its best checkpoint) or a model folder")
    add("target", help="folder to create")
    add("--layout", metavar="FOLDER", help="write the layout of this Hugging Face folder, which training started from")
    add("--overwrite", action="store_true", help="replace the target if it exists")
    parser.add_import_option()
    return parser.run(argv, _convert)

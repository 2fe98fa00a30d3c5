"""``memtx convert``: a checkpoint, also one of many processes, as a folder that every command and library loads."""

from __future__ import annotations

import argparse
import sys

from memtx.cli.common import Parser, run
from memtx.cli.read import add_import, hinting_import, import_modules

SHOWN = 3
"""Names of weights in a message."""


def _parser() -> Parser:
    parser = Parser(
        "memtx convert",
        "Write what a checkpoint, a run or a folder holds as a pretrained folder: config.json, model.safetensors and "
        "the tokenizer. The shares of a checkpoint of many processes are put together.",
    )
    parser.add_argument(
        "source", help="a .ckpt file or folder, a run's folder (its best is taken), or a model's folder"
    )
    parser.add_argument("target", help="the folder to be made")
    parser.add_argument(
        "--layout",
        metavar="FOLDER",
        help="write it as this published folder is (transformers), whose model the training began with",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at the target")
    add_import(parser)
    return parser


def _convert(arguments: argparse.Namespace) -> int:
    import_modules(arguments.modules)
    from memtx.inference.conversion import convert

    with hinting_import():
        made = convert(arguments.source, arguments.target, layout=arguments.layout, overwrite=arguments.overwrite)
    beside = ", ".join(made.texts) or "no tokenizer"
    said = f"'{arguments.target}': a {made.model} of {made.parameters:,} parameters, and {beside}; from {made.source}."
    if made.left_out:
        names = ", ".join(made.left_out[:SHOWN]) + (", ..." if len(made.left_out) > SHOWN else "")
        said += f" Left out, since the layout has no place for them: {len(made.left_out)} weights ({names})."
    sys.stdout.write(f"{said}\n")
    return 0


def main(argv: list[str]) -> int:
    """Run ``memtx convert`` with its arguments and return the exit code."""
    arguments = _parser().parse(argv)
    return run(lambda: _convert(arguments), traceback=arguments.traceback)

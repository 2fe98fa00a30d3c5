"""``memtx convert``: a checkpoint, also one of many processes, as a folder that every command and library loads."""

from __future__ import annotations

import argparse
import sys

from memtx.cli.options import Parser, run
from memtx.cli.read import add_import_option, import_modules, suggest_import_option

MAX_NAMES_SHOWN = 3
"""Names of weights in a message."""


def _build_parser() -> Parser:
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
    add_import_option(parser)
    return parser


def _convert(arguments: argparse.Namespace) -> int:
    import_modules(arguments.modules)
    from memtx.checkpoint.convert import convert

    with suggest_import_option():
        made = convert(arguments.source, arguments.target, layout=arguments.layout, overwrite=arguments.overwrite)
    beside = ", ".join(made.extra_files) or "no tokenizer"
    said = (
        f"'{arguments.target}': a {made.model_class} of {made.num_parameters:,} parameters, and {beside}; "
        f"from {made.source}."
    )
    if made.dropped_weights:
        names = ", ".join(made.dropped_weights[:MAX_NAMES_SHOWN]) + (
            ", ..." if len(made.dropped_weights) > MAX_NAMES_SHOWN else ""
        )
        said += f" Left out, since the layout has no place for them: {len(made.dropped_weights)} weights ({names})."
    sys.stdout.write(f"{said}\n")
    return 0


def main(argv: list[str]) -> int:
    """Run ``memtx convert`` with its arguments and return the exit code."""
    arguments = _build_parser().parse(argv)
    return run(lambda: _convert(arguments), traceback=arguments.traceback)

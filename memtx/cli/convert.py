"""``memtx convert``: convert a checkpoint, sharded or not, to a model folder that all commands load."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from memtx.cli import options
from memtx.errors import MemtxError

if TYPE_CHECKING:
    from memtx.checkpoint.pretrained import PretrainedModel

MAX_NAMES_SHOWN = 3


def _convert(arguments: argparse.Namespace) -> None:
    if arguments.to == "hf":
        _convert_to_hf(arguments)
        return
    with options.user_modules(arguments.modules):
        from memtx.checkpoint.convert import convert

        change = None if arguments.to is None else _make_change(arguments)
        summary = convert(
            arguments.source, arguments.target, layout=arguments.layout, change=change, overwrite=arguments.overwrite
        )
    extras = ", ".join(summary.extra_files) or "no tokenizer"
    message = f"'{arguments.target}': {summary.model_class} with {summary.num_parameters:,} parameters, and {extras}; "
    message += f"from {summary.source}."
    if dropped := summary.dropped_weights:
        names = ", ".join(dropped[:MAX_NAMES_SHOWN]) + (", ..." if len(dropped) > MAX_NAMES_SHOWN else "")
        message += f" Dropped {len(dropped)} weights that the layout cannot hold ({names})."
    sys.stdout.write(f"{message}\n")
    _upload(arguments)
    if arguments.to is not None:
        options.print_next_command(
            "Train it on with", "fit", "--config", "configs/longformer-mlm.yaml", "--model.pretrained", arguments.target
        )
    else:
        options.print_next_command("Serve it with", "serve", "--checkpoint", arguments.target)


def _convert_to_hf(arguments: argparse.Namespace) -> None:
    """Write a language model for transformers and, if asked to, upload it."""
    if arguments.layout is not None:
        raise MemtxError("--layout is given with --to hf, which has a layout of its own.", "Remove --layout.")
    with options.user_modules(arguments.modules):
        from memtx.checkpoint.hf_export import export_checkpoint

        summary = export_checkpoint(
            arguments.source,
            arguments.target,
            segment_length=arguments.segment_length,
            overwrite=arguments.overwrite,
            name=arguments.push_to_hub,
        )
        message = f"'{arguments.target}': {summary.model_class} with {summary.num_parameters:,} parameters, and "
        sys.stdout.write(f"{message}{', '.join(summary.extra_files)}; from {summary.source}.\n")
    _upload(arguments)
    sys.stdout.write(
        f"Open it with AutoModelForCausalLM.from_pretrained({arguments.target!r}, trust_remote_code=True).\n"
    )


def _upload(arguments: argparse.Namespace) -> None:
    """Upload the target if asked to."""
    if arguments.push_to_hub is not None:
        from memtx.checkpoint import hub

        sys.stdout.write(f"Uploaded: {hub.upload(arguments.target, arguments.push_to_hub)}\n")


def _make_change(arguments: argparse.Namespace) -> Callable[[PretrainedModel], PretrainedModel]:
    """Return the function that gives an encoder another attention."""
    from memtx.models import long_encoder
    from memtx.models.encoder import Encoder

    def change(model: PretrainedModel) -> PretrainedModel:
        if not isinstance(model, Encoder):
            message = f"--to {arguments.to}: '{arguments.source}' holds {type(model).__name__}, not an encoder."
            raise MemtxError(message, "Give a BERT or RoBERTa.")
        if arguments.to == "longformer":
            return long_encoder.to_longformer(model, arguments.max_length, arguments.window)
        sizes = (arguments.block_size, arguments.num_random_blocks)
        return long_encoder.to_bigbird(model, arguments.max_length, *sizes)

    return change


def main(argv: list[str]) -> int:
    """Run ``memtx convert``."""
    parser = options.Parser(
        "memtx convert",
        "Write a checkpoint, run or model as a model folder: config.json, model.safetensors and the tokenizer. "
        "The shards of a distributed checkpoint are merged.",
    )
    add = parser.add_argument
    add(
        "source",
        help="a .ckpt file or folder, a run folder (its best checkpoint), a model folder, or user/name of the hub",
    )
    add("target", help="folder to create")
    add("--layout", metavar="FOLDER", help="write the layout of this Hugging Face folder, which training started from")
    sparse, hf = "give an encoder with full attention a sparse one", "write a language model for transformers"
    add("--to", choices=("longformer", "bigbird", "hf"), help=f"{sparse}, or {hf}")
    add("--max-length", type=int, default=4096, help="--to: tokens that it reads at once; its positions are repeated")
    add("--window", type=int, default=512, help="--to longformer: neighbors that a token sees, half on each side")
    add("--block-size", type=int, default=64, help="--to bigbird: tokens of a block")
    add("--num-random-blocks", type=int, default=3, help="--to bigbird: random blocks that a block sees")
    add("--segment-length", type=options.positive_int, help="--to hf: tokens read at a time (default: 512)")
    add("--push-to-hub", metavar="USER/NAME", help="upload the folder to this repository of the hub")
    add("--overwrite", action="store_true", help="replace the target if it exists")
    parser.add_import_option()
    return parser.run(argv, _convert)

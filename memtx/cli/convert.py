"""``memtx convert``: convert a checkpoint, sharded or not, to a model folder that all commands load."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from memtx.cli import options
from memtx.errors import MemtxError

if TYPE_CHECKING:
    from memtx.checkpoint.pretrained import PretrainedModel

MAX_NAMES_SHOWN = 3
EXPORT_FORMATS = ("onnx", "pt2")

TARGET_OPTIONS: dict[str, dict[str, int | None]] = {
    "longformer": {"max_length": 4096, "window": 512, "freeze": None},
    "bigbird": {"max_length": 4096, "block_size": 64, "num_random_blocks": 3, "freeze": None},
    "hf": {"segment_length": None, "window": None},
    "onnx": {"segment_length": 512, "window": None, "batch_size": 1},
    "pt2": {"segment_length": 512, "window": None, "batch_size": 1},
}
"""Options of each ``--to`` with their defaults."""

NEW_POSITIONS = ("new-positions", "all-but-new-positions")
_POSITIONS = "embedding.position_embeddings.weight"
FREEZE_PATTERNS = {
    "positions": [_POSITIONS],
    "new-positions": [_POSITIONS + "[{old}:]"],
    "rest": ["[!e]*", "embedding.[!p]*"],
    "all-but-new-positions": ["[!e]*", "embedding.[!p]*", _POSITIONS + "[:{old}]"],
}
"""Parameters that ``--freeze`` keeps from training, as option of ``memtx.training.callbacks.freeze.Freeze``.

``{old}`` stands for the rows of positions that the encoder has before it is converted.
"""


def _convert(arguments: argparse.Namespace) -> None:
    _check_options(arguments)
    if arguments.to in EXPORT_FORMATS:
        _export(arguments)
        return
    if arguments.to == "hf":
        _convert_to_hf(arguments)
        return
    with options.user_modules(arguments.modules):
        from memtx.checkpoint.convert import convert

        num_positions: list[int] = []
        change = None if arguments.to is None else _make_change(arguments, num_positions)
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
        words = ["fit", "--config", f"configs/{arguments.to}-mlm.yaml", "--model.pretrained", arguments.target]
        if arguments.freeze is not None:
            words += ["--trainer.callbacks+=memtx.training.callbacks.freeze.Freeze"]
            patterns = json.dumps(FREEZE_PATTERNS[arguments.freeze])
            words += [f"--trainer.callbacks.parameters={patterns.replace('{old}', str(num_positions[0]))}"]
        options.print_next_command("Train it on with", *words)
    elif "series.json" in summary.extra_files:
        options.print_next_command("Predict a series with", "predict", "FILE", "--checkpoint", arguments.target)
    else:
        options.print_next_command("Serve it with", "serve", "--checkpoint", arguments.target)


def _export(arguments: argparse.Namespace) -> None:
    """Write the programs of a language model for another runtime."""
    with options.user_modules(arguments.modules):
        from memtx.export.bundle import export_folder

        result = export_folder(
            arguments.source,
            arguments.target,
            format=arguments.to,
            segment_length=arguments.segment_length,
            batch_size=arguments.batch_size,
            window=arguments.window,
            overwrite=arguments.overwrite,
        )
    sizes = ", ".join(f"{name} ({size / 1e6:,.1f} MB)" for name, size in result.num_bytes.items())
    model = f"{result.model_class} with {result.num_parameters:,} parameters in float32"
    state = f"a stream's state takes {result.state_bytes / 1e6:,.1f} MB"
    sys.stdout.write(f"'{arguments.target}': {model}, from {result.source}; {state}. Files: {sizes}.\n")
    _upload(arguments)


def _check_options(arguments: argparse.Namespace) -> None:
    """Fill in the defaults of ``--to``; raise MemtxError for an option of another target or of none."""
    if arguments.layout is not None and arguments.to in ("hf", *EXPORT_FORMATS):
        message = f"--layout is given with --to {arguments.to}, which has a layout of its own."
        raise MemtxError(message, "Remove --layout.")
    defaults: dict[str, int | None] = TARGET_OPTIONS.get(arguments.to, {})
    for name in dict.fromkeys(name for names in TARGET_OPTIONS.values() for name in names):
        if name in defaults:
            setattr(arguments, name, defaults[name] if (value := getattr(arguments, name)) is None else value)
        elif getattr(arguments, name) is not None:
            *first, last = (target for target, names in TARGET_OPTIONS.items() if name in names)
            targets = f"{', '.join(first)} or {last}" if first else last
            option = f"--{name.replace('_', '-')}"
            reason = "" if arguments.to is None else f", not to {arguments.to}"
            raise MemtxError(f"{option} applies to --to {targets}{reason}.", f"Add --to, or remove {option}.")


def _convert_to_hf(arguments: argparse.Namespace) -> None:
    """Write a language model for transformers and, if asked to, upload it."""
    with options.user_modules(arguments.modules):
        from memtx.checkpoint.hf_export import export_checkpoint

        summary = export_checkpoint(
            arguments.source,
            arguments.target,
            window=arguments.window,
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


def _make_change(
    arguments: argparse.Namespace, num_positions: list[int]
) -> Callable[[PretrainedModel], PretrainedModel]:
    """Return the function that gives an encoder another attention, and notes its number of positions before."""
    from memtx.models import long_encoder
    from memtx.models.encoder import Encoder

    def change(model: PretrainedModel) -> PretrainedModel:
        if not isinstance(model, Encoder):
            message = f"--to {arguments.to}: '{arguments.source}' holds {type(model).__name__}, not an encoder."
            raise MemtxError(message, "Give a BERT or RoBERTa.")
        num_positions.append(model.embedding.position_embeddings.num_embeddings)
        if arguments.to == "longformer":
            longer = long_encoder.to_longformer(model, arguments.max_length, arguments.window)
        else:
            sizes = (arguments.block_size, arguments.num_random_blocks)
            longer = long_encoder.to_bigbird(model, arguments.max_length, *sizes)
        if (
            arguments.freeze in NEW_POSITIONS
            and longer.embedding.position_embeddings.num_embeddings == num_positions[0]
        ):
            message = f"--freeze {arguments.freeze}: the encoder reads {arguments.max_length} tokens already."
            raise MemtxError(message, "Raise --max-length, or choose rest or positions.")
        return longer

    return change


def main(argv: list[str]) -> int:
    """Run ``memtx convert``."""
    parser = options.Parser(
        "memtx convert",
        "Write a checkpoint, run or model as a model folder: config.json, model.safetensors and the tokenizer. "
        "The shards of a distributed checkpoint are merged.",
    )
    add = parser.add_argument
    sparse = "give an encoder with full attention a sparse one"
    hf = "write a language model for transformers"
    programs = "write a language model's step as ONNX graphs, or as programs of torch.export (pt2)"
    neighbors = "neighbors that a token sees, half on each side (default: 512)"
    seen = "tokens that a Hugging Face decoder sees exactly (default: as many as it was trained on)"
    text = "a .ckpt file or folder, a run folder (its best checkpoint), a model folder, or user/name of the hub"
    add("source", help=text)
    add("target", help="folder to create")
    add("--layout", metavar="FOLDER", help="write the layout of this Hugging Face folder, which training started from")
    add("--to", choices=("longformer", "bigbird", "hf", *EXPORT_FORMATS), help=f"{sparse}; {hf}; or {programs}")
    add("--max-length", type=int, help="--to: tokens that it reads at once (4096); its positions are repeated")
    text = f"--to longformer: {neighbors}; --to hf, onnx and pt2: {seen}"
    add("--window", type=options.positive_int, metavar="N", help=text)
    add("--block-size", type=int, help="--to bigbird: tokens of a block (64)")
    add("--num-random-blocks", type=int, help="--to bigbird: random blocks that a block sees (3)")
    text = (
        "--to: what the printed command does not train: the position embeddings (all, or those behind the old length, "
    )
    text += "which begin as copies), or all but these"
    add("--freeze", choices=tuple(FREEZE_PATTERNS), help=text)
    text = "--to hf, onnx and pt2: tokens read at a time (default: 512)"
    add("--segment-length", type=options.positive_int, metavar="N", help=text)
    text = "--to onnx and pt2: streams that are read at once (default: 1)"
    add("--batch-size", type=options.positive_int, metavar="N", help=text)
    add("--push-to-hub", metavar="USER/NAME", help="upload the folder to this repository of the hub")
    add("--overwrite", action="store_true", help="replace the target if it exists")
    parser.add_import_option()
    return parser.run(argv, _convert)

"""``memtx distil augment``: examples of a task with variants of each, for the distillation of a small model."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtx import files
from memtx.cli import options
from memtx.data.sources.base import SPLITS
from memtx.errors import DataError, MemtxError

if TYPE_CHECKING:
    from memtx.training.distillation.augmentation import Augmenter


def _load_augmenter(arguments: argparse.Namespace) -> Augmenter:
    from memtx.checkpoint.load import load
    from memtx.data.hf_tokenizers import HFTokenizer
    from memtx.data.tokenizers import tokenizer_from_json
    from memtx.models.encoder import Encoder
    from memtx.training.distillation.augmentation import Augmenter
    from memtx.training.distillation.word_vectors import WordVectors

    vectors = None if arguments.vectors is None else WordVectors.read(arguments.vectors)
    with options.user_modules(arguments.modules):
        checkpoint = load(arguments.model)
    model = checkpoint.model_as(Encoder)
    text = checkpoint.sidecars.get("tokenizer")
    is_published = text is None or '"format": "memtx.' not in text
    tokenizer = HFTokenizer(str(checkpoint.path)) if is_published or text is None else tokenizer_from_json(text)
    if not isinstance(tokenizer, HFTokenizer) or tokenizer.vocab_size > model.vocab_size:
        raise MemtxError(
            f"'{arguments.model}' has no tokenizer with a mask token that its model knows.",
            "Give a published encoder, or a run with HFTokenizer or WordPieceTokenizer.",
        )
    embedding = model.embedding
    num_positions = embedding.position_embeddings.num_embeddings
    if embedding.roberta_positions:
        num_positions -= (embedding.pad_token_id or 0) + 1
    names = ("replace_prob", "num_variants", "num_candidates", "batch_size")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    model.to(**options.get_placement(arguments))
    return Augmenter(model, tokenizer, vectors, max_length=min(512, num_positions), **settings)


def _augment(arguments: argparse.Namespace) -> None:
    from memtx.data.tasks.examples import find_split, read_examples, split_path

    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise MemtxError(f"'{output}' exists and is no empty folder.", "Give another --output.")
    path = split_path(arguments.data, "train")
    records = read_examples(path, lambda record, labelled: dict(record))
    augmenter = _load_augmenter(arguments)
    num_variants = 0
    # All lines before the file appears, so that an invalid example leaves nothing half-written.
    lines: list[str] = []
    with options.progress_bar("augmenting", len(records)) as advance:
        for number, record in records:
            # Seeded by line, so that a text's variants do not depend on the texts before it.
            rng = random.Random(f"{arguments.seed} {number}")
            try:
                variants = augmenter.augment_record(record, rng)
            except DataError as error:
                raise DataError(f"'{path}', line {number}: {error.message}", error.hint) from error
            lines += [json.dumps(example, ensure_ascii=False) + "\n" for example in (record, *variants)]
            num_variants += len(variants)
            advance(1)
    output.mkdir(parents=True, exist_ok=True)
    for split in SPLITS[1:]:
        if (other := find_split(arguments.data, split)) is not None:
            files.write_text(output / f"{split}.jsonl", other.read_bytes().decode("utf-8"))
    files.write_text(output / "train.jsonl", "".join(lines))
    print(f"{len(records):,} examples and {num_variants:,} variants are in '{output}'.")
    config = ("--config", "configs/tinybert-task.yaml", "--data.root", str(output))
    options.print_next_command("Train on them with", "fit", *config)


def main(argv: list[str]) -> int:
    """Run ``memtx distil augment``."""
    parser = options.Parser(
        "memtx distil augment",
        "Write a folder of examples with variants of each training example (TinyBERT, Jiao et al. 2020): words are "
        "replaced by those that an encoder predicts in their place, and words of several pieces by their nearest ones. "
        "Texts, pairs of texts and tagged words are augmented; labels, tags and the other splits stay as they are.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="encoder with a head for masked tokens: published, or a run")
    add("--data", required=True, metavar="FOLDER", help="folder of the task's examples")
    add("--output", required=True, metavar="FOLDER", help="folder to write")
    text = "word vectors as text, such as glove.6B.300d.txt; defaults to the encoder's embeddings"
    add("--vectors", metavar="FILE", help=text)
    add(
        "--replace-prob", type=options.number_range(float, maximum=1), default=0.4, help="probability to replace a word"
    )
    add("--num-variants", type=options.positive_int, default=20, help="variants of a text; equal ones are left out")
    add("--num-candidates", type=options.positive_int, default=15, help="candidates for a word")
    add("--batch-size", type=options.positive_int, default=32, help="masked texts per call of the encoder")
    add("--seed", type=options.non_negative_int, default=0, help="seed of the choices")
    parser.add_model_options(checkpoint=False, segment_length=None)
    return parser.run(argv, _augment)

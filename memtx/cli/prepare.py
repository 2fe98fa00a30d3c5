"""``memtx prepare``: texts from anywhere to a folder of tokens, once; ``memtx fit --data.root FOLDER`` trains on it."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtx.cli.options import Parser, run
from memtx.errors import DataError, MemtxError

if TYPE_CHECKING:
    from memtx.data.shards import ProgressCallback
    from memtx.data.sources.base import TextSource
    from memtx.data.tokenized_corpus import TokenizedCorpus
    from memtx.data.tokenizers import Tokenizer

PROGRESS_INTERVAL = 30.0
"""Seconds between two lines of a run without a terminal."""


def _build_parser() -> Parser:
    parser = Parser(
        "memtx prepare",
        "Encode texts into a folder that training reads as it is. Killed or interrupted, the same command goes on "
        "with what was done. The source is not changed.",
    )
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="folders, files, patterns or URLs of texts (.txt, .md), JSON lines (.jsonl) and Parquet; .gz, .bz2, .xz, "
        ".zst and .zip too",
    )
    parser.add_argument("--output-dir", required=True, metavar="FOLDER", help="what to make")
    parser.add_argument(
        "--tokenizer",
        default="byte",
        metavar="T",
        help="byte; a number, for byte pairs of so many ids trained on the texts; or a tokenizer.json, or its folder",
    )
    parser.add_argument("--text-column", default="text", help="of tables: the column of the texts")
    parser.add_argument("--id-column", metavar="COLUMN", help="of tables: that of the documents' names")
    share = "share of documents for {}, by their names; as laid out by default, else 0.05"
    for name in ("validation", "test"):
        parser.add_argument(f"--{name}-fraction", type=float, metavar="FRACTION", help=share.format(name))
    parser.add_argument("--num-workers", type=int, metavar="N", help="processes; one a core by default")
    parser.add_argument(
        "--hf-dataset",
        action="store_true",
        help="SOURCE names a data set of the `datasets` library, as hub name or folder",
    )
    parser.add_argument("--dataset-config", metavar="NAME", help="of its configurations")
    parser.add_argument("--json", action="store_true", help="say what was made as JSON")
    return parser


def _build_text_source(arguments: argparse.Namespace) -> TextSource:
    common: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("text_column", "id_column", "validation_fraction", "test_fraction")
    }
    if not arguments.hf_dataset:
        if arguments.dataset_config is not None:
            raise MemtxError("--dataset-config is of a data set.", "Add --hf-dataset.")
        from memtx.data.sources.files import FileSource

        return FileSource(arguments.source, **common)
    if len(arguments.source) > 1:
        raise MemtxError(f"--hf-dataset takes one source, got {len(arguments.source)}.", "Prepare them one by one.")
    from memtx.data.sources.hub import HubDataset

    return HubDataset(arguments.source[0], arguments.dataset_config, **common)


def _build_tokenizer(name: str) -> Tokenizer:
    from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer, load_tokenizer

    if name == "byte":
        return ByteTokenizer()
    if name.isdecimal():
        return BytePairTokenizer(int(name))
    path = Path(name)
    if not path.exists():
        raise DataError(
            f"The tokenizer '{name}' is no file.", "Give byte, a number of ids to train, or the path of a tokenizer."
        )
    return load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)


@contextlib.contextmanager
def show_progress(description: str, total: int, completed: int) -> Iterator[ProgressCallback]:
    """Show bytes, rate and time left: a bar on a terminal, elsewhere a line from time to time."""
    from memtx.data.tokenized_corpus import progress_bar

    if sys.stderr.isatty():
        with progress_bar(description, total, completed) as shown:
            yield shown
        return
    began = last = time.monotonic()
    read = 0

    def advance(count: int) -> None:
        nonlocal last, read
        read += count
        now = time.monotonic()
        if now - last >= PROGRESS_INTERVAL:
            last, rate = now, read / (now - began)
            sys.stderr.write(
                f"{description}: {(completed + read) / 1e6:,.0f} of {total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
                f"{(total - completed - read) / rate / 60:.0f} min left\n"
            )

    yield advance


def _print_summary(corpus: TokenizedCorpus, seconds: float, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(
            json.dumps({"output_dir": str(corpus.folder), "splits": corpus.splits, "seconds": seconds}) + "\n"
        )
        return
    sys.stdout.write(f"{'split':<12} {'documents':>11} {'tokens':>15} {'bytes of text':>15} {'bytes/token':>11}\n")
    for split, facts in corpus.splits.items():
        sys.stdout.write(
            f"{split:<12} {facts['documents']:>11,} {facts['tokens']:>15,} {facts['bytes']:>15,} "
            f"{facts['bytes'] / facts['tokens']:>11.2f}\n"
        )
    if left_out := sum(facts["num_skipped"] for facts in corpus.splits.values()):
        sys.stdout.write(f"{left_out:,} rows without a word were left out.\n")
    sys.stdout.write(f"memtx fit --data.root {corpus.folder} trains on it.\n")


def _prepare(arguments: argparse.Namespace) -> None:
    if arguments.num_workers is not None and arguments.num_workers < 1:
        raise MemtxError(f"--num-workers is {arguments.num_workers}.", "Give at least 1.")
    tokenizer = _build_tokenizer(arguments.tokenizer)
    began = time.monotonic()
    source = _build_text_source(arguments).scan()
    from memtx.data.tokenized_corpus import tokenize_corpus

    try:
        found = tokenize_corpus(
            Path(arguments.output_dir).expanduser(),
            source,
            tokenizer,
            num_workers=arguments.num_workers,
            verify=True,
            progress=show_progress,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what is done is kept; the same command goes on with it") from None
    _print_summary(found, time.monotonic() - began, arguments.json)


def main(argv: list[str]) -> int:
    """Run ``memtx prepare`` with its arguments and return the exit code."""
    arguments = _build_parser().parse(argv)
    return run(lambda: _prepare(arguments), traceback=arguments.traceback)

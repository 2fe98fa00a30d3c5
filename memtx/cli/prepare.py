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

from memtx.cli.common import Parser, run
from memtx.errors import DataError, MemtxError

if TYPE_CHECKING:
    from memtx.data.encoding import Advance
    from memtx.data.prepared import Prepared
    from memtx.data.source import Texts
    from memtx.data.tokenizers import Tokenizer

EVERY = 30.0
"""Seconds between two lines of a run without a terminal."""


def _parser() -> Parser:
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
    parser.add_argument("--out", required=True, metavar="FOLDER", help="what to make")
    parser.add_argument(
        "--tokenizer",
        default="byte",
        metavar="T",
        help="byte; a number, for byte pairs of so many ids trained on the texts; or a tokenizer.json, or its folder",
    )
    parser.add_argument("--field", default="text", help="of tables: the column of the texts")
    parser.add_argument("--id-field", metavar="FIELD", help="of tables: that of the documents' names")
    share = "share of documents for {}, by their names; as laid out by default, else 0.05"
    for name in ("validation", "test"):
        parser.add_argument(f"--{name}", type=float, metavar="SHARE", help=share.format(name))
    parser.add_argument("--workers", type=int, metavar="N", help="processes; one a core by default")
    parser.add_argument(
        "--dataset",
        action="store_true",
        help="SOURCE names a data set of the `datasets` library, as hub name or folder",
    )
    parser.add_argument("--dataset-name", metavar="NAME", help="of its configurations")
    parser.add_argument("--json", action="store_true", help="say what was made as JSON")
    return parser


def _texts(arguments: argparse.Namespace) -> Texts:
    common: dict[str, Any] = {name: getattr(arguments, name) for name in ("field", "id_field", "validation", "test")}
    if not arguments.dataset:
        if arguments.dataset_name is not None:
            raise MemtxError("--dataset-name is of a data set.", "Add --dataset.")
        from memtx.data.sources.files import Files

        return Files(arguments.source, **common)
    if len(arguments.source) > 1:
        raise MemtxError(f"--dataset takes one source, got {len(arguments.source)}.", "Prepare them one by one.")
    from memtx.data.sources.hub import HubDataset

    return HubDataset(arguments.source[0], arguments.dataset_name, **common)


def _tokenizer(asked: str) -> Tokenizer:
    from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer, load_tokenizer

    if asked == "byte":
        return ByteTokenizer()
    if asked.isdecimal():
        return BytePairTokenizer(int(asked))
    path = Path(asked)
    if not path.exists():
        raise DataError(
            f"The tokenizer '{asked}' is no file.", "Give byte, a number of ids to train, or the path of a tokenizer."
        )
    return load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)


@contextlib.contextmanager
def lines(description: str, total: int, done: int) -> Iterator[Advance]:
    """Show bytes, rate and time left: a bar on a terminal, elsewhere a line from time to time."""
    from memtx.data.prepared import bar

    if sys.stderr.isatty():
        with bar(description, total, done) as shown:
            yield shown
        return
    began = last = time.monotonic()
    read = 0

    def advance(count: int) -> None:
        nonlocal last, read
        read += count
        now = time.monotonic()
        if now - last >= EVERY:
            last, rate = now, read / (now - began)
            sys.stderr.write(
                f"{description}: {(done + read) / 1e6:,.0f} of {total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
                f"{(total - done - read) / rate / 60:.0f} min left\n"
            )

    yield advance


def _say(found: Prepared, seconds: float, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"folder": str(found.folder), "splits": found.splits, "seconds": seconds}) + "\n")
        return
    sys.stdout.write(f"{'split':<12} {'documents':>11} {'tokens':>15} {'bytes of text':>15} {'bytes/token':>11}\n")
    for split, facts in found.splits.items():
        sys.stdout.write(
            f"{split:<12} {facts['documents']:>11,} {facts['tokens']:>15,} {facts['bytes']:>15,} "
            f"{facts['bytes'] / facts['tokens']:>11.2f}\n"
        )
    if left_out := sum(facts["left_out"] for facts in found.splits.values()):
        sys.stdout.write(f"{left_out:,} rows without a word were left out.\n")
    sys.stdout.write(f"memtx fit --data.root {found.folder} trains on it.\n")


def _prepare(arguments: argparse.Namespace) -> None:
    if arguments.workers is not None and arguments.workers < 1:
        raise MemtxError(f"--workers is {arguments.workers}.", "Give at least 1.")
    tokenizer = _tokenizer(arguments.tokenizer)
    began = time.monotonic()
    source = _texts(arguments).source()
    from memtx.data.prepared import prepare

    try:
        found = prepare(
            Path(arguments.out).expanduser(),
            source,
            tokenizer,
            workers=arguments.workers,
            verify=True,
            progress=lines,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what is done is kept; the same command goes on with it") from None
    _say(found, time.monotonic() - began, arguments.json)


def main(argv: list[str]) -> int:
    """Run ``memtx prepare`` with its arguments and return the exit code."""
    arguments = _parser().parse(argv)
    return run(lambda: _prepare(arguments), traceback=arguments.traceback)

"""``memtx prepare``: tokenize texts from any source once into a folder that ``memtx fit --data.root`` trains on."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtx.cli import options
from memtx.errors import DataError, MemtxError

if TYPE_CHECKING:
    from memtx.data.shards import ProgressCallback
    from memtx.data.sources.base import TextSource
    from memtx.data.tokenized_corpus import TokenizedCorpus
    from memtx.data.tokenizers import Tokenizer

PROGRESS_INTERVAL = 30.0
"""Seconds between progress lines without a terminal."""


def _build_text_source(arguments: argparse.Namespace) -> TextSource:
    names = ("text_column", "id_column", "validation_fraction", "test_fraction")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    if not arguments.hf_dataset:
        if arguments.dataset_config is not None:
            raise MemtxError("--dataset-config needs a dataset.", "Add --hf-dataset.")
        from memtx.data.sources.files import FileSource

        return FileSource(arguments.source, **settings)
    if len(arguments.source) > 1:
        raise MemtxError(f"--hf-dataset takes one source, got {len(arguments.source)}.", "Prepare them one by one.")
    from memtx.data.sources.hub import HubDataset

    return HubDataset(arguments.source[0], arguments.dataset_config, **settings)


def _build_tokenizer(arguments: argparse.Namespace) -> Tokenizer:
    from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer, WordTokenizer, load_tokenizer

    name, words = arguments.tokenizer, {"min_freq": arguments.min_freq, "lower_case": arguments.lower_case}
    if name == "word":
        return WordTokenizer(arguments.max_words, arguments.vocab_file, **words)
    if arguments.vocab_file or arguments.max_words or words != {"min_freq": 1, "lower_case": False}:
        message = f"--vocab-file, --max-words, --min-freq and --lower-case do not apply to --tokenizer {name}."
        raise DataError(message, "Remove them, or give --tokenizer word.")
    if name == "byte":
        return ByteTokenizer()
    if name.isdecimal():
        return BytePairTokenizer(int(name))
    path = Path(name)
    if not path.exists():
        hint = "Give byte, word, a vocabulary size, or the path of a tokenizer."
        raise DataError(f"The tokenizer '{name}' does not exist.", hint)
    return load_tokenizer(path)


@contextlib.contextmanager
def show_progress(description: str, total: int, completed: int) -> Iterator[ProgressCallback]:
    """Show bytes, rate and remaining time: as a bar on a terminal, else as a line every 30 seconds."""
    if sys.stderr.isatty():
        with options.progress_bar(description, total, completed=completed, in_bytes=True) as update:
            yield update
        return
    start = last = time.monotonic()
    num_bytes = 0

    def advance(count: int) -> None:
        nonlocal last, num_bytes
        num_bytes += count
        now = time.monotonic()
        if now - last >= PROGRESS_INTERVAL:
            last, rate = now, num_bytes / (now - start)
            sys.stderr.write(
                f"{description}: {(completed + num_bytes) / 1e6:,.0f} of {total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
                f"{(total - completed - num_bytes) / rate / 60:.0f} min left\n"
            )

    yield advance


def _print_summary(corpus: TokenizedCorpus, notes: list[str], seconds: float, as_json: bool) -> None:
    if as_json:
        summary = {"output_dir": str(corpus.folder), "splits": corpus.splits, "notes": notes, "seconds": seconds}
        sys.stdout.write(json.dumps(summary) + "\n")
        return
    sys.stdout.write(f"{'split':<12} {'documents':>11} {'tokens':>15} {'bytes of text':>15} {'bytes/token':>11}\n")
    for split, counts in corpus.splits.items():
        documents, tokens, num_bytes = (counts[name] for name in ("documents", "tokens", "bytes"))
        sys.stdout.write(f"{split:<12} {documents:>11,} {tokens:>15,} {num_bytes:>15,} {num_bytes / tokens:>11.2f}\n")
    if num_skipped := sum(counts["num_skipped"] for counts in corpus.splits.values()):
        sys.stdout.write(f"Skipped {num_skipped:,} documents without words.\n")
    sys.stdout.writelines(f"{note}\n" for note in notes)
    options.print_next_command("Train on it with", "fit", "--data.root", str(corpus.folder))


def _prepare(arguments: argparse.Namespace) -> None:
    tokenizer = _build_tokenizer(arguments)
    start = time.monotonic()
    source = _build_text_source(arguments).scan()
    from memtx.data.sources.splits import SPLIT_HINT
    from memtx.data.tokenized_corpus import tokenize_corpus

    try:
        folder = Path(arguments.output_dir).expanduser()
        settings: dict[str, Any] = {"num_workers": arguments.num_workers, "verify": True, "progress": show_progress}
        if arguments.engine == "ray":
            from memtx.cli import ray_engine

            settings["run_jobs"] = partial(ray_engine.write_jobs, limit=arguments.num_workers or 0)
        corpus = tokenize_corpus(folder, source, tokenizer, **settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("finished shards are kept; run the same command to resume") from None
    notes = source.notes
    if "validation" not in corpus.splits:
        notes.append(f"'{source.name}' has no validation split. {SPLIT_HINT} Or give --validation-fraction.")
    _print_summary(corpus, notes, time.monotonic() - start, arguments.json)


def main(argv: list[str]) -> int:
    """Run ``memtx prepare``."""
    parser = options.Parser(
        "memtx prepare",
        "Tokenize texts into a folder for training. After an interruption, the same command resumes. The source is "
        "not modified.",
    )
    add = parser.add_argument
    text = "folders, files, patterns or URLs of texts (.txt, .md), JSON, CSV and Parquet, also compressed"
    add("source", nargs="+", metavar="SOURCE", help=text)
    add("--output-dir", required=True, metavar="FOLDER", help="folder to create")
    text = "byte, word, a vocabulary size to train BPE, or a tokenizer.json"
    add("--tokenizer", default="byte", metavar="T", help=text)
    add("--vocab-file", metavar="FILE", help="vocabulary of --tokenizer word, a word per line; default: all words")
    add("--max-words", type=options.positive_int, metavar="N", help="size of the vocabulary of --tokenizer word")
    add("--min-freq", type=options.positive_int, default=1, metavar="N", help="leave out rarer words (default: 1)")
    add("--lower-case", action="store_true", help="words in lower case")
    add("--text-column", default="text", help="table column of the texts")
    add("--id-column", metavar="COLUMN", help="table column of the document ids")
    for split in ("validation", "test"):
        text = f"fraction of documents for {split}; defaults to the source's own split, or 0.05"
        add(f"--{split}-fraction", type=float, metavar="FRACTION", help=text)
    add("--num-workers", type=options.positive_int, metavar="N", help="number of workers; defaults to one per core")
    text = "local: processes of this machine; ray: tasks on a Ray cluster that shares the files (memtx[ray])"
    add("--engine", choices=("local", "ray"), default="local", help=text)
    add("--hf-dataset", action="store_true", help="SOURCE is the name or folder of a dataset of the `datasets` library")
    add("--dataset-config", metavar="NAME", help="configuration of the dataset")
    add("--json", action="store_true", help="print the summary as JSON")
    return parser.run(argv, _prepare)

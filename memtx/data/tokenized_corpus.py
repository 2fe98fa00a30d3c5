"""Tokenized corpora: a folder with a tokenizer and a token store for each split, to train on anywhere.

    FOLDER/prepared.json                  what it was made of and what is in it; written last
    FOLDER/tokenizer.json
    FOLDER/train/index.json               closes the split (see memtx.data.shards)
    FOLDER/train/shard-00000.bin          tokens; the metadata of its documents is in shard-00000.bin.json

The folder appears under its name when it is complete. Until then its shards are in ``.FOLDER.building`` beside it, each
written atomically, so a run that was killed continues with what it had.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from memtx import files
from memtx.data.shards import INDEX_NAME, REBUILD_HINT, ProgressCallback, TokenStore, metadata_path, write_index
from memtx.data.sources.base import SPLITS, Corpus, CorpusManifest, Document, SourcePart, assign_split
from memtx.data.tokenize import ShardJob, hash_lines, plan_jobs, write_jobs
from memtx.data.tokenizers import Tokenizer, load_tokenizer
from memtx.errors import DataError, MemtxError

FORMAT, FORMAT_VERSION = "memtx.tokenized_corpus", 2
INFO_NAME, TOKENIZER_NAME = "prepared.json", "tokenizer.json"
MAX_TRAINING_BYTES = 256 << 20  # of text that a tokenizer is trained on; merges hardly change with more

# Makes a progress callback from a description, the total bytes and those already done.
ProgressFactory = Callable[[str, int, int], AbstractContextManager[ProgressCallback]]

# Does jobs with a tokenizer, at most so many at a time, as write_jobs does.
JobRunner = Callable[[Sequence[ShardJob], Tokenizer, int, ProgressCallback], None]

log = logging.getLogger(__name__)


class TokenizedCorpus:
    """A folder that :func:`tokenize_corpus` wrote.

    Raises DataError if the folder is no such folder, or of another version.

    Attributes:
        name: Name of the source.
        splits: Per split, the numbers of documents, tokens, words, bytes of text and skipped rows, and the
            fingerprint.
        input_fingerprint: SHA-256 of the texts and the tokenizer.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            info = files.read_json(self.folder / INFO_NAME)
            version = info["format"], info["version"]
            if version == (FORMAT, FORMAT_VERSION):
                self.name, self.input_fingerprint = str(info["name"]), str(info["input_fingerprint"])
                order = (*SPLITS, *info["splits"])
                splits = sorted(info["splits"].items(), key=lambda item: order.index(item[0]))
                self.splits: dict[str, dict[str, Any]] = {split: dict(totals) for split, totals in splits}
                self._tokenizer_fingerprint = str(info["tokenizer"])
        except (MemtxError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"'{folder}' is no whole prepared folder ({error}).", REBUILD_HINT) from error
        if version != (FORMAT, FORMAT_VERSION):
            raise DataError(
                f"'{folder}' is {version[0]} of version {version[1]}, this release reads {FORMAT} of {FORMAT_VERSION}.",
                REBUILD_HINT,
            )

    def read_tokenizer(self) -> Tokenizer:
        """Read the tokenizer; raises DataError if it is missing or damaged."""
        tokenizer = load_tokenizer(self.folder / TOKENIZER_NAME)
        if tokenizer.fingerprint != self._tokenizer_fingerprint:
            raise DataError(f"The tokenizer '{self.folder / TOKENIZER_NAME}' was changed.", REBUILD_HINT)
        return tokenizer

    def resolve_tokenizer(self, requested: Tokenizer | None) -> Tokenizer:
        """Return the folder's tokenizer; raises DataError unless it is the requested one or trained as requested."""
        tokenizer = self.read_tokenizer()
        if requested is None:
            return tokenizer
        if requested.is_trained:
            matches = requested.fingerprint == tokenizer.fingerprint
        else:
            matches = type(requested) is type(tokenizer) and requested.training_options == tokenizer.training_options
        if not matches:
            raise DataError(
                f"'{self.folder}' was prepared with a {type(tokenizer).__name__} of {tokenizer.vocab_size} tokens, "
                f"which is not the {type(requested).__name__} of {requested.training_options} requested.",
                "Remove the option tokenizer, or prepare the texts with the other one.",
            )
        return tokenizer

    def open_split(self, split: str) -> TokenStore:
        """Open the tokens of a split; raises DataError if there is no such split, or it is damaged."""
        if split not in self.splits:
            message = f"'{self.folder}' has no split '{split}', it has {', '.join(self.splits)}."
            raise DataError(message, "Prepare the texts with a share for it.")
        store = TokenStore(self.folder / split)
        expected = self._tokenizer_fingerprint, self.splits[split].get("fingerprint")
        if (store.tokenizer_fingerprint, store.fingerprint) != expected:
            message = f"The token store '{store.folder}' belongs to other texts or another tokenizer."
            raise DataError(message, REBUILD_HINT)
        return store


def is_tokenized_corpus(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder is a tokenized corpus, whole or damaged."""
    return (Path(folder).expanduser() / INFO_NAME).is_file()


def compute_fingerprint(manifest: CorpusManifest, tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of the parts' cache keys and of the tokenizer, or of how it is to be trained."""
    options = f"{type(tokenizer).__qualname__} {tokenizer.training_options}" if not tokenizer.is_trained else ""
    name = options or tokenizer.fingerprint
    parts = (f"{part.cache_key} {dict(split_fractions)}" for part, split_fractions in manifest.iter_parts())
    return hash_lines(str(FORMAT_VERSION), name, *parts)


def open_store(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    cache_dir: Path,
    split: str = "tokens",
    num_workers: int | None = None,
    verify: bool = False,
) -> TokenStore:
    """Open the tokens of at least one document in a cache, encoding them first if they are not there.

    A store is found again by the ids, sizes and times of the files (the hash of embedded texts) and the trained
    tokenizer, so changed text or another tokenizer gives another store. A damaged store is rebuilt from its whole
    shards. Raises DataError if a text is not UTF-8 or empty, and MemtxError if the cache cannot be written to.

    All stores are in ``cache_dir``, named after their ``split``. The tokenizer must be trained; ``num_workers`` and
    ``verify`` are as in :func:`tokenize_corpus`.
    """
    manifest = Corpus(split, {split: documents})
    folder = cache_dir / f"{split}-{compute_fingerprint(manifest, tokenizer)[:16]}"
    return tokenize_corpus(folder, manifest, tokenizer, num_workers=num_workers, verify=verify).open_split(split)


def tokenize_corpus(
    folder: str | os.PathLike[str],
    manifest: CorpusManifest,
    tokenizer: Tokenizer,
    *,
    num_workers: int | None = None,
    verify: bool = False,
    progress: ProgressFactory | None = None,
    run_jobs: JobRunner = write_jobs,
) -> TokenizedCorpus:
    """Encode a source into a folder, or open the folder if that was done.

    A run that was killed at any moment continues with its whole shards, and the result is the same to the byte. Memory
    holds a portion of one text a process, and the ids and lengths of the documents of one shard. Raises DataError if
    there is nothing to encode, a text cannot be used, or the folder holds something else, and MemtxError if it cannot
    be written to.

    Args:
        folder: Folder to write. A damaged one is rebuilt from its whole shards.
        manifest: Source with at least one part.
        tokenizer: Tokenizer of the texts; trained on those of "train" first if it is not trained.
        num_workers: Number of processes. None uses one per core.
        verify: If True, compare the checksums of existing shards, not only their sizes.
        progress: Shows the progress. Defaults to a bar on a terminal.
        run_jobs: Does the jobs of the shards that are missing, in any order and processes.
    """
    path = Path(folder)
    if not manifest.splits:
        raise DataError("There are no documents to encode, expected at least one.", "Check the source of texts.")
    fingerprint = compute_fingerprint(manifest, tokenizer)
    with file_lock(path):
        if path.exists() and (corpus := _open_existing(path, fingerprint, verify)) is not None:
            return corpus
        workers = num_workers or os.cpu_count() or 1
        _build(path, manifest, tokenizer, fingerprint, workers, progress or progress_bar, run_jobs)
    return TokenizedCorpus(path)


def _open_existing(path: Path, fingerprint: str, verify: bool) -> TokenizedCorpus | None:
    """Return the corpus at a path, or None if it must be built; raises DataError if it is not ours to overwrite."""
    if not path.is_dir() or (not is_tokenized_corpus(path) and any(path.iterdir())):
        raise DataError(f"'{path}' exists and is no prepared folder.", "Give another name, or remove it.")
    try:
        corpus = TokenizedCorpus(path)
        if corpus.input_fingerprint == fingerprint:
            corpus.read_tokenizer()
            for split in corpus.splits:
                store = corpus.open_split(split)
                if verify:
                    store.verify()
            return corpus
    except DataError as error:
        log.warning("%s Encoding it again.", error.message)
        return None
    message = f"'{path}' was prepared from other texts, or these have changed, or with another tokenizer."
    raise DataError(message, "Give another name, or remove it.")


def _build(
    path: Path,
    manifest: CorpusManifest,
    tokenizer: Tokenizer,
    fingerprint: str,
    num_workers: int,
    progress: ProgressFactory,
    run_jobs: JobRunner,
) -> None:
    building = path.with_name(f".{path.name}.building")
    if path.exists():
        shutil.rmtree(building, ignore_errors=True)
        os.replace(path, building)
        (building / INFO_NAME).unlink(missing_ok=True)
    building.mkdir(parents=True, exist_ok=True)
    for temporary in building.rglob(".*.tmp"):  # left by a run that was killed
        temporary.unlink(missing_ok=True)
    tokenizer = train_tokenizer(tokenizer, manifest, building)
    jobs = plan_jobs(building, manifest, tokenizer)
    remaining = [job for job in jobs if not job.is_complete]
    total, todo = (sum(part.size for job in group for part in job.parts) for group in (jobs, remaining))
    with progress(f"Encoding {manifest.name}", total, total - todo) as on_progress:
        run_jobs(remaining, tokenizer, num_workers, on_progress)
    shards = {
        split: [job.shard_path(split) for job in jobs if split in job.split_fractions] for split in manifest.splits
    }
    splits = {split: write_index(building / split, paths, tokenizer) for split, paths in shards.items()}
    splits = {split: totals for split, totals in splits.items() if totals["documents"]}
    if not splits:
        raise DataError(f"'{manifest.name}' holds no document with a word in it.", "Check the source of texts.")
    files.write_text(building / TOKENIZER_NAME, tokenizer.to_json())
    _prune(building, {split: shards[split] for split in splits})
    info = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "name": manifest.name,
        "input_fingerprint": fingerprint,
        "splits": splits,
        "tokenizer": tokenizer.fingerprint,
    }
    files.write_json(building / INFO_NAME, info)
    if path.exists():  # an empty folder
        path.rmdir()
    os.replace(building, path)
    files.fsync_directory(path.parent)


def _prune(building: Path, shards: Mapping[str, Sequence[Path]]) -> None:
    """Remove what an earlier plan left, such as that of a source that has changed since."""
    needed = {building / TOKENIZER_NAME}
    for split, paths in shards.items():
        needed.add(building / split / INDEX_NAME)
        for path in paths:
            needed.add(metadata_path(path))
            if files.read_json(metadata_path(path))["size"]:
                needed.add(path)
    for path in sorted(building.rglob("*"), reverse=True):
        if path.is_dir():
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        elif path not in needed:
            path.unlink()


def train_tokenizer(tokenizer: Tokenizer, manifest: CorpusManifest, folder: Path) -> Tokenizer:
    """Return the tokenizer, trained in place on the texts of "train" if it is not trained.

    A trained one is saved in ``folder``, where the next run on the same texts finds it. Raises DataError if there are
    no texts to train on, or a text cannot be used.
    """
    if tokenizer.is_trained:
        return tokenizer
    kind = type(tokenizer)
    if "train" not in manifest.splits:
        raise DataError(f"'{manifest.name}' has no split 'train' to train a tokenizer on.", "Give a trained tokenizer.")
    name = f"{kind.__module__}.{kind.__qualname__} {tokenizer.training_options}"
    fingerprint = hash_lines(name, *(part.cache_key for part, _ in _training_parts(manifest)))
    path = folder / f"tokenizer-{fingerprint[:16]}.json"
    with file_lock(path):
        if path.exists():
            try:
                return load_tokenizer(path)
            except DataError:
                path.unlink()  # damaged; training gives the same again
        tokenizer.train_documents(
            _training_texts(manifest, None if tokenizer.trains_on_all_texts else MAX_TRAINING_BYTES)
        )
        tokenizer.save(path)
    return tokenizer


def _training_parts(manifest: CorpusManifest) -> list[tuple[SourcePart, Mapping[str, float]]]:
    return [(part, fractions) for part, fractions in manifest.iter_parts() if fractions.get("train")]


def _training_texts(manifest: CorpusManifest, max_bytes: int | None) -> Iterator[Iterator[str]]:
    """Yield whole training texts, each in portions: all, or up to ``max_bytes`` spread evenly over the parts."""
    parts = _training_parts(manifest)
    stride = -(-sum(part.size for part, _ in parts) // max_bytes) if max_bytes is not None else 1
    remaining = float("inf") if max_bytes is None else max_bytes

    def count(texts: Iterator[str]) -> Iterator[str]:
        nonlocal remaining
        for text in texts:
            yield text
            remaining -= len(text)
            if remaining <= 0:
                return

    for part, split_fractions in parts[:: max(1, stride)]:
        for document in part.iter_documents():
            if assign_split(document.id, split_fractions) == "train":
                yield count(document.iter_text())
            if remaining <= 0:
                return


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Let one process at a time write ``path``. The lock ends with its process, its empty file stays beside ``path``.

    Raises MemtxError if the folder of ``path`` cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(f".{path.name}.lock"), "ab")  # noqa: SIM115
    except OSError as error:
        raise MemtxError(
            f"The folder '{path.parent}' cannot be written to: {error.strerror}.",
            "Give another folder; that of the cache is set with --data.cache_dir PATH.",
        ) from error
    with file:
        try:
            import fcntl
        except ImportError:  # Windows: a second process repeats the work, and the last rename wins
            yield
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@contextlib.contextmanager
def progress_bar(description: str, total: int, completed: int) -> Iterator[ProgressCallback]:
    """Show bytes, rate and time left on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, completed=completed)
        yield lambda count: bar.advance(task, count)

"""Texts prepared once: a folder with a tokenizer and a token store for each split, to train on anywhere.

    FOLDER/prepared.json                  what it was made of and what is in it; written last
    FOLDER/tokenizer.json
    FOLDER/train/index.json               closes and seals the split (see memtx.data.shards)
    FOLDER/train/shard-00000.bin          tokens
    FOLDER/train/shard-00000.bin.json     its documents

The folder appears under its name when it is whole. Until then its shards wait in ``.FOLDER.building`` beside it, each
whole or absent, so that a run that was killed goes on with what it had.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from memtx import files
from memtx.data.shards import INDEX_NAME, REBUILD_HINT, TokenStore, write_index
from memtx.data.sources.document import Document, SourcePart
from memtx.data.sources.manifest import SPLITS, CorpusManifest
from memtx.data.tokenize import ProgressCallback, ShardJob, metadata_path, write_jobs
from memtx.data.tokenizer_training import file_lock, train_tokenizer
from memtx.data.tokenizers import Tokenizer, load_tokenizer
from memtx.errors import DataError, MemtxError
from memtx.files import default_cache_dir

FORMAT = "memtx.tokenized_corpus"
FORMAT_VERSION = 2
INFO_NAME = "prepared.json"
TOKENIZER_NAME = "tokenizer.json"

MAX_SHARD_BYTES = 64 << 20
"""Text bytes of a shard, so at most as many tokens; one longer document is a shard of its own."""
MIN_SHARD_BYTES = 1 << 20
"""Text bytes below which a shard is not worth a process."""

ProgressFactory = Callable[[str, int, int], AbstractContextManager[ProgressCallback]]
"""Makes from a description, the bytes in all and those done what is to be told of further ones."""

log = logging.getLogger(__name__)


class TokenizedCorpus:
    """A folder that :func:`tokenize_corpus` made.

    Args:
        folder: where it is.

    Attributes:
        name: what the texts were called.
        splits: of each split its documents, tokens, words, bytes of text, documents left out, and fingerprint.
        input_fingerprint: what tells the texts and the tokenizer apart from others.

    Raises:
        DataError: it is none, or of another version.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            note = files.read_json(self.folder / INFO_NAME)
            found = note["format"], note["version"]
            if found == (FORMAT, FORMAT_VERSION):
                self.name, self.input_fingerprint = str(note["name"]), str(note["input_fingerprint"])
                found_splits = sorted(note["splits"].items(), key=lambda one: (*SPLITS, one[0]).index(one[0]))
                self.splits: dict[str, dict[str, Any]] = {split: dict(facts) for split, facts in found_splits}
                self._tokenizer_fingerprint = str(note["tokenizer"])
        except (MemtxError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"'{folder}' is no whole prepared folder ({error}).", REBUILD_HINT) from error
        if found != (FORMAT, FORMAT_VERSION):
            raise DataError(
                f"'{folder}' is {found[0]} of version {found[1]}, this release reads {FORMAT} of {FORMAT_VERSION}.",
                REBUILD_HINT,
            )

    def read_tokenizer(self) -> Tokenizer:
        """Read the tokenizer.

        Raises:
            DataError: it is missing or damaged.
        """
        tokenizer = load_tokenizer(self.folder / TOKENIZER_NAME)
        if tokenizer.fingerprint != self._tokenizer_fingerprint:
            raise DataError(f"The tokenizer '{self.folder / TOKENIZER_NAME}' was changed.", REBUILD_HINT)
        return tokenizer

    def resolve_tokenizer(self, requested: Tokenizer | None) -> Tokenizer:
        """Return the folder's tokenizer, which must be the one asked for, or one trained as asked.

        Raises:
            DataError: it is another one.
        """
        own = self.read_tokenizer()
        if requested is None or (requested.is_trained and requested.fingerprint == own.fingerprint):
            return own
        if not requested.is_trained and type(requested) is type(own) and requested.vocab_size == own.vocab_size:
            return own
        raise DataError(
            f"'{self.folder}' was prepared with a {type(own).__name__} of {own.vocab_size} tokens, which is not the "
            f"{type(requested).__name__} of {requested.vocab_size} asked for.",
            "Leave the tokenizer out, or prepare the texts with the other one.",
        )

    def open_split(self, split: str) -> TokenStore:
        """Open the tokens of a split.

        Raises:
            DataError: there is no such split, or it is damaged.
        """
        if split not in self.splits:
            raise DataError(
                f"'{self.folder}' has no split '{split}', it has {', '.join(self.splits)}.",
                "Prepare the texts with a share for it.",
            )
        store = TokenStore(self.folder / split)
        if (store.tokenizer_fingerprint, store.fingerprint) != (
            self._tokenizer_fingerprint,
            self.splits[split].get("fingerprint"),
        ):
            raise DataError(
                f"The token store '{store.folder}' belongs to other texts or another tokenizer.", REBUILD_HINT
            )
        return store


def is_tokenized_corpus(folder: str | os.PathLike[str]) -> bool:
    """Return whether there is a prepared folder, whole or not."""
    return (Path(folder).expanduser() / INFO_NAME).is_file()


def compute_fingerprint(manifest: CorpusManifest, tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of what a folder is made of: each part's cache key and the tokenizer, or how it is trained."""
    kind = type(tokenizer)
    asked = tokenizer.fingerprint if tokenizer.is_trained else f"{kind.__qualname__} {tokenizer.vocab_size}"
    digest = hashlib.sha256(f"{FORMAT_VERSION}\n{asked}\n".encode())
    for part, shares in manifest.iter_parts():
        digest.update(f"{part.cache_key} {dict(shares)}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def open_store(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    split: str = "tokens",
    num_workers: int | None = None,
    verify: bool = False,
) -> TokenStore:
    """Open the tokens of documents in a cache, encoding them first where that was not done yet.

    A store is found again by the names, sizes and times of the files (the hash of embedded texts) and the tokenizer, so
    changed text or another tokenizer is another store. A damaged one is made again, its good shards kept.

    Args:
        documents: at least one.
        tokenizer: gives the ids; must be trained.
        cache_dir: folder of all stores; None for ``~/.cache/memtx``.
        split: the split.
        num_workers: processes; None for one a core.
        verify: compare every shard's checksum, not its size only.

    Raises:
        DataError: a text is not UTF-8 or empty.
        MemtxError: the cache cannot be written to.
    """
    source = CorpusManifest(split, {split: documents})
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    place = folder / f"{split}-{compute_fingerprint(source, tokenizer)[:16]}"
    return tokenize_corpus(place, source, tokenizer, num_workers=num_workers, verify=verify).open_split(split)


def tokenize_corpus(
    folder: str | os.PathLike[str],
    manifest: CorpusManifest,
    tokenizer: Tokenizer,
    *,
    num_workers: int | None = None,
    verify: bool = False,
    progress: ProgressFactory | None = None,
) -> TokenizedCorpus:
    """Encode a source into a folder, or open the folder where that was done.

    Killed at any moment and called again, it goes on with the shards that are whole, and what comes out is the same to
    the byte. Memory holds a piece of one text a process, and the names and lengths of one shard's documents.

    Args:
        folder: what to make; a damaged one is made again, its good shards kept.
        manifest: at least one part.
        tokenizer: gives the ids; trained on the texts of "train" first, where it is of a kind that learns.
        num_workers: processes; None for one a core.
        verify: compare the checksums of shards that are there, not their sizes only.
        progress: shows how far it is; a bar on a terminal by default.

    Raises:
        DataError: there is nothing to encode, a text cannot be used, or the folder holds something else.
        MemtxError: it cannot be written to.
    """
    place = Path(folder)
    if not manifest.splits:
        raise DataError("There are no documents to encode, expected at least one.", "Check the source of texts.")
    asked = compute_fingerprint(manifest, tokenizer)
    with file_lock(place):
        if place.exists():
            found = _open_existing(place, asked, verify)
            if found is not None:
                return found
        _build(place, manifest, tokenizer, asked, num_workers or os.cpu_count() or 1, progress or progress_bar)
    return TokenizedCorpus(place)


def _open_existing(path: Path, fingerprint: str, verify: bool) -> TokenizedCorpus | None:
    """Return what is there already; None if it is to be made again.

    Raises:
        DataError: it is something else, which is not ours to overwrite.
    """
    if not path.is_dir() or (not is_tokenized_corpus(path) and any(path.iterdir())):
        raise DataError(f"'{path}' exists and is no prepared folder.", "Give another name, or remove it.")
    try:
        found = TokenizedCorpus(path)
    except DataError as error:
        log.warning("%s Encoding it again.", error.message)
        return None
    if found.input_fingerprint != fingerprint:
        raise DataError(
            f"'{path}' was prepared from other texts, or these have changed, or with another tokenizer.",
            "Give another name, or remove it.",
        )
    try:
        found.read_tokenizer()
        for split in found.splits:
            store = found.open_split(split)
            if verify:
                store.verify()
    except DataError as error:
        log.warning("%s Encoding it again.", error.message)
        return None
    return found


def plan_shards(sizes: Sequence[int]) -> list[range]:
    """Return which parts each shard holds: about 32 shards, each of 1 to 64 MB of text, in order.

    A function of the sizes alone, so that an interrupted run finds its shards again whatever its workers.
    """
    target = min(MAX_SHARD_BYTES, max(MIN_SHARD_BYTES, sum(sizes) // 32))
    shards: list[range] = []
    start, held = 0, 0
    for place, size in enumerate(sizes):
        if place > start and held + size > target:
            shards.append(range(start, place))
            start, held = place, 0
        held += size
    return [*shards, range(start, len(sizes))]


def plan_jobs(folder: Path, manifest: CorpusManifest, tokenizer: Tokenizer) -> list[ShardJob]:
    """Return what is to be done, whatever is done already."""
    jobs: list[ShardJob] = []

    def add_jobs(parts: Sequence[SourcePart], split_fractions: Mapping[str, float], first_index: int) -> None:
        for number, places in enumerate(plan_shards([part.size for part in parts]), first_index):
            jobs.append(
                ShardJob(folder, number, [parts[place] for place in places], split_fractions, tokenizer.fingerprint)
            )

    for split, parts in manifest.split_parts.items():
        if parts:
            add_jobs(parts, {split: 1.0}, 0)
    if manifest.unsplit_parts:
        # Numbers that no split has given away yet.
        add_jobs(manifest.unsplit_parts, manifest.split_fractions, len(jobs))
    return jobs


def _build(
    path: Path,
    manifest: CorpusManifest,
    tokenizer: Tokenizer,
    fingerprint: str,
    num_workers: int,
    progress: ProgressFactory,
) -> None:
    building = path.with_name(f".{path.name}.building")
    if path.exists():
        shutil.rmtree(building, ignore_errors=True)
        os.replace(path, building)
        (building / INFO_NAME).unlink(missing_ok=True)
    building.mkdir(parents=True, exist_ok=True)
    for left in building.rglob(".*.tmp"):  # of a run that was killed
        left.unlink(missing_ok=True)
    tokenizer = train_tokenizer(tokenizer, manifest, building)
    jobs = plan_jobs(building, manifest, tokenizer)
    todo = [job for job in jobs if not job.is_complete]
    total, left_over = (sum(part.size for job in some for part in job.parts) for some in (jobs, todo))
    with progress(f"Encoding {manifest.name}", total, total - left_over) as advance:
        write_jobs(todo, tokenizer, num_workers, advance)
    shards = {
        split: [job.shard_path(split) for job in jobs if split in job.split_fractions] for split in manifest.splits
    }
    splits = {split: write_index(building / split, paths, tokenizer) for split, paths in shards.items()}
    splits = {split: facts for split, facts in splits.items() if facts["documents"]}
    if not splits:
        raise DataError(f"'{manifest.name}' holds no document with a word in it.", "Check the source of texts.")
    files.write_text(building / TOKENIZER_NAME, tokenizer.to_json())
    _prune(building, {split: shards[split] for split in splits})
    note = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "name": manifest.name,
        "input_fingerprint": fingerprint,
        "splits": splits,
    }
    files.write_json(building / INFO_NAME, {**note, "tokenizer": tokenizer.fingerprint})
    if path.exists():  # an empty folder that was made for it
        path.rmdir()
    os.replace(building, path)
    files.fsync_directory(path.parent)


def _prune(building: Path, shards: Mapping[str, Sequence[Path]]) -> None:
    """Remove what an earlier plan left, such as that of a source that has changed since."""
    kept = {building / TOKENIZER_NAME}
    for split, paths in shards.items():
        kept.add(building / split / INDEX_NAME)
        for path in paths:
            kept.add(metadata_path(path))
            if files.read_json(metadata_path(path))["size"]:
                kept.add(path)
    for path in sorted(building.rglob("*"), reverse=True):
        if path.is_dir():
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        elif path not in kept:
            path.unlink()


@contextlib.contextmanager
def progress_bar(description: str, total: int, done: int) -> Iterator[ProgressCallback]:
    """Show bytes, rate and time left on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as shown:
        task = shown.add_task(description, total=total, completed=done)
        yield lambda count: shown.advance(task, count)

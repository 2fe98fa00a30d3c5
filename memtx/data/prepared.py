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
from memtx.data.document import Document, Part
from memtx.data.encoding import Advance, Job, record_path, write_jobs
from memtx.data.fitting import fitted, locked
from memtx.data.shards import CURE, INDEX, TokenStore, write_index
from memtx.data.source import SPLITS, Source
from memtx.data.tokenizers import Tokenizer, load_tokenizer
from memtx.errors import DataError, MemtxError
from memtx.files import default_cache

FORMAT = "memtx.prepared"
FORMAT_VERSION = 1
NOTE = "prepared.json"
TOKENIZER = "tokenizer.json"

SHARD_BYTES = 64 << 20
"""Text bytes of a shard, so at most as many tokens; one longer document is a shard of its own."""
LEAST_BYTES = 1 << 20
"""Text bytes below which a shard is not worth a process."""

Progress = Callable[[str, int, int], AbstractContextManager[Advance]]
"""Makes from a description, the bytes in all and those done what is to be told of further ones."""

log = logging.getLogger(__name__)


class Prepared:
    """A folder that :func:`prepare` made.

    Args:
        folder: where it is.

    Attributes:
        name: what the texts were called.
        splits: of each split its documents, tokens, words, bytes of text, documents left out, and fingerprint.
        made_of: what tells the texts and the tokenizer apart from others.

    Raises:
        DataError: it is none, or of another version.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            note = files.read_json(self.folder / NOTE)
            found = note["format"], note["version"]
            if found == (FORMAT, FORMAT_VERSION):
                self.name, self.made_of = str(note["name"]), str(note["made_of"])
                found_splits = sorted(note["splits"].items(), key=lambda one: (*SPLITS, one[0]).index(one[0]))
                self.splits: dict[str, dict[str, Any]] = {split: dict(facts) for split, facts in found_splits}
                self._tokenizer = str(note["tokenizer"])
        except (MemtxError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"'{folder}' is no whole prepared folder ({error}).", CURE) from error
        if found != (FORMAT, FORMAT_VERSION):
            raise DataError(
                f"'{folder}' is {found[0]} of version {found[1]}, this release reads {FORMAT} of {FORMAT_VERSION}.",
                CURE,
            )

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer.

        Raises:
            DataError: it is missing or damaged.
        """
        tokenizer = load_tokenizer(self.folder / TOKENIZER)
        if tokenizer.fingerprint != self._tokenizer:
            raise DataError(f"The tokenizer '{self.folder / TOKENIZER}' was changed.", CURE)
        return tokenizer

    def agreed(self, asked: Tokenizer | None) -> Tokenizer:
        """Return the folder's tokenizer, which must be the one asked for, or one trained as asked.

        Raises:
            DataError: it is another one.
        """
        own = self.tokenizer()
        if asked is None or (asked.fitted and asked.fingerprint == own.fingerprint):
            return own
        if not asked.fitted and type(asked) is type(own) and asked.vocab_size == own.vocab_size:
            return own
        raise DataError(
            f"'{self.folder}' was prepared with a {type(own).__name__} of {own.vocab_size} tokens, which is not the "
            f"{type(asked).__name__} of {asked.vocab_size} asked for.",
            "Leave the tokenizer out, or prepare the texts with the other one.",
        )

    def store(self, split: str) -> TokenStore:
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
        if (store.tokenizer, store.fingerprint) != (self._tokenizer, self.splits[split].get("fingerprint")):
            raise DataError(f"The token store '{store.folder}' belongs to other texts or another tokenizer.", CURE)
        return store


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Return whether there is a prepared folder, whole or not."""
    return (Path(folder).expanduser() / NOTE).is_file()


def made_of(source: Source, tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of what a folder is made of: each part's stamp and the tokenizer, or how it is trained."""
    kind = type(tokenizer)
    asked = tokenizer.fingerprint if tokenizer.fitted else f"{kind.__qualname__} {tokenizer.vocab_size}"
    digest = hashlib.sha256(f"{FORMAT_VERSION}\n{asked}\n".encode())
    for part, shares in source.parts():
        digest.update(f"{part.stamp} {dict(shares)}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def open_store(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    cache: str | os.PathLike[str] | None = None,
    name: str = "tokens",
    workers: int | None = None,
    verify: bool = False,
) -> TokenStore:
    """Open the tokens of documents in a cache, encoding them first where that was not done yet.

    A store is found again by the names, sizes and times of the files (the hash of embedded texts) and the tokenizer, so
    changed text or another tokenizer is another store. A damaged one is made again, its good shards kept.

    Args:
        documents: at least one.
        tokenizer: gives the ids; must be fitted.
        cache: folder of all stores; None for ``~/.cache/memtx``.
        name: the split.
        workers: processes; None for one a core.
        verify: compare every shard's checksum, not its size only.

    Raises:
        DataError: a text is not UTF-8 or empty.
        MemtxError: the cache cannot be written to.
    """
    source = Source(name, {name: documents})
    folder = Path(cache).expanduser() if cache is not None else default_cache()
    place = folder / f"{name}-{made_of(source, tokenizer)[:16]}"
    return prepare(place, source, tokenizer, workers=workers, verify=verify).store(name)


def prepare(
    folder: str | os.PathLike[str],
    source: Source,
    tokenizer: Tokenizer,
    *,
    workers: int | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Encode a source into a folder, or open the folder where that was done.

    Killed at any moment and called again, it goes on with the shards that are whole, and what comes out is the same to
    the byte. Memory holds a piece of one text a process, and the names and lengths of one shard's documents.

    Args:
        folder: what to make; a damaged one is made again, its good shards kept.
        source: at least one part.
        tokenizer: gives the ids; trained on the texts of "train" first, where it is of a kind that learns.
        workers: processes; None for one a core.
        verify: compare the checksums of shards that are there, not their sizes only.
        progress: shows how far it is; a bar on a terminal by default.

    Raises:
        DataError: there is nothing to encode, a text cannot be used, or the folder holds something else.
        MemtxError: it cannot be written to.
    """
    place = Path(folder)
    if not source.splits:
        raise DataError("There are no documents to encode, expected at least one.", "Check the source of texts.")
    asked = made_of(source, tokenizer)
    with locked(place):
        if place.exists():
            found = _found(place, asked, verify)
            if found is not None:
                return found
        _build(place, source, tokenizer, asked, workers or os.cpu_count() or 1, progress or bar)
    return Prepared(place)


def _found(place: Path, asked: str, verify: bool) -> Prepared | None:
    """Return what is there already; None if it is to be made again.

    Raises:
        DataError: it is something else, which is not ours to overwrite.
    """
    if not place.is_dir() or (not is_prepared(place) and any(place.iterdir())):
        raise DataError(f"'{place}' exists and is no prepared folder.", "Give another name, or remove it.")
    try:
        found = Prepared(place)
    except DataError as error:
        log.warning("%s Encoding it again.", error.what)
        return None
    if found.made_of != asked:
        raise DataError(
            f"'{place}' was prepared from other texts, or these have changed, or with another tokenizer.",
            "Give another name, or remove it.",
        )
    try:
        found.tokenizer()
        for split in found.splits:
            store = found.store(split)
            if verify:
                store.verify()
    except DataError as error:
        log.warning("%s Encoding it again.", error.what)
        return None
    return found


def plan_shards(sizes: Sequence[int]) -> list[range]:
    """Return which parts each shard holds: about 32 shards, each of 1 to 64 MB of text, in order.

    A function of the sizes alone, so that an interrupted run finds its shards again whatever its workers.
    """
    target = min(SHARD_BYTES, max(LEAST_BYTES, sum(sizes) // 32))
    shards: list[range] = []
    start, held = 0, 0
    for place, size in enumerate(sizes):
        if place > start and held + size > target:
            shards.append(range(start, place))
            start, held = place, 0
        held += size
    return [*shards, range(start, len(sizes))]


def plan_jobs(folder: Path, source: Source, tokenizer: Tokenizer) -> list[Job]:
    """Return what is to be done, whatever is done already."""
    jobs: list[Job] = []

    def add(parts: Sequence[Part], shares: Mapping[str, float], first: int) -> None:
        for number, places in enumerate(plan_shards([part.size for part in parts]), first):
            jobs.append(Job(folder, number, [parts[place] for place in places], shares, tokenizer.fingerprint))

    for split, parts in source.laid_out.items():
        if parts:
            add(parts, {split: 1.0}, 0)
    if source.mixed:
        # Numbers that no split has given away yet.
        add(source.mixed, source.shares, len(jobs))
    return jobs


def _build(place: Path, source: Source, tokenizer: Tokenizer, asked: str, workers: int, progress: Progress) -> None:
    building = place.with_name(f".{place.name}.building")
    if place.exists():
        shutil.rmtree(building, ignore_errors=True)
        os.replace(place, building)
        (building / NOTE).unlink(missing_ok=True)
    building.mkdir(parents=True, exist_ok=True)
    for left in building.rglob(".*.tmp"):  # of a run that was killed
        left.unlink(missing_ok=True)
    tokenizer = fitted(tokenizer, source, building)
    jobs = plan_jobs(building, source, tokenizer)
    todo = [job for job in jobs if not job.done]
    total, left_over = (sum(part.size for job in some for part in job.parts) for some in (jobs, todo))
    with progress(f"Encoding {source.name}", total, total - left_over) as advance:
        write_jobs(todo, tokenizer, workers, advance)
    shards = {split: [job.shard(split) for job in jobs if split in job.shares] for split in source.splits}
    splits = {split: write_index(building / split, paths, tokenizer) for split, paths in shards.items()}
    splits = {split: facts for split, facts in splits.items() if facts["documents"]}
    if not splits:
        raise DataError(f"'{source.name}' holds no document with a word in it.", "Check the source of texts.")
    files.write_text(building / TOKENIZER, tokenizer.to_json())
    _prune(building, {split: shards[split] for split in splits})
    note = {"format": FORMAT, "version": FORMAT_VERSION, "name": source.name, "made_of": asked, "splits": splits}
    files.write_json(building / NOTE, {**note, "tokenizer": tokenizer.fingerprint})
    if place.exists():  # an empty folder that was made for it
        place.rmdir()
    os.replace(building, place)
    files.sync_folder(place.parent)


def _prune(building: Path, shards: Mapping[str, Sequence[Path]]) -> None:
    """Remove what an earlier plan left, such as that of a source that has changed since."""
    kept = {building / TOKENIZER}
    for split, paths in shards.items():
        kept.add(building / split / INDEX)
        for path in paths:
            kept.add(record_path(path))
            if files.read_json(record_path(path))["size"]:
                kept.add(path)
    for path in sorted(building.rglob("*"), reverse=True):
        if path.is_dir():
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        elif path not in kept:
            path.unlink()


@contextlib.contextmanager
def bar(description: str, total: int, done: int) -> Iterator[Advance]:
    """Show bytes, rate and time left on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as shown:
        task = shown.add_task(description, total=total, completed=done)
        yield lambda count: shown.advance(task, count)

"""A tokenizer trained on a corpus once, and kept where the next run finds it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from memtx.data.sources.document import SourcePart
from memtx.data.sources.manifest import CorpusManifest, assign_split
from memtx.data.tokenizers import Tokenizer, load_tokenizer
from memtx.errors import DataError, MemtxError

MAX_TRAINING_BYTES = 256 << 20
"""Text bytes from which a tokenizer is trained at most; merges no longer change with more."""

TRAIN_SPLIT = "train"


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Let one process at a time make ``path``; the empty lock file beside it stays, the lock ends with its process.

    Raises:
        MemtxError: the folder of ``path`` cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path.with_name(f".{path.name}.lock"), "ab")  # noqa: SIM115
    except OSError as error:
        raise MemtxError(
            f"The folder '{path.parent}' cannot be written to: {error.strerror}.",
            "Give one of your own, for what is kept between runs with --data.cache_dir PATH.",
        ) from error
    with handle:
        try:
            import fcntl
        except ImportError:  # Windows: a second process repeats the work, renames decide
            yield
        else:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def train_tokenizer(tokenizer: Tokenizer, manifest: CorpusManifest, folder: Path) -> Tokenizer:
    """Return the tokenizer as it is or, where it learns, trained on the texts of "train".

    Args:
        tokenizer: a kind that learns is changed.
        manifest: the texts.
        folder: where a trained one is kept, and found by the next run on the same texts.

    Raises:
        DataError: there is nothing to train it on, or a text cannot be used.
    """
    if tokenizer.is_trained:
        return tokenizer
    parts = [part for part, shares in manifest.iter_parts() if shares.get(TRAIN_SPLIT)]
    if not parts:
        raise DataError(
            f"'{manifest.name}' has no split '{TRAIN_SPLIT}' to train a tokenizer on.", "Give a trained one."
        )
    kind = type(tokenizer)
    digest = hashlib.sha256(f"{kind.__module__}.{kind.__qualname__} {tokenizer.vocab_size}\n".encode())
    for part in parts:
        digest.update(part.cache_key.encode("utf-8", "surrogatepass") + b"\n")
    path = folder / f"tokenizer-{digest.hexdigest()[:16]}.json"
    with file_lock(path):
        if path.exists():
            try:
                return load_tokenizer(path)
            except DataError:
                path.unlink()  # cut short; training gives the same again
        tokenizer.train(_sample_texts(manifest, parts))
        tokenizer.save(path)
    return tokenizer


def _sample_texts(manifest: CorpusManifest, parts: list[SourcePart]) -> Iterator[str]:
    """Yield whole texts spread evenly over the parts, up to ``MAX_TRAINING_BYTES``."""
    stride = -(-sum(part.size for part in parts) // MAX_TRAINING_BYTES)
    whole = {id(part) for part in manifest.split_parts.get(TRAIN_SPLIT, ())}
    left = MAX_TRAINING_BYTES
    for part in parts[:: max(1, stride)]:
        for document in part.iter_documents():
            if id(part) not in whole and assign_split(document.id, manifest.split_fractions) != TRAIN_SPLIT:
                continue
            for text in document.iter_text():
                yield text
                left -= len(text)
                if left <= 0:
                    return

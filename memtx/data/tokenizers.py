"""Tokenizers: text <-> ids, with one extra id that begins every document.

Text is encoded piece by piece (memtx.data.text_chunks), so that ids never depend on how a text arrived, and a text that
happens to spell a special token is plain text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memtx import files
from memtx.data.text_chunks import TextSplitter, split_text
from memtx.errors import DataError, MemtxError

TokenIds = NDArray[np.integer[Any]]

FORMAT_VERSION = 1
BOS_TOKEN = "<|begin|>"
_KNOWN_BOS_TOKENS = (BOS_TOKEN, "<|begin_of_text|>", "<|endoftext|>", "<s>", "<bos>", "[CLS]")


class Tokenizer(ABC):
    """Text <-> ids below ``vocab_size``; ``bos_token_id`` stands before every document and is no text."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Rows an embedding needs: one more than the largest id."""

    @property
    @abstractmethod
    def bos_token_id(self) -> int:
        """The id that begins a document."""

    @abstractmethod
    def encode_chunk(self, chunk: str) -> TokenIds:
        """Return the ids of one piece of text, (tokens,) of an integer dtype.

        Raises:
            DataError: the text holds a lone surrogate, which no UTF-8 text can.
        """

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes a token stands for (part of a character at times); empty for ``bos_token_id``.

        Raises:
            DataError: the id is not below ``vocab_size``.
        """

    @abstractmethod
    def to_json(self) -> str:
        """Return all there is to the tokenizer as JSON text; :func:`tokenizer_from_json` reads it."""

    @property
    def is_trained(self) -> bool:
        """Whether it can encode; False for one that must see the corpus first."""
        return True

    def train(self, texts: Iterable[str]) -> None:  # noqa: B027  (most kinds have nothing to learn)
        """Learn from texts, where the kind learns; the same texts give the same ids."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of :meth:`to_json`: equal exactly for tokenizers that give the same ids."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def encode_chunks(self, chunks: Sequence[str]) -> list[TokenIds]:
        """Return the ids of several pieces, each as :meth:`encode_chunk` gives them."""
        return [self.encode_chunk(piece) for piece in chunks]

    def encode(self, text: str) -> TokenIds:
        """Return the ids of a text, (tokens,), without ``bos_token_id``: its pieces' ids one after another."""
        return _concatenate(self.encode_chunks(split_text(text)))

    def encode_stream(self, texts: Iterable[str]) -> Iterator[TokenIds]:
        """Encode a text that arrives in any portions, at bounded memory; the ids joined are those of the whole."""
        splitter = TextSplitter()
        for text in texts:
            if pieces := splitter.feed(text):
                yield _concatenate(self.encode_chunks(pieces))
        if pieces := splitter.flush():
            yield _concatenate(self.encode_chunks(pieces))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in ids).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a file, whole or not at all."""
        files.write_text(path, self.to_json())


class ByteTokenizer(Tokenizer):
    """Every UTF-8 byte is a token, 256 begins a document: 257 ids, nothing to train, any text."""

    @property
    def vocab_size(self) -> int:
        """257: the bytes and ``bos_token_id``."""
        return 257

    @property
    def bos_token_id(self) -> int:
        """256."""
        return 256

    def encode_chunk(self, chunk: str) -> TokenIds:
        """Return the piece's UTF-8 bytes, (bytes,) uint16."""
        return np.frombuffer(encode_utf8(chunk), dtype=np.uint8).astype(np.uint16)

    def encode_stream(self, texts: Iterable[str]) -> Iterator[TokenIds]:
        """Encode a text that arrives in any portions; bytes need no pieces."""
        return map(self.encode_chunk, texts)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the byte itself; empty for 256."""
        _check_token_id(token_id, self.vocab_size)
        return bytes([token_id]) if token_id < 256 else b""

    def to_json(self) -> str:
        """Return the kind; there is nothing else."""
        return _to_json("byte")


class BytePairTokenizer(Tokenizer):
    """Byte-level byte-pair encoding, trained on the corpus, or any ``tokenizer.json`` as it is.

    Args:
        vocab_size: ids to reach in training, the 256 bytes and ``<|begin|>`` among them; at least 257. A small corpus
            may yield fewer, the size stays as asked. Not used with ``path``.
        path: a ``tokenizer.json`` of the tokenizers library (any Hugging Face one); its ids are kept. A begin token is
            found in it (``<|begin|>``, ``<|begin_of_text|>``, ``<|endoftext|>``, ``<s>``, ``<bos>``, ``[CLS]``), or
            ``<|begin|>`` is added as a new last id.

    Raises:
        DataError: ``vocab_size`` is below 257, or the file is missing or not a tokenizer.
    """

    def __init__(self, vocab_size: int = 8192, path: str | None = None) -> None:
        self._backend: Any = None
        self._vocab_size = vocab_size
        if path is not None:
            self._set_backend(parse_tokenizer(read_tokenizer_file(path), str(path)), None)
        elif vocab_size < 257:
            raise DataError(
                f"vocab_size is {vocab_size}, expected at least 257 (256 bytes and {BOS_TOKEN}).",
                "Give a larger one, for example 8192.",
            )

    def _set_backend(self, backend: Any, vocab_size: int | None) -> None:
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        name = next((name for name in _KNOWN_BOS_TOKENS if name in vocabulary), None)
        if name is None:
            from tokenizers import AddedToken

            backend.add_special_tokens([AddedToken(BOS_TOKEN, special=True)])
            name, vocabulary = BOS_TOKEN, backend.get_vocab(with_added_tokens=True)
        # A text that spells "<|begin|>" is text, not the beginning of a document.
        backend.encode_special_tokens = True
        self._backend = backend
        self._bos_token_id = vocabulary[name]
        self._vocab_size = max(vocab_size or 0, max(vocabulary.values()) + 1)
        self._id_to_bytes = _build_id_to_bytes(backend, vocabulary)
        self._id_to_bytes[self._bos_token_id] = b""

    @property
    def is_trained(self) -> bool:
        """Whether it was trained or read."""
        return self._backend is not None

    @property
    def vocab_size(self) -> int:
        """The size asked for, or that of the file; known before training."""
        return self._vocab_size

    @property
    def bos_token_id(self) -> int:
        """The id of the begin token: 0 in a trained one."""
        return self._bos_token_id if self.is_trained else 0

    def train(self, texts: Iterable[str]) -> None:
        """Train on texts; does nothing where there are ids already.

        Args:
            texts: texts in any portions; each is split into pieces by itself.
        """
        if self.is_trained:
            return
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self._vocab_size,
            special_tokens=[BOS_TOKEN],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator((piece for text in texts for piece in split_text(text)), trainer=trainer)
        self._set_backend(backend, self._vocab_size)

    def encode_chunk(self, chunk: str) -> TokenIds:
        """Return the ids of one piece, (tokens,) uint32."""
        return self.encode_chunks([chunk])[0]

    def encode_chunks(self, chunks: Sequence[str]) -> list[TokenIds]:
        """Return the ids of several pieces, encoded in parallel by the library, each (tokens,) uint32."""
        try:
            encoded = self._require_backend().encode_batch_fast(list(chunks), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for piece in chunks:
                encode_utf8(piece)
            raise
        return [np.array(one.ids, dtype=np.uint32) for one in encoded]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; empty for ``bos_token_id`` and for ids that training did not reach."""
        self._require_backend()
        _check_token_id(token_id, self._vocab_size)
        return self._id_to_bytes.get(token_id, b"")

    def to_json(self) -> str:
        """Return the size and the library's own description."""
        return _to_json("bpe", vocab_size=self._vocab_size, model=json.loads(self._require_backend().to_str()))

    def _require_backend(self) -> Any:
        if self._backend is None:
            raise DataError(
                "This BytePairTokenizer was not trained yet.",
                "Call train(texts), let BookDataModule.prepare_data do it, or load one with path=.",
            )
        return self._backend

    def __getstate__(self) -> dict[str, Any]:
        # The library's object pickles without `encode_special_tokens`; our own text keeps everything.
        return {"size": self._vocab_size, "text": self.to_json() if self.is_trained else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._backend, self._vocab_size = None, state["size"]
        if state["text"] is not None:
            self.__dict__.update(vars(tokenizer_from_json(state["text"])))


def tokenizer_from_json(text: str) -> Tokenizer:
    """Return the tokenizer that :meth:`Tokenizer.to_json` wrote down; nothing in the text is executed.

    Raises:
        DataError: the text is not such a description, or of a version this release does not read.
    """
    try:
        value = json.loads(text)
        kind, version = value["kind"], value["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "The text describes no memtx tokenizer.", "For another library's file use BytePairTokenizer(path=...)."
        ) from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"The tokenizer has format version {version}, this release reads {FORMAT_VERSION}.",
            "Use the release that wrote it.",
        )
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe" and isinstance(value.get("vocab_size"), int):
        tokenizer = BytePairTokenizer(max(value["vocab_size"], 257))
        tokenizer._set_backend(parse_tokenizer(json.dumps(value.get("model")), "the tokenizer"), value["vocab_size"])
        return tokenizer
    raise DataError(f"The tokenizer's kind is '{kind}', expected 'byte' or 'bpe'.", "Use the release that wrote it.")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer: one saved by :meth:`Tokenizer.save`, or any library's ``tokenizer.json``.

    Raises:
        DataError: the file is missing or is no tokenizer.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The tokenizer '{path}' cannot be read: {error}.", "Check the path.") from error
    try:
        return tokenizer_from_json(text)
    except MemtxError:
        if '"format": "memtx.tokenizer"' in text:
            raise
    return BytePairTokenizer(path=str(path))


def _to_json(kind: str, **facts: Any) -> str:
    value = {"format": "memtx.tokenizer", "version": FORMAT_VERSION, "kind": kind, **facts}
    return json.dumps(value, ensure_ascii=False)


def _concatenate(parts: list[TokenIds]) -> TokenIds:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)


def read_tokenizer_file(path: str) -> str:
    """Return the text of a tokenizer's file; raises DataError."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The tokenizer '{path}' cannot be read: {error}.", "Check the path.") from error


def encode_utf8(text: str) -> bytes:
    """Return a text's bytes; raises DataError where it holds half a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"The text holds U+{ord(text[error.start]):04X}, half of a surrogate pair, which is no character.",
            "Remove it or decode the source as UTF-16.",
        ) from error


def _check_token_id(token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise DataError(
            f"Token {token_id} is not in the vocabulary, expected 0 to {vocab_size - 1}.", "Check the tokenizer."
        )


def parse_tokenizer(text: str, name: str) -> Any:
    """Return the library's tokenizer of a ``tokenizer.json``'s text; raises DataError."""
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"'{name}' is not a tokenizer.json: {error}.", "Give one of the tokenizers library.") from error


def _build_id_to_bytes(backend: Any, vocabulary: dict[str, int]) -> dict[int, bytes]:
    """Return the bytes of every id, read from the vocabulary's spelling: byte-level, or SentencePiece's."""
    byte_level = '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))
    alphabet = _byte_alphabet()
    added = {token for token, _ in _added_tokens(backend)}
    table: dict[int, bytes] = {}
    for token, index in vocabulary.items():
        if index in added:
            table[index] = token.encode("utf-8")
        elif byte_level:
            table[index] = bytes(alphabet[letter] for letter in token if letter in alphabet)
        elif len(token) == 6 and token.startswith("<0x"):
            table[index] = bytes([int(token[3:5], 16)])
        else:
            table[index] = token.replace("\u2581", " ").encode("utf-8")
    return table


def _added_tokens(backend: Any) -> list[tuple[int, Any]]:
    return list(backend.get_added_tokens_decoder().items())


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable spelling of the 256 bytes: the printable Latin-1 ones as they are, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + place): byte for place, byte in zip(itertools.count(), rest)})
    return table

"""Tokenizers: text to ids and back, with one extra id that begins every document.

Text is encoded chunk by chunk (:mod:`memtx.data.text_chunks`), so ids never depend on how a text arrived. A text that
happens to spell a special token is plain text.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from memtx import files
from memtx.data.encodings import encode_utf8
from memtx.data.end_tokens import read_eos_token_ids
from memtx.data.text_chunks import TextSplitter, split_text
from memtx.errors import DataError, MemtxError

TokenIds = NDArray[np.integer[Any]]

FORMAT, FORMAT_VERSION = "memtx.tokenizer", 1
HF_FORMAT, HF_FORMAT_VERSION = "memtx.hf_tokenizer", 2
_FORMAT_VERSIONS = {FORMAT: FORMAT_VERSION, HF_FORMAT: HF_FORMAT_VERSION}
BOS_TOKEN = "<|begin|>"
EOS_KEY = "eos_token_ids"


class Tokenizer(ABC):
    """Base of all tokenizers. Ids are below ``vocab_size``; ``bos_token_id`` begins every document and is no text.

    Attributes:
        eos_token_ids: Ids at which a generated text ends; empty if the model was not trained to end a text.
    """

    eos_token_ids: frozenset[int] = frozenset()

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of embeddings a model needs: one more than the largest id."""

    @property
    @abstractmethod
    def bos_token_id(self) -> int:
        """Id that begins a document."""

    @abstractmethod
    def encode_chunk(self, chunk: str) -> TokenIds:
        """Return the ids of one chunk, ``(tokens,)`` of an integer dtype; raises DataError for a lone surrogate."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of a token (maybe part of a character); empty for ``bos_token_id``.

        Raises DataError if the id is not below ``vocab_size``.
        """

    @abstractmethod
    def to_json(self) -> str:
        """Return the whole tokenizer as JSON text, which :func:`tokenizer_from_json` reads."""

    @property
    def is_trained(self) -> bool:
        """True if it can encode; False if it must be trained first."""
        return True

    def train(self, texts: Iterable[str]) -> None:  # noqa: B027  (most kinds have nothing to learn)
        """Learn the vocabulary from texts, if there is one to learn; the same texts give the same ids."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of :meth:`to_json`; equal only for tokenizers that give the same ids."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def encode_chunks(self, chunks: Sequence[str]) -> list[TokenIds]:
        """Return the ids of several chunks, each as :meth:`encode_chunk` gives them."""
        return [self.encode_chunk(chunk) for chunk in chunks]

    def encode(self, text: str) -> TokenIds:
        """Return the ids of a text, ``(tokens,)``, without ``bos_token_id``."""
        return _concatenate(self.encode_chunks(split_text(text)))

    def encode_stream(self, texts: Iterable[str]) -> Iterator[TokenIds]:
        """Encode a text that arrives in any portions, in bounded memory; the ids joined equal :meth:`encode`."""
        splitter = TextSplitter()
        for text in texts:
            if chunks := splitter.feed(text):
                yield _concatenate(self.encode_chunks(chunks))
        if chunks := splitter.flush():
            yield _concatenate(self.encode_chunks(chunks))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return b"".join(self.token_bytes(int(token_id)) for token_id in ids).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a file, atomically."""
        files.write_text(path, self.to_json())

    def _check_token_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            message = f"Token {token_id} is not in the vocabulary, expected 0 to {self.vocab_size - 1}."
            raise DataError(message, "Use the tokenizer that made it.")


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte, and 256 to begin a document: 257 ids, no training, any text."""

    vocab_size = 257
    bos_token_id = 256

    def encode_chunk(self, chunk: str) -> TokenIds:
        """Return the UTF-8 bytes of a chunk, ``(bytes,)`` uint16."""
        return np.frombuffer(encode_utf8(chunk), dtype=np.uint8).astype(np.uint16)

    def encode_stream(self, texts: Iterable[str]) -> Iterator[TokenIds]:
        """Encode a text that arrives in any portions; bytes need no chunks."""
        return map(self.encode_chunk, texts)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the byte itself; empty for 256."""
        self._check_token_id(token_id)
        return bytes([token_id]) if token_id < 256 else b""

    def to_json(self) -> str:
        """Return the tokenizer as JSON text."""
        return json.dumps({"format": FORMAT, "version": FORMAT_VERSION, "kind": "byte"})


class BackendTokenizer(Tokenizer):
    """Base of tokenizers that the ``tokenizers`` library runs; the library's object is their ``_backend``.

    It keeps the ids of ``path``, a ``tokenizer.json`` of the library; without one ``vocab_size`` ids are trained.
    """

    # Usual spellings of each special token; if none is in the vocabulary, the first one is added as a new last id.
    SPECIAL_TOKENS: ClassVar[Mapping[str, tuple[str, ...]]]
    JSON_HEADER: ClassVar[Mapping[str, str | int]]  # format, version and kind in the JSON text

    def __init__(self, vocab_size: int, path: str | None = None) -> None:
        self._backend: Any = None
        self._vocab_size = vocab_size
        self._special_token_ids: dict[str, int] = {}
        if path is not None:
            self._set_backend(_parse_backend(_read_tokenizer_file(path), str(path)))
            vocabulary = self._require_backend().get_vocab(with_added_tokens=True)
            self.eos_token_ids = read_eos_token_ids(Path(path).parent, vocabulary)

    @classmethod
    def from_backend_json(cls, text: str, vocab_size: int) -> Self:
        """Return a trained tokenizer from the library's JSON text and its own vocabulary size."""
        tokenizer = cls.__new__(cls)
        BackendTokenizer.__init__(tokenizer, vocab_size)
        tokenizer._set_backend(_parse_backend(text, "the tokenizer"))
        return tokenizer

    def _set_backend(self, backend: Any) -> None:
        from tokenizers import AddedToken

        # Truncation and padding are not the tokenizer's to decide.
        backend.no_truncation()
        backend.no_padding()
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        for name, spellings in self.SPECIAL_TOKENS.items():
            token = next((token for token in spellings if token in vocabulary), None)
            if token is None:
                token = spellings[0]
                backend.add_special_tokens([AddedToken(token, special=True)])
                vocabulary = backend.get_vocab(with_added_tokens=True)
            self._special_token_ids[name] = vocabulary[token]
        # A text that spells a special token is text.
        backend.encode_special_tokens = True
        self._backend = backend
        self._vocab_size = max(self._vocab_size, max(vocabulary.values()) + 1)
        self._id_to_bytes = _build_id_to_bytes(backend, vocabulary)
        self._id_to_bytes.update(dict.fromkeys(self._special_token_ids.values(), b""))

    @property
    def is_trained(self) -> bool:
        """True if it was trained or read from a file."""
        return self._backend is not None

    @property
    def vocab_size(self) -> int:
        """The requested size, or that of the file; known before training."""
        return self._vocab_size

    def encode_chunk(self, chunk: str) -> TokenIds:
        """Return the ids of one chunk, ``(tokens,)`` uint32."""
        return self.encode_chunks([chunk])[0]

    def encode_chunks(self, chunks: Sequence[str]) -> list[TokenIds]:
        """Return the ids of several chunks, encoded in parallel by the library, each ``(tokens,)`` uint32."""
        try:
            encodings = self._require_backend().encode_batch_fast(list(chunks), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for chunk in chunks:
                encode_utf8(chunk)
            raise
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; empty for special tokens and for ids that training did not reach."""
        self._require_backend()
        self._check_token_id(token_id)
        return self._id_to_bytes.get(token_id, b"")

    def to_json(self) -> str:
        """Return the vocabulary size, the end tokens and the library's JSON as one JSON text."""
        return self._to_json({EOS_KEY: sorted(self.eos_token_ids)} if self.eos_token_ids else {})

    @property
    def fingerprint(self) -> str:
        """SHA-256 of :meth:`to_json` without the end tokens, which do not change the ids of a text."""
        return hashlib.sha256(self._to_json({}).encode("utf-8")).hexdigest()

    def _to_json(self, options: Mapping[str, Any]) -> str:
        model = json.loads(self._require_backend().to_str())
        description = {**self.JSON_HEADER, "vocab_size": self._vocab_size, **options, "model": model}
        return json.dumps(description, ensure_ascii=False)

    def _require_backend(self) -> Any:
        if self._backend is None:
            raise DataError(
                f"This {type(self).__name__} is not trained yet.",
                "Call train(texts), let the data module's prepare_data do it, or load a tokenizer.json with path=.",
            )
        return self._backend

    def __getstate__(self) -> dict[str, Any]:
        # The library's object pickles without `encode_special_tokens`.
        return {**vars(self), "_backend": self._backend.to_str() if self.is_trained else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._backend is not None:
            self._backend = _parse_backend(self._backend, "the tokenizer")
            self._backend.encode_special_tokens = True


class SpecialTokenId:
    """Attribute of a :class:`BackendTokenizer`: the id of a special token; raises DataError before training."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: BackendTokenizer, owner: type) -> int:
        tokenizer._require_backend()
        return tokenizer._special_token_ids[self.name]


class BytePairTokenizer(BackendTokenizer):
    """Byte-level byte-pair encoding, trained on the corpus, or any ``tokenizer.json``.

    Raises DataError if ``vocab_size`` is below 257, or the file is missing or is not a tokenizer.

    Args:
        vocab_size: Number of ids to train, with the 256 bytes and ``<|begin|>``; at least 257. A small corpus may yield
            fewer, the vocabulary size stays as requested. Not used with ``path``.
        path: A ``tokenizer.json`` of the ``tokenizers`` library (any Hugging Face one), whose ids are kept. The begin
            token is ``<|begin|>``, ``<|begin_of_text|>``, ``<|endoftext|>``, ``<s>``, ``<bos>`` or ``[CLS]``, whichever
            it has, or ``<|begin|>`` as a new last id.
    """

    SPECIAL_TOKENS = {"bos": (BOS_TOKEN, "<|begin_of_text|>", "<|endoftext|>", "<s>", "<bos>", "[CLS]")}  # noqa: RUF012
    JSON_HEADER = {"format": FORMAT, "version": FORMAT_VERSION, "kind": "bpe"}  # noqa: RUF012

    def __init__(self, vocab_size: int = 8192, path: str | None = None) -> None:
        if path is None and vocab_size < 257:
            message = f"vocab_size is {vocab_size}, expected at least 257 (256 bytes and {BOS_TOKEN})."
            raise DataError(message, "Give a larger one, for example 8192.")
        super().__init__(vocab_size if path is None else 0, path)

    @property
    def bos_token_id(self) -> int:
        """Id of the begin token: 0 in a trained tokenizer."""
        return self._special_token_ids["bos"] if self.is_trained else 0

    def train(self, texts: Iterable[str]) -> None:
        """Train on texts in any portions, each split into chunks; does nothing if the tokenizer is trained."""
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
        backend.train_from_iterator((chunk for text in texts for chunk in split_text(text)), trainer=trainer)
        self._set_backend(backend)


def tokenizer_from_json(text: str) -> Tokenizer:
    """Return the tokenizer that :meth:`Tokenizer.to_json` wrote; nothing in the text is executed.

    Raises DataError if the text is not such a description, or of a version that this release does not read.
    """
    try:
        value = json.loads(text)
        version, expected = value["version"], _FORMAT_VERSIONS[value["format"]]
    except (ValueError, KeyError, TypeError) as error:
        message = "The text describes no memtx tokenizer."
        raise DataError(message, "For another library's file use BytePairTokenizer(path=...).") from error
    if version != expected:
        message = f"The tokenizer has format version {version}, this release reads {expected}."
        raise DataError(message, "Use the release that wrote it.")
    if (kind := value.get("kind")) == "byte":
        return ByteTokenizer()
    tokenizer_class: type[BackendTokenizer] = BytePairTokenizer
    if value["format"] == HF_FORMAT:
        from memtx.data.hf_tokenizers import HFTokenizer

        tokenizer_class = HFTokenizer
    elif kind != "bpe":
        message = f"The tokenizer's kind is '{kind}', expected 'byte' or 'bpe'."
        raise DataError(message, "Use the release that wrote it.")
    if not isinstance(vocab_size := value.get("vocab_size"), int):
        raise DataError(f"The tokenizer's vocab_size is {vocab_size}, expected a number.", "Restore it from a copy.")
    tokenizer = tokenizer_class.from_backend_json(json.dumps(value.get("model")), vocab_size)
    eos_token_ids = value.get(EOS_KEY, [])
    if not isinstance(eos_token_ids, list) or not all(isinstance(token_id, int) for token_id in eos_token_ids):
        raise DataError(f"The tokenizer's {EOS_KEY} is {eos_token_ids!r}, expected ids.", "Restore it from a copy.")
    tokenizer.eos_token_ids = frozenset(eos_token_ids)
    return tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a file of :meth:`Tokenizer.save` or any ``tokenizer.json``; raises DataError if it is missing or neither."""
    text = _read_tokenizer_file(path)
    try:
        return tokenizer_from_json(text)
    except MemtxError:
        if '"format": "memtx.' in text:
            raise
    return BytePairTokenizer(path=str(path))


def _concatenate(parts: list[TokenIds]) -> TokenIds:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)


def _read_tokenizer_file(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The tokenizer '{path}' cannot be read: {error}.", "Check the path.") from error


def _parse_backend(text: str, name: str) -> Any:
    """Return the library's tokenizer from the text of a ``tokenizer.json``; raises DataError."""
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(text)
    except Exception as error:  # the library raises bare Exception
        message = f"'{name}' is not a tokenizer.json: {error}."
        raise DataError(message, "Give a file of the tokenizers library.") from error


def _build_id_to_bytes(backend: Any, vocabulary: dict[str, int]) -> dict[int, bytes]:
    """Return the bytes of every id from its spelling: byte-level, WordPiece's (``##``) or SentencePiece's."""
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder"))
    alphabet, added = _byte_alphabet(), set(backend.get_added_tokens_decoder())
    id_to_bytes: dict[int, bytes] = {}
    for token, token_id in vocabulary.items():
        if token_id in added:
            id_to_bytes[token_id] = token.encode("utf-8")
        elif '"ByteLevel"' in decoder:
            id_to_bytes[token_id] = bytes(alphabet[letter] for letter in token if letter in alphabet)
        elif '"WordPiece"' in decoder:
            id_to_bytes[token_id] = (token[2:] if token.startswith("##") else f" {token}").encode("utf-8")
        elif len(token) == 6 and token.startswith("<0x"):
            id_to_bytes[token_id] = bytes([int(token[3:5], 16)])
        else:
            id_to_bytes[token_id] = token.replace("\u2581", " ").encode("utf-8")
    return id_to_bytes


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's spelling of the 256 bytes: printable Latin-1 as it is, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}

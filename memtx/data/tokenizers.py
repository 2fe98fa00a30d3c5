"""Tokenizers: text to ids and back, with an extra id that begins every document.

A text is encoded in chunks (:mod:`memtx.data.safe_cuts`), however it arrives, and its ids are those that the
``tokenizers`` library gives for all of it at once. A text that happens to spell a special token is plain text, unless
special tokens are parsed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from memtx.data.base_tokenizer import ChunkEncoder, EncodedChunk, TextEncoder, TokenIds, Tokenizer
from memtx.data.encodings import encode_utf8
from memtx.data.end_tokens import read_eos_token_ids, read_stop_strings
from memtx.data.safe_cuts import CutFinder, SafeSplitter, TextChunk
from memtx.data.text_chunks import split_text
from memtx.data.token_decoder import TextDecoder, TokenSpeller
from memtx.data.tokenizer_files import (
    TOKENIZER_FILE,
    encoding_backend,
    parse_backend,
    read_backend,
    read_bos_token_id,
    read_text,
)
from memtx.data.word_tokenizer import WordTokenizer
from memtx.data.words import WordIds, WordSplitter
from memtx.errors import DataError, MemtxError

__all__ = ["BackendTokenizer", "BytePairTokenizer", "ByteTokenizer", "SpecialTokenId", "TokenIds", "Tokenizer"]
__all__ += ["WordTokenizer", "load_tokenizer", "tokenizer_from_json"]

FORMAT, FORMAT_VERSION = "memtx.tokenizer", 1
HF_FORMAT, HF_FORMAT_VERSION = "memtx.hf_tokenizer", 2
_FORMAT_VERSIONS = {FORMAT: FORMAT_VERSION, HF_FORMAT: HF_FORMAT_VERSION}
BOS_TOKEN = "<|begin|>"
_EARLIER_BOS_TOKENS = ("<|begin_of_text|>", "<|endoftext|>", "<s>", "<bos>", "[CLS]")
MASK_TOKENS = ("[MASK]", "<mask>")
BOS_KEY, EOS_KEY, STOP_KEY = "bos_token_id", "eos_token_ids", "stop_strings"


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte, and 256 to begin a document: 257 ids, no training, any text."""

    vocab_size = 257
    bos_token_id = 256

    def encode_chunk(self, chunk: str) -> TokenIds:
        """Return the UTF-8 bytes of a chunk, ``(bytes,)`` uint16."""
        return np.frombuffer(encode_utf8(chunk), dtype=np.uint8).astype(np.uint16)

    def encode_stream(self, texts: Iterable[str], *, parse_special: bool = False) -> Iterator[TokenIds]:
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
            self._set_backend(read_backend(path))
            folder = Path(path) if Path(path).is_dir() else Path(path).parent
            self._read_files(folder)

    def _read_files(self, folder: Path) -> None:
        """Read what the files beside the tokenizer say of it."""
        self.eos_token_ids = read_eos_token_ids(folder, self._require_backend().get_vocab(with_added_tokens=True))
        self.stop_strings = read_stop_strings(folder)

    @classmethod
    def from_backend_json(cls, text: str, vocab_size: int) -> Self:
        """Return a trained tokenizer from the library's JSON text and its own vocabulary size."""
        tokenizer = cls.__new__(cls)
        BackendTokenizer.__init__(tokenizer, vocab_size)
        tokenizer._set_backend(parse_backend(text, "the tokenizer"))
        return tokenizer

    def _set_backend(self, backend: Any) -> None:
        from tokenizers import AddedToken

        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        # Of several spellings, the file's post-processor uses the one that is meant.
        used = backend.encode("").tokens if self.SPECIAL_TOKENS else ()
        for name, spellings in self.SPECIAL_TOKENS.items():
            known = [token for token in spellings if token in vocabulary]
            token = next((token for token in known if token in used), known[0] if known else "")
            if not token:
                backend.add_special_tokens([AddedToken(token := spellings[0], special=True)])
                vocabulary = backend.get_vocab(with_added_tokens=True)
            self._special_token_ids[name] = vocabulary[token]
        if not vocabulary:
            raise DataError("The tokenizer has an empty vocabulary.", "Give a trained one.")
        self._backend = backend
        self._vocab_size = max(self._vocab_size, max(vocabulary.values()) + 1)
        self._build()

    def _build(self) -> None:
        """Build what encodes and decodes: the library's object for texts, its cuts and the spelling of tokens."""
        text = self._backend.to_str()
        description = json.loads(text)
        self._speller = TokenSpeller(self._backend, description)
        for token_id in self._special_token_ids.values():
            self._speller.hide(token_id)
        self._words = WordSplitter(self._backend, description, self._speller.token_bytes)
        self._finders = {False: self._build_finder(text, description, parse_special=False)}

    def _build_finder(self, text: str, description: Mapping[str, Any], *, parse_special: bool) -> CutFinder:
        tokens = self._backend.get_added_tokens_decoder().values()
        added_tokens = {token.content: token.normalized for token in tokens if parse_special or not token.special}
        return CutFinder(encoding_backend(text, parse_special=parse_special), description, added_tokens)

    def find_tokens(self, spellings: Iterable[str]) -> list[int]:
        """Return the ids of those of these tokens that the vocabulary has."""
        ids = map(self._require_backend().token_to_id, spellings)
        return [token_id for token_id in ids if token_id is not None]

    @property
    def is_trained(self) -> bool:
        """True if it was trained or read from a file."""
        return self._backend is not None

    @property
    def vocab_size(self) -> int:
        """The requested size, or that of the file; known before training."""
        return self._vocab_size

    def encode_chunk(self, chunk: str) -> TokenIds:
        """Return the ids of a text encoded at once, ``(tokens,)`` uint32."""
        return self._encode_chunks([TextChunk(chunk)])[0]

    def encoder(self, *, pending: str = "", continues: bool = False, parse_special: bool = False) -> TextEncoder:
        """Return an encoder of one text, whose chunks the library encodes in parallel; ids are uint32."""
        splitter = SafeSplitter(self._finder(parse_special), pending, continues)
        return ChunkEncoder(splitter, lambda chunks: self._encode_chunks(chunks, parse_special))

    def _finder(self, parse_special: bool) -> CutFinder:
        self._require_backend()
        if parse_special not in self._finders:
            text = self._backend.to_str()
            self._finders[parse_special] = self._build_finder(text, json.loads(text), parse_special=parse_special)
        return self._finders[parse_special]

    def _encoding_backend(self) -> Any:
        """Return the library's object that encodes texts: special tokens are plain, offsets not trimmed."""
        return self._finder(parse_special=False).backend

    def _encode_chunks(self, chunks: Sequence[TextChunk], parse_special: bool = False) -> list[TokenIds]:
        try:
            encoded = self._finder(parse_special).encode(chunks)
        except (TypeError, UnicodeEncodeError):
            for chunk in chunks:
                encode_utf8(chunk.text)
            raise
        return [np.array(encoding.ids[tokens], dtype=np.uint32) for encoding, tokens in encoded]

    def align(self, encoded: EncodedChunk) -> list[bytes]:
        """Return the bytes of the text that each token of a chunk stands for; they add up to the chunk."""
        chunk, ids = encoded
        contents = super().align(encoded)
        if b"".join(contents) == chunk.text.encode("utf-8"):
            return contents
        for parse_special in (False, True):
            ((encoding, tokens),) = self._finder(parse_special).encode([chunk], with_offsets=True)
            if encoding.ids[tokens] == ids.tolist():
                token_starts = [start - len(chunk.left) for start, _ in encoding.offsets[tokens]]
                return _cut_at(chunk.text, token_starts)
        raise AssertionError("the ids are not those of the chunk")

    def decoder(self, *, continues: bool = False, pending: bytes = b"") -> TextDecoder:
        """Return a decoder of the tokens of one text, as they come, by the decoder of the library."""
        self._require_backend()
        return self._speller.decoder(continues=continues, pending=pending)

    def token_contents(self, ids: Sequence[int], *, continues: bool) -> list[bytes]:
        """Return the bytes of each token of a text, or of a part of one that ``continues`` other tokens."""
        contents = [self._speller.token_bytes(token_id) for token_id in ids]
        if not continues:
            for index, token_id in enumerate(ids):
                if self._speller.spelling(token_id) is not None:  # special tokens may come before it
                    contents[index] = self._speller.first_token_bytes(token_id)
                    break
        return contents

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; empty for special tokens and for ids that training did not reach."""
        self._require_backend()
        self._check_token_id(token_id)
        return self._speller.token_bytes(token_id)

    def word_ids(self, ids: Sequence[int]) -> WordIds:
        """Return the index of each token's word, ``(tokens,)`` int64; special tokens are words of their own."""
        self._require_backend()
        return self._words.word_ids(ids)

    def to_json(self) -> str:
        """Return the vocabulary size, where a text ends, and the library's JSON as one JSON text."""
        ends = {EOS_KEY: sorted(self.eos_token_ids), STOP_KEY: list(self.stop_strings)}
        return self._to_json({key: values for key, values in ends.items() if values})

    def _restore(self, description: Mapping[str, Any]) -> None:
        """Restore what :meth:`to_json` wrote beside the library's JSON."""
        for key, kind, expected in ((EOS_KEY, int, "ids"), (STOP_KEY, str, "strings")):
            values = description.get(key, [])
            if not isinstance(values, list) or not all(isinstance(value, kind) for value in values) or "" in values:
                raise DataError(f"The tokenizer's {key} is {values!r}, expected {expected}.", "Restore it from a copy.")
        self.eos_token_ids = frozenset(description.get(EOS_KEY, []))
        self.stop_strings = tuple(description.get(STOP_KEY, []))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of :meth:`to_json` without what ends a text, which does not change the ids of a text."""
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
        names = [name for name in vars(self) if name not in ("_speller", "_finders", "_words")]
        return {**{name: vars(self)[name] for name in names}, "_backend": self.is_trained and self._backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._backend = parse_backend(state["_backend"], "the tokenizer") if state["_backend"] else None
        if self.is_trained:
            self._build()


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
        path: A ``tokenizer.json`` of the ``tokenizers`` library (any Hugging Face one) or its folder, whose ids are
            kept. The files of the folder decide whether there is a begin token; None is added.
    """

    SPECIAL_TOKENS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    JSON_HEADER = {"format": FORMAT, "version": FORMAT_VERSION, "kind": "bpe"}  # noqa: RUF012

    def __init__(self, vocab_size: int = 8192, path: str | None = None) -> None:
        if path is None and vocab_size < 257:
            message = f"vocab_size is {vocab_size}, expected at least 257 (256 bytes and {BOS_TOKEN})."
            raise DataError(message, "Give a larger one, for example 8192.")
        super().__init__(vocab_size if path is None else 0, path)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the begin token: 0 in a trained tokenizer, None if the files name none."""
        return self._bos_token_id if self.is_trained else 0

    def _read_files(self, folder: Path) -> None:
        super()._read_files(folder)
        self._set_bos_token(read_bos_token_id(folder, self._backend), from_files=True)

    def _set_bos_token(self, token_id: int | None, *, from_files: bool) -> None:
        self._bos_token_id, self._bos_from_files = token_id, from_files
        self._hide_bos_token()

    def _hide_bos_token(self) -> None:
        if self._bos_token_id is not None:
            self._speller.hide(self._bos_token_id)

    def _to_json(self, options: Mapping[str, Any]) -> str:
        return super()._to_json({**({BOS_KEY: self._bos_token_id} if self._bos_from_files else {}), **options})

    def _restore(self, description: Mapping[str, Any]) -> None:
        super()._restore(description)
        if BOS_KEY in description:
            self._set_bos_token(description[BOS_KEY], from_files=True)
            return
        # Earlier releases took the first of these, or added it.
        ids = map(self._backend.token_to_id, (BOS_TOKEN, *_EARLIER_BOS_TOKENS))
        self._set_bos_token(next((token_id for token_id in ids if token_id is not None), None), from_files=False)

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
        self._set_bos_token(backend.token_to_id(BOS_TOKEN), from_files=False)


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
    if kind == "word":
        return WordTokenizer.from_description(value)
    tokenizer_class: type[BackendTokenizer] = BytePairTokenizer
    if value["format"] == HF_FORMAT:
        from memtx.data.hf_tokenizers import HFTokenizer

        tokenizer_class = HFTokenizer
    elif kind != "bpe":
        message = f"The tokenizer's kind is '{kind}', expected 'byte', 'bpe' or 'word'."
        raise DataError(message, "Use the release that wrote it.")
    if not isinstance(vocab_size := value.get("vocab_size"), int):
        raise DataError(f"The tokenizer's vocab_size is {vocab_size}, expected a number.", "Restore it from a copy.")
    tokenizer = tokenizer_class.from_backend_json(json.dumps(value.get("model")), vocab_size)
    tokenizer._restore(value)
    return tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a file of :meth:`Tokenizer.save`, any ``tokenizer.json``, or the folder of either.

    Raises DataError if it is missing or no tokenizer that can be read.
    """
    file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
    if file.is_file() and file.suffix != ".model":
        text = read_text(file)
        try:
            return tokenizer_from_json(text)
        except MemtxError:
            if '"format": "memtx.' in text:
                raise
    return BytePairTokenizer(path=str(path))


def _cut_at(text: str, token_starts: Sequence[int]) -> list[bytes]:
    """Return the parts of a text from each start to the next; the first has the text before it too."""
    borders = [0, *np.maximum.accumulate(np.clip(token_starts[1:], 0, len(text))).tolist(), len(text)]
    return [text[start:end].encode("utf-8") for start, end in itertools.pairwise(borders)] if len(token_starts) else []

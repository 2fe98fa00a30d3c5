"""Tokenizers for tasks: each token knows where in the text it stands, and some ids mark what is no text.

A task's answer is a place in the text it was asked about, so tokens are found again by their characters. The ids of a
published checkpoint come from its ``tokenizer.json``; WordPiece (Schuster and Nakajima 2012) is trained here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memtx.data.tokenizers import file_text, parsed, utf8
from memtx.errors import DataError

FORMAT = "memtx.offset_tokenizer"
FORMAT_VERSION = 1

_MARKS = {
    "begin": ("[CLS]", "<s>", "<cls>"),
    "end": ("[SEP]", "</s>", "<sep>"),
    "padding": ("[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>"),
    "unknown": ("[UNK]", "<unk>"),
}


@dataclass(frozen=True)
class Encoded:
    """A text as tokens.

    Attributes:
        ids: (tokens,) int64.
        offsets: (tokens, 2) int64, the characters that each token stands for, from the first to behind the last.
    """

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)


class OffsetTokenizer:
    """Any ``tokenizer.json`` of the tokenizers library, WordPiece or byte-pair; its ids are kept.

    The marks are found in it by their usual names (``[CLS]`` or ``<s>``, ``[SEP]`` or ``</s>``, ``[PAD]``, ``[MASK]``,
    ``[UNK]``); one that it has not gets a new last id.

    Args:
        path: the file; None for one that is trained (:class:`WordPieceTokenizer`).

    Raises:
        DataError: the file is missing or is no tokenizer.
    """

    def __init__(self, path: str | None = None) -> None:
        self._backend: Any = None
        self._size = 0
        if path is not None:
            self._take(file_text(path), path)
        elif type(self) is OffsetTokenizer:
            raise DataError("OffsetTokenizer has no path.", "Name a tokenizer.json, or train a WordPieceTokenizer.")

    def _take(self, text: str, name: str) -> None:
        from tokenizers import AddedToken

        backend = parsed(text, name)
        # A task decides what is cut and filled up, and where marks stand.
        backend.no_truncation()
        backend.no_padding()
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self._marks: dict[str, int] = {}
        for mark, names in _MARKS.items():
            found = next((one for one in names if one in vocabulary), None)
            if found is None:
                found = names[0]
                backend.add_special_tokens([AddedToken(found, special=True)])
            self._marks[mark] = backend.get_vocab(with_added_tokens=True)[found]
        # A text that spells a mark is text.
        backend.encode_special_tokens = True
        self._backend = backend
        self._size = max(self._size, max(backend.get_vocab(with_added_tokens=True).values()) + 1)

    @property
    def fitted(self) -> bool:
        """Whether it can encode; False for one that must see texts first."""
        return self._backend is not None

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs."""
        return self._size

    @property
    def begin(self) -> int:
        """The id before a text, whose place stands for the whole (``[CLS]``)."""
        return self._mark("begin")

    @property
    def end(self) -> int:
        """The id behind a text (``[SEP]``)."""
        return self._mark("end")

    @property
    def padding(self) -> int:
        """The id that fills up rows."""
        return self._mark("padding")

    @property
    def mask(self) -> int:
        """The id that stands for a token to be guessed."""
        return self._mark("mask")

    @property
    def unknown(self) -> int:
        """The id of what the vocabulary cannot spell."""
        return self._mark("unknown")

    def _mark(self, name: str) -> int:
        self._ready()
        return self._marks[name]

    def fit(self, texts: Iterable[str]) -> None:
        """Learn from texts, where the kind learns."""

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Return the tokens of texts, without marks.

        Raises:
            DataError: a text holds half a surrogate pair, which is no character.
        """
        for text in texts:
            utf8(text)
        found = self._ready().encode_batch(list(texts), add_special_tokens=False)
        return [_encoded(text, one) for text, one in zip(texts, found, strict=True)]

    def to_json(self) -> str:
        """Return all there is to the tokenizer as JSON text; :func:`offset_tokenizer_from_json` reads it."""
        value = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "vocab_size": self._size,
            "model": json.loads(self._ready().to_str()),
        }
        return json.dumps(value, ensure_ascii=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of :meth:`to_json`."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def _ready(self) -> Any:
        if self._backend is None:
            raise DataError("This tokenizer was not trained yet.", "Call fit(texts), or load one by its path.")
        return self._backend

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self._size, "text": self.to_json() if self.fitted else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._backend, self._size = None, state["size"]
        if state["text"] is not None:
            self._take(json.dumps(json.loads(state["text"])["model"]), "the tokenizer")


class WordPieceTokenizer(OffsetTokenizer):
    """WordPiece with BERT's splitting of words (Devlin et al. 2019, section 3), trained on the task's own texts.

    Args:
        vocab_size: ids to reach, five marks among them; small texts may yield fewer, the size stays as asked.
        lowercase: whether case and accents are dropped.

    Raises:
        DataError: ``vocab_size`` is below 100.
    """

    def __init__(self, vocab_size: int = 8192, lowercase: bool = True) -> None:
        super().__init__()
        if vocab_size < 100:
            raise DataError(f"vocab_size is {vocab_size}, expected at least 100.", "Give a larger one, such as 8192.")
        self._size = vocab_size
        self.lowercase = lowercase

    def fit(self, texts: Iterable[str]) -> None:
        """Train on texts; does nothing where there are ids already."""
        if self.fitted:
            return
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, normalizers, pre_tokenizers

        normalizer, splitter = normalizers.BertNormalizer(lowercase=self.lowercase), pre_tokenizers.BertPreTokenizer()
        words: Counter[str] = Counter()
        for text in texts:
            words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
        marks = [_MARKS[mark][0] for mark in ("padding", "unknown", "begin", "end", "mask")]
        pieces = _pieces(words, self._size - len(marks))
        vocabulary = {piece: number for number, piece in enumerate([*marks, *pieces])}
        backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, splitter, decoders.WordPiece()
        backend.add_special_tokens(marks)
        self._take(backend.to_str(), "the tokenizer")


def _pieces(words: Counter[str], size: int) -> list[str]:
    """Return the pieces that byte-pair merges (Sennrich et al. 2016, section 3.2) leave most often, at most ``size``.

    The library's own trainer numbers continuing pieces in the order of a hash table, so that the same texts give other
    pieces each time; without them it does not.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    letters = Counter[str]()
    for word, count in words.items():
        for place, letter in enumerate(word):
            letters[letter if place == 0 else f"##{letter}"] += count
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted({piece.removeprefix("##")[:1] or "#" for piece in letters})
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    ordered = sorted(words.items(), key=lambda pair: (-pair[1], pair[0]))
    backend.train_from_iterator((" ".join([word] * count) for word, count in ordered), trainer=trainer)
    left: Counter[str] = Counter()
    for (_, count), found in zip(ordered, backend.encode_batch([word for word, _ in ordered]), strict=True):
        for place, piece in enumerate(found.tokens):
            left[piece if place == 0 else f"##{piece}"] += count
    # Single letters first, so that most words can be spelled; of a text in many scripts the usual ones.
    chosen = _most(letters, max(1, size // 2))
    return chosen + _most(left - Counter(dict.fromkeys(chosen, max(left.values(), default=0))), size - len(chosen))


def _most(counts: Counter[str], number: int) -> list[str]:
    return sorted(counts, key=lambda piece: (-counts[piece], piece))[:number]


def offset_tokenizer_from_json(text: str) -> OffsetTokenizer:
    """Return the tokenizer that :meth:`OffsetTokenizer.to_json` wrote down; nothing in the text is executed.

    Raises:
        DataError: the text is not such a description, or of a version this release does not read.
    """
    try:
        value = json.loads(text)
        kind, version, size, model = value["format"], value["version"], int(value["vocab_size"]), value["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError("The text describes no task's tokenizer.", "Use one that memtx wrote.") from error
    if kind != FORMAT or version != FORMAT_VERSION:
        raise DataError(
            f"The tokenizer is '{kind}' of version {version}, this release reads '{FORMAT}' of {FORMAT_VERSION}.",
            "Use the release that wrote it.",
        )
    made = OffsetTokenizer.__new__(OffsetTokenizer)
    made._backend, made._size = None, size
    made._take(json.dumps(model), "the tokenizer")
    return made


def _encoded(text: str, found: Any) -> Encoded:
    offsets = found.offsets
    # Byte-level pairs count the space before a word as the word's.
    for place, (start, stop) in enumerate(offsets):
        if text[start : start + 1].isspace():
            while start < stop - 1 and text[start].isspace():
                start += 1
            offsets[place] = start, stop
    return Encoded(np.array(found.ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2))

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

from memtx.data.tokenizers import encode_utf8, parse_tokenizer, read_tokenizer_file
from memtx.errors import DataError

FORMAT = "memtx.hf_tokenizer"
FORMAT_VERSION = 2

_SPECIAL_TOKENS = {
    "cls": ("[CLS]", "<s>", "<cls>"),
    "sep": ("[SEP]", "</s>", "<sep>"),
    "pad": ("[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
}


@dataclass(frozen=True)
class Encoding:
    """A text as tokens.

    Attributes:
        ids: (tokens,) int64.
        offsets: (tokens, 2) int64, the characters that each token stands for, from the first to behind the last.
    """

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)


class HFTokenizer:
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
        self._vocab_size = 0
        if path is not None:
            self._set_backend(read_tokenizer_file(path), path)
        elif type(self) is HFTokenizer:
            raise DataError("HFTokenizer has no path.", "Name a tokenizer.json, or train a WordPieceTokenizer.")

    def _set_backend(self, text: str, name: str) -> None:
        from tokenizers import AddedToken

        backend = parse_tokenizer(text, name)
        # A task decides what is cut and filled up, and where marks stand.
        backend.no_truncation()
        backend.no_padding()
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self._special_token_ids: dict[str, int] = {}
        for mark, names in _SPECIAL_TOKENS.items():
            found = next((one for one in names if one in vocabulary), None)
            if found is None:
                found = names[0]
                backend.add_special_tokens([AddedToken(found, special=True)])
            self._special_token_ids[mark] = backend.get_vocab(with_added_tokens=True)[found]
        # A text that spells a mark is text.
        backend.encode_special_tokens = True
        self._backend = backend
        self._vocab_size = max(self._vocab_size, max(backend.get_vocab(with_added_tokens=True).values()) + 1)

    @property
    def is_trained(self) -> bool:
        """Whether it can encode; False for one that must see texts first."""
        return self._backend is not None

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs."""
        return self._vocab_size

    @property
    def cls_token_id(self) -> int:
        """The id before a text, whose place stands for the whole (``[CLS]``)."""
        return self._special_token_id("cls")

    @property
    def sep_token_id(self) -> int:
        """The id behind a text (``[SEP]``)."""
        return self._special_token_id("sep")

    @property
    def pad_token_id(self) -> int:
        """The id that fills up rows."""
        return self._special_token_id("pad")

    @property
    def mask_token_id(self) -> int:
        """The id that stands for a token to be guessed."""
        return self._special_token_id("mask")

    @property
    def unk_token_id(self) -> int:
        """The id of what the vocabulary cannot spell."""
        return self._special_token_id("unk")

    def _special_token_id(self, name: str) -> int:
        self._require_backend()
        return self._special_token_ids[name]

    def train(self, texts: Iterable[str]) -> None:
        """Learn from texts, where the kind learns."""

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of texts, without marks.

        Raises:
            DataError: a text holds half a surrogate pair, which is no character.
        """
        for text in texts:
            encode_utf8(text)
        found = self._require_backend().encode_batch(list(texts), add_special_tokens=False)
        return [_to_encoding(text, one) for text, one in zip(texts, found, strict=True)]

    def to_json(self) -> str:
        """Return all there is to the tokenizer as JSON text; :func:`hf_tokenizer_from_json` reads it."""
        value = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "vocab_size": self._vocab_size,
            "model": json.loads(self._require_backend().to_str()),
        }
        return json.dumps(value, ensure_ascii=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of :meth:`to_json`."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def _require_backend(self) -> Any:
        if self._backend is None:
            raise DataError("This tokenizer was not trained yet.", "Call train(texts), or load one by its path.")
        return self._backend

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self._vocab_size, "text": self.to_json() if self.is_trained else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._backend, self._vocab_size = None, state["size"]
        if state["text"] is not None:
            self._set_backend(json.dumps(json.loads(state["text"])["model"]), "the tokenizer")


class WordPieceTokenizer(HFTokenizer):
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
        self._vocab_size = vocab_size
        self.lowercase = lowercase

    def train(self, texts: Iterable[str]) -> None:
        """Train on texts; does nothing where there are ids already."""
        if self.is_trained:
            return
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, normalizers, pre_tokenizers

        normalizer, splitter = normalizers.BertNormalizer(lowercase=self.lowercase), pre_tokenizers.BertPreTokenizer()
        words: Counter[str] = Counter()
        for text in texts:
            words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
        marks = [_SPECIAL_TOKENS[mark][0] for mark in ("pad", "unk", "cls", "sep", "mask")]
        pieces = _learn_word_pieces(words, self._vocab_size - len(marks))
        vocabulary = {piece: number for number, piece in enumerate([*marks, *pieces])}
        backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, splitter, decoders.WordPiece()
        backend.add_special_tokens(marks)
        self._set_backend(backend.to_str(), "the tokenizer")


def _learn_word_pieces(words: Counter[str], vocab_size: int) -> list[str]:
    """Return the pieces (at most ``vocab_size``) that byte-pair merges leave most often (Sennrich et al. 2016, 3.2).

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
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    ordered = sorted(words.items(), key=lambda pair: (-pair[1], pair[0]))
    backend.train_from_iterator((" ".join([word] * count) for word, count in ordered), trainer=trainer)
    left: Counter[str] = Counter()
    for (_, count), found in zip(ordered, backend.encode_batch([word for word, _ in ordered]), strict=True):
        for place, piece in enumerate(found.tokens):
            left[piece if place == 0 else f"##{piece}"] += count
    # Single letters first, so that most words can be spelled; of a text in many scripts the usual ones.
    chosen = _most_frequent(letters, max(1, vocab_size // 2))
    return chosen + _most_frequent(
        left - Counter(dict.fromkeys(chosen, max(left.values(), default=0))), vocab_size - len(chosen)
    )


def _most_frequent(counts: Counter[str], limit: int) -> list[str]:
    return sorted(counts, key=lambda piece: (-counts[piece], piece))[:limit]


def hf_tokenizer_from_json(text: str) -> HFTokenizer:
    """Return the tokenizer that :meth:`HFTokenizer.to_json` wrote down; nothing in the text is executed.

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
    made = HFTokenizer.__new__(HFTokenizer)
    made._backend, made._vocab_size = None, size
    made._set_backend(json.dumps(model), "the tokenizer")
    return made


def _to_encoding(text: str, backend_encoding: Any) -> Encoding:
    offsets = backend_encoding.offsets
    # Byte-level pairs count the space before a word as the word's.
    for place, (start, stop) in enumerate(offsets):
        if text[start : start + 1].isspace():
            while start < stop - 1 and text[start].isspace():
                start += 1
            offsets[place] = start, stop
    return Encoding(np.array(backend_encoding.ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2))

"""Tokenizers for tasks, whose answers are parts of a text: tokens know their characters, special tokens frame a text.

Ids of a published checkpoint come from its ``tokenizer.json``; WordPiece (Schuster and Nakajima 2012) is trained here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memtx.data.encodings import encode_utf8
from memtx.data.tokenizers import (
    HF_FORMAT,
    HF_FORMAT_VERSION,
    MASK_TOKENS,
    BackendTokenizer,
    SpecialTokenId,
    tokenizer_from_json,
)
from memtx.errors import DataError


@dataclass(frozen=True)
class Encoding:
    """Tokens of a text."""

    ids: NDArray[np.int64]  # (tokens,)
    offsets: NDArray[np.int64]  # (tokens, 2) first character of each token, and the one after its last

    def __len__(self) -> int:
        return len(self.ids)


class HFTokenizer(BackendTokenizer):
    """Any ``tokenizer.json`` of the ``tokenizers`` library, WordPiece or byte-pair, with its ids.

    The special tokens are found by their usual names (``[CLS]`` or ``<s>``, ``[SEP]`` or ``</s>``, ``[PAD]``,
    ``[MASK]``, ``[UNK]``); a missing one gets a new last id. Raises DataError if the file is missing or is not a
    tokenizer.

    Args:
        path: The file. None for a tokenizer that is trained (:class:`WordPieceTokenizer`).
    """

    SPECIAL_TOKENS = {  # noqa: RUF012
        "cls": ("[CLS]", "<s>", "<cls>"),
        "sep": ("[SEP]", "</s>", "<sep>"),
        "pad": ("[PAD]", "<pad>"),
        "mask": MASK_TOKENS,
        "unk": ("[UNK]", "<unk>"),
    }
    JSON_HEADER = {"format": HF_FORMAT, "version": HF_FORMAT_VERSION}  # noqa: RUF012

    cls_token_id = SpecialTokenId("cls")  # before a text; its output stands for the whole text
    sep_token_id = SpecialTokenId("sep")  # after a text
    pad_token_id = SpecialTokenId("pad")
    mask_token_id = SpecialTokenId("mask")
    unk_token_id = SpecialTokenId("unk")  # for text that the vocabulary cannot spell

    def __init__(self, path: str | None = None) -> None:
        if path is None:
            raise DataError("HFTokenizer has no path.", "Name a tokenizer.json, or train a WordPieceTokenizer.")
        super().__init__(0, path)

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens."""
        self._require_backend()
        return tuple(self._special_token_ids.values())

    @property
    def bos_token_id(self) -> int:
        """Id that begins a document: ``cls_token_id``."""
        return self.cls_token_id

    @property
    def mask_token(self) -> str:
        """Spelling of the token that stands for a masked one."""
        return str(self._require_backend().id_to_token(self.mask_token_id))

    @property
    def num_pair_separators(self) -> int:
        """Number of separators between two texts, by the file's post-processor: 1 as in BERT, or 2 as in RoBERTa."""
        ids = self._require_backend().encode("a", "a").ids
        start = ids.index(self.sep_token_id) if self.sep_token_id in ids else len(ids)
        length = next((length for length, token in enumerate(ids[start:]) if token != self.sep_token_id), 1)
        return max(length, 1)

    @property
    def has_cls_last(self) -> bool:
        """True if the file's post-processor puts ``[CLS]`` at the end, as for XLNet."""
        ids: list[int] = self._require_backend().encode("").ids
        return ids[-1:] == [self.cls_token_id]

    @property
    def num_prefix_tokens(self) -> int:
        """Number of special tokens before a text."""
        return 0 if self.has_cls_last else 1

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of whole texts, without special tokens; raises DataError for a lone surrogate."""
        for text in texts:
            encode_utf8(text)
        encodings = self._encoding_backend().encode_batch(list(texts), add_special_tokens=False)
        return [_to_encoding(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]


class WordPieceTokenizer(HFTokenizer):
    """WordPiece with BERT's word splitting (Devlin et al. 2019, section 3), trained on the texts of the task.

    Raises DataError if ``vocab_size`` is below 100.

    Args:
        vocab_size: Number of ids to train, with five special tokens; small texts may yield fewer, the vocabulary size
            stays as requested.
        lowercase: If True, drop case and accents.
    """

    def __init__(self, vocab_size: int = 8192, lowercase: bool = True) -> None:
        if vocab_size < 100:
            raise DataError(f"vocab_size is {vocab_size}, expected at least 100.", "Give a larger one, such as 8192.")
        BackendTokenizer.__init__(self, vocab_size)
        self.lowercase = lowercase

    def train(self, texts: Iterable[str]) -> None:
        """Train on texts; does nothing if the tokenizer is trained."""
        if self.is_trained:
            return
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, normalizers, pre_tokenizers

        normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
        word_splitter = pre_tokenizers.BertPreTokenizer()
        words: Counter[str] = Counter()
        for text in texts:
            words.update(word for word, _ in word_splitter.pre_tokenize_str(normalizer.normalize_str(text)))
        special_tokens = [self.SPECIAL_TOKENS[name][0] for name in ("pad", "unk", "cls", "sep", "mask")]
        word_pieces = _learn_word_pieces(words, self._vocab_size - len(special_tokens))
        vocabulary = {token: token_id for token_id, token in enumerate([*special_tokens, *word_pieces])}
        backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, word_splitter, decoders.WordPiece()
        backend.add_special_tokens(special_tokens)
        self._set_backend(backend)


def _learn_word_pieces(words: Counter[str], vocab_size: int) -> list[str]:
    """Return at most ``vocab_size`` pieces, the most frequent after byte-pair merges (Sennrich et al. 2016, 3.2).

    The library's own trainer numbers continuing pieces in the order of a hash table, so the same texts would give other
    pieces each time; without continuing pieces it is deterministic.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    letters: Counter[str] = Counter()
    for word, count in words.items():
        for index, letter in enumerate(word):
            letters[letter if index == 0 else f"##{letter}"] += count
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted({letter.removeprefix("##")[:1] or "#" for letter in letters})
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    by_frequency = sorted(words.items(), key=lambda pair: (-pair[1], pair[0]))
    backend.train_from_iterator((" ".join([word] * count) for word, count in by_frequency), trainer=trainer)
    pieces: Counter[str] = Counter()
    encodings = backend.encode_batch([word for word, _ in by_frequency])
    for (_, count), encoding in zip(by_frequency, encodings, strict=True):
        for index, piece in enumerate(encoding.tokens):
            pieces[piece if index == 0 else f"##{piece}"] += count
    # Single letters first, so that most words can be spelled; of a text in many scripts the frequent ones.
    chosen = _most_frequent(letters, max(1, vocab_size // 2))
    others = pieces - Counter(dict.fromkeys(chosen, max(pieces.values(), default=0)))
    return chosen + _most_frequent(others, vocab_size - len(chosen))


def _most_frequent(counts: Counter[str], limit: int) -> list[str]:
    return sorted(counts, key=lambda piece: (-counts[piece], piece))[:limit]


def hf_tokenizer_from_json(text: str) -> HFTokenizer:
    """Return the tokenizer that ``to_json`` wrote; raises as :func:`tokenizer_from_json`, or for another kind."""
    tokenizer = tokenizer_from_json(text)
    if not isinstance(tokenizer, HFTokenizer):
        message = f"The text describes a {type(tokenizer).__name__}, expected an HFTokenizer."
        raise DataError(message, "Use the tokenizer of a task.")
    return tokenizer


def _to_encoding(text: str, backend_encoding: Any) -> Encoding:
    offsets = backend_encoding.offsets
    # Byte-level BPE counts the space before a word as part of it.
    for index, (start, stop) in enumerate(offsets):
        if text[start : start + 1].isspace():
            while start < stop - 1 and text[start].isspace():
                start += 1
            offsets[index] = start, stop
    return Encoding(np.array(backend_encoding.ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2))

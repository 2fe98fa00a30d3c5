"""Retrieval by a bi-encoder: queries and documents as vectors, matched by cosine (Reimers and Gurevych 2019)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.data.tasks.base import EncodedExample, Logits, PreparedExample, Task, build_inputs, mean_by_part
from memtx.data.tasks.record_fields import get_text, get_texts
from memtx.errors import DataError


@dataclass(frozen=True)
class RetrievalExample:
    """A query and documents, in training the right one first; or a single text to embed."""

    query: str
    documents: tuple[str, ...] = ()
    is_document: bool = False  # if True, ``query`` is a document to embed

    @classmethod
    def parse(cls, record: Mapping[str, Any], labelled: bool = True) -> Self:
        """Return the example of a record; raises DataError."""
        if not labelled and "query" not in record and "text" in record:
            return cls(get_text(record, "text"), is_document=True)
        query = get_text(record, "query")
        if not labelled and "positive" not in record:
            return cls(query, get_texts(record, "documents") if "documents" in record else ())
        negatives = get_texts(record, "negatives") if record.get("negatives") is not None else ()
        positive = get_text(record, "positive")
        if positive in negatives:
            raise DataError("'negatives' contains the positive.", "Remove it.")
        return cls(query, (positive, *negatives))


class Retrieval(Task):
    """``{"query", "positive", "negatives"}``: a text, the document to find for it, and optional hard negatives.

    In a batch the documents of the other queries are negatives, too. A longer text is split, if there is a stride, and
    the vectors of its windows are averaged. ``[CLS]`` is global.

    Args:
        max_length: Maximum tokens of a window, with special tokens.
        stride: Tokens from the start of one window to the next in a longer text. None rejects a longer text.
        query_prefix: String before each query, such as ``"query: "`` of E5's models.
        document_prefix: String before each document.
    """

    kind = "retrieval"
    example_type = RetrievalExample
    keeps_windows_together = True

    def __init__(
        self, max_length: int = 512, stride: int | None = None, query_prefix: str = "", document_prefix: str = ""
    ) -> None:
        super().__init__((), max_length, stride)
        self.query_prefix, self.document_prefix = query_prefix, document_prefix

    @property
    def num_labels(self) -> int:
        """1, which the head ignores: its vectors have the width of the hidden states."""
        return 1

    def from_text(self, text: str) -> RetrievalExample:
        """Return a raw text as a document to embed."""
        return RetrievalExample(text, is_document=True)

    def get_texts(self, example: RetrievalExample) -> tuple[str, ...]:
        """Return the query and its documents, with their prefixes."""
        first_prefix = self.document_prefix if example.is_document else self.query_prefix
        return (first_prefix + example.query, *(self.document_prefix + text for text in example.documents))

    def encode(
        self, example: RetrievalExample, encodings: Sequence[Encoding], tokenizer: HFTokenizer
    ) -> list[EncodedExample]:
        """Return one or more windows a text; the target is a hash of the text, equal for equal texts."""
        windows = []
        for part, (text, encoding) in enumerate(zip(self.get_texts(example), encodings, strict=True)):
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            target = np.array([int.from_bytes(digest, "big") >> 1], dtype=np.int64)
            for start, stop in self.split_windows(len(encoding), 2):
                inputs = build_inputs(tokenizer, encoding.ids[start:stop])
                windows.append(EncodedExample(*inputs, tokenizer.num_prefix_tokens, start, stop, target, part))
        return windows

    def postprocess(self, prepared: PreparedExample, logits: Sequence[Logits]) -> dict[str, Any]:
        """Return ``ranking`` (indices of the documents, best first), their cosines as ``scores``, and the ``best``.

        A single text gives its ``embedding`` of unit length.
        """
        query, *documents = (_normalize(vector) for vector in mean_by_part(prepared, logits))
        if not documents:
            return {"embedding": [round(float(value), 6) for value in query]}
        scores = [round(float(query @ document), 6) for document in documents]
        ranking = sorted(range(len(scores)), key=lambda index: -scores[index])
        return {"best": prepared.example.documents[ranking[0]], "ranking": ranking, "scores": scores}

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the constructor's arguments as JSON values."""
        names = ("kind", "max_length", "stride", "query_prefix", "document_prefix")
        return {name: getattr(self, name) for name in names}


def _normalize(vector: Logits) -> Logits:
    normalized: Logits = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return normalized

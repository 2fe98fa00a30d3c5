"""A tag for every word: chunks, names, parts of speech. Spans follow from tags as seqeval reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from memtx.data.batch import IGNORE_INDEX
from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.data.tasks.base import EncodedExample, IntArray, Logits, Task, build_inputs
from memtx.data.tasks.examples import TaggedExample
from memtx.errors import DataError

_WORD = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\w+?(?=n't\b)|\w+(?:[-./]\w+)*|[^\w\s]", re.IGNORECASE)


def find_words(text: str) -> tuple[tuple[int, int], ...]:
    """Return where the words of a raw text stand, clitics and punctuation apart as treebanks have them."""
    return tuple(found.span() for found in _WORD.finditer(text))


def extract_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (type, first word, word behind the last) of the spans of BIO tags, as seqeval's default mode does.

    A span begins at ``B-``, and at ``I-`` where the word before is outside or of another type; it ends where the next
    word is outside, begins anew or is of another type. ``E-`` and ``S-`` end one. A tag without a dash has type ``_``.
    """
    spans: list[tuple[str, int, int]] = []
    begin, kind, before = 0, "", "O"
    for place, tag in enumerate([*tags, "O"]):
        prefix, own = tag[0], tag[1:].removeprefix("-") or "_"
        inside = before != "O"
        if inside and (prefix in "BSO" or before in "ES" or own != kind):
            spans.append((kind, begin, place))
            inside = False
        if prefix != "O" and not inside:
            begin = place
        before, kind = prefix, own
    return spans


class Tagging(Task):
    """``{"tokens", "tags"}``: a tag a word, read off the word's first token. No token is global."""

    kind = "tagging"

    def parse(self, record: Mapping[str, Any], labelled: bool = True) -> TaggedExample:
        """Return a record as an example; a raw ``text`` is cut into words. Raises DataError."""
        if not labelled and "tokens" not in record and isinstance(record.get("text"), str):
            return self.from_text(record["text"])
        return TaggedExample.parse(record, labelled)

    def from_text(self, text: str) -> TaggedExample:
        """Return the words of a raw text."""
        places = find_words(text)
        if not places:
            raise DataError("The text has no word.", "Give one with something in it.")
        return TaggedExample(tuple(text[start:stop] for start, stop in places), None, places, text)

    def get_texts(self, example: TaggedExample) -> tuple[str, ...]:
        """Return the words joined by spaces."""
        return (" ".join(example.tokens),)

    def get_labels(self, example: TaggedExample) -> tuple[str, ...]:
        """Return the tags, if there are any."""
        return example.tags or ()

    def encode(
        self, example: TaggedExample, encodings: Sequence[Encoding], tokenizer: HFTokenizer
    ) -> list[EncodedExample]:
        """Return ``[CLS] words [SEP]``; the target is the tag's number at each word's first token."""
        whole = encodings[0]
        heads = _first_tokens(example.tokens, whole)
        tags = np.full(len(whole), IGNORE_INDEX, dtype=np.int64)
        if example.tags is not None:
            for head, tag in zip(heads, example.tags, strict=True):
                number = self.label_to_id(tag)
                if head is not None:
                    tags[head] = number
        made = []
        for begin, stop in self.split_windows(len(whole), 2):
            ids, types, marked = build_inputs(tokenizer, whole.ids[begin:stop])
            marked[:] = False
            target = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
            target[1:-1] = tags[begin:stop]
            made.append(EncodedExample(ids, types, marked, 1, begin, stop, target))
        return made

    def postprocess(
        self,
        example: TaggedExample,
        encodings: Sequence[Encoding],
        windows: Sequence[EncodedExample],
        logits: Sequence[Logits],
    ) -> dict[str, Any]:
        """Return ``tokens``, their ``tags`` and the ``spans`` these make: ``type``, ``start``, ``end``, ``text``.

        Start and end count words; characters, where the words come from a raw text.
        """
        tags = []
        for head in _first_tokens(example.tokens, encodings[0]):
            # Of the windows that show a word the one that shows most on both sides of it knows best.
            own = [
                (min(head - one.text_start, one.text_stop - 1 - head), place)
                for place, one in enumerate(windows)
                if head is not None and one.text_start <= head < one.text_stop
            ]
            if head is None or not own:
                tags.append("O" if "O" in self.labels else self.labels[0])
                continue
            place = max(own)[1]
            row = logits[place][windows[place].input_start + head - windows[place].text_start]
            tags.append(self.labels[int(row.argmax())])
        spans = []
        for kind, start, stop in extract_spans(tags):
            words = {"type": kind, "start": start, "end": stop, "text": " ".join(example.tokens[start:stop])}
            if example.word_spans is not None:
                begin, end = example.word_spans[start][0], example.word_spans[stop - 1][1]
                words |= {"start": begin, "end": end, "text": example.text[begin:end]}
            spans.append(words)
        return {"tokens": list(example.tokens), "tags": tags, "spans": spans}


def _first_tokens(words: Iterable[str], encoding: Encoding) -> list[int | None]:
    """Return each word's first token; None for a word that left none, such as a control character."""
    heads: list[int | None] = []
    at = 0
    starts: IntArray = encoding.offsets[:, 0]
    for word in words:
        place = int(np.searchsorted(starts, at))
        heads.append(place if place < len(starts) and starts[place] < at + len(word) else None)
        at += len(word) + 1
    return heads

"""Tagging of every word: chunks, names, parts of speech. Spans follow from tags as in seqeval."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from memtx.data.batch import IGNORE_INDEX
from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.data.tasks.base import EncodedExample, IntArray, Logits, PreparedExample, Task, build_inputs
from memtx.data.tasks.examples import TaggedExample
from memtx.errors import DataError

_WORD = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\w+?(?=n't\b)|\w+(?:[-./]\w+)*|[^\w\s]", re.IGNORECASE)


def find_words(text: str) -> tuple[tuple[int, int], ...]:
    """Return first and last (exclusive) characters of the words of a text, split into clitics as in treebanks."""
    return tuple(match.span() for match in _WORD.finditer(text))


def extract_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (type, first word, word after the last) of the spans of BIO tags, as seqeval's default mode does.

    A span starts at ``B-``, and at ``I-`` after a word that is outside or of another type. It ends before a word that
    is outside, starts a span or is of another type, and after ``E-`` and ``S-``. A tag without a dash has type ``_``.
    """
    spans: list[tuple[str, int, int]] = []
    start, span_type, previous = 0, "", "O"
    for index, tag in enumerate([*tags, "O"]):
        prefix, tag_type = tag[0], tag[1:].removeprefix("-") or "_"
        inside = previous != "O"
        if inside and (prefix in "BSO" or previous in "ES" or tag_type != span_type):
            spans.append((span_type, start, index))
            inside = False
        if prefix != "O" and not inside:
            start = index
        previous, span_type = prefix, tag_type
    return spans


class Tagging(Task):
    """``{"tokens", "tags"}``: one tag a word, read at the word's first token. No token is global."""

    kind = "tagging"
    example_type = TaggedExample

    def parse(self, record: Mapping[str, Any], labelled: bool = True) -> TaggedExample:
        """Return the example of a record; a raw ``text`` is split into words. Raises DataError."""
        if not labelled and "tokens" not in record and isinstance(record.get("text"), str):
            return self.from_text(record["text"])
        return TaggedExample.parse(record, labelled)

    def from_text(self, text: str) -> TaggedExample:
        """Return the words of a raw text."""
        word_spans = find_words(text)
        if not word_spans:
            raise DataError("The text has no word.", "Give a text with words.")
        return TaggedExample(tuple(text[start:stop] for start, stop in word_spans), None, word_spans, text)

    def get_texts(self, example: TaggedExample) -> tuple[str, ...]:
        """Return the words joined by spaces."""
        return (" ".join(example.tokens),)

    def get_labels(self, example: TaggedExample) -> tuple[str, ...]:
        """Return the tags, if there are any."""
        return example.tags or ()

    def _word_spans(self, example: TaggedExample) -> Iterable[tuple[int, int]]:
        """Yield first and last (exclusive) characters of each word in the encoded text."""
        start = 0
        for word in example.tokens:
            yield start, start + len(word)
            start += len(word) + 1

    def _first_tokens(self, example: TaggedExample, encoding: Encoding) -> list[int | None]:
        """Return the first token of each word, None for a word without tokens, such as a control character."""
        token_starts: IntArray = encoding.offsets[:, 0]
        first_tokens: list[int | None] = []
        for start, stop in self._word_spans(example):
            token = int(np.searchsorted(token_starts, start))
            first_tokens.append(token if token < len(token_starts) and token_starts[token] < stop else None)
        return first_tokens

    def encode(
        self, example: TaggedExample, encodings: Sequence[Encoding], tokenizer: HFTokenizer
    ) -> list[EncodedExample]:
        """Return ``[CLS] words [SEP]``; the target is the tag's index at each word's first token."""
        encoding = encodings[0]
        labels = np.full(len(encoding), IGNORE_INDEX, dtype=np.int64)
        if example.tags is not None:
            for token, tag in zip(self._first_tokens(example, encoding), example.tags, strict=True):
                label = self.label_to_id(tag)
                if token is not None:
                    labels[token] = label
        windows = []
        for start, stop in self.split_windows(len(encoding), 2):
            ids, token_type_ids, global_attention_mask = build_inputs(tokenizer, encoding.ids[start:stop])
            global_attention_mask[:] = False
            target = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
            input_start = tokenizer.num_prefix_tokens
            target[input_start : input_start + stop - start] = labels[start:stop]
            masks = token_type_ids, global_attention_mask
            windows.append(EncodedExample(ids, *masks, input_start, start, stop, target))
        return windows

    def postprocess(self, prepared: PreparedExample, logits: Sequence[Logits]) -> dict[str, Any]:
        """Return ``tokens``, ``tags``, ``scores`` and ``spans`` (``type``, ``start``, ``end``, ``text``, ``score``).

        Start and end count words, or characters if the words come from a raw text. Scores are probabilities, 0 for a
        word without tokens; that of a span is the mean over its words.
        """
        example: TaggedExample = prepared.example
        windows = prepared.windows
        tags: list[str] = []
        scores: list[float] = []
        for token in self._first_tokens(example, prepared.encodings[0]):
            # Of the windows with a word, take the one with the most context on both sides of it.
            candidates = [
                (min(token - window.text_start, window.text_stop - 1 - token), index)
                for index, window in enumerate(windows)
                if token is not None and window.text_start <= token < window.text_stop
            ]
            if token is None or not candidates:
                tags.append("O" if "O" in self.labels else self.labels[0])
                scores.append(0.0)
                continue
            index = max(candidates)[1]
            position = windows[index].input_start + token - windows[index].text_start
            tags.append(self.labels[int(logits[index][position].argmax())])
            values = logits[index][position].astype(np.float64)
            scores.append(round(float(1 / np.exp(values - values.max()).sum()), 6))
        spans = []
        for span_type, start, stop in extract_spans(tags):
            span = {"type": span_type, "start": start, "end": stop, "text": " ".join(example.tokens[start:stop])}
            if example.word_spans is not None:
                first, last = example.word_spans[start][0], example.word_spans[stop - 1][1]
                span |= {"start": first, "end": last, "text": example.text[first:last]}
            spans.append(span | {"score": round(sum(scores[start:stop]) / (stop - start), 6)})
        return {"tokens": list(example.tokens), "tags": tags, "scores": scores, "spans": spans}


class TokenClassification(Tagging):
    """Tagging by a published model, which reads a raw text as it is, not its words joined by spaces."""

    kind = "token_classification"

    def get_texts(self, example: TaggedExample) -> tuple[str, ...]:
        """Return the raw text, or the words joined by spaces."""
        return (example.text,) if example.text else super().get_texts(example)

    def _word_spans(self, example: TaggedExample) -> Iterable[tuple[int, int]]:
        return example.word_spans if example.text and example.word_spans else super()._word_spans(example)

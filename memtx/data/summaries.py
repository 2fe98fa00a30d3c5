"""Texts and what is to be written after them, as rows for a decoder: the loss is on what follows alone.

A row is the text, a prompt, the summary and an end; so a model that was trained so is asked with text and prompt, and
stops at the end. ``{"text", "summary"}`` are the fields, whatever follows: a summary, a reply, a translation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memtx.data.batch import IGNORED, Batch
from memtx.data.example_files import ExampleDataModule
from memtx.data.examples import SummaryExample, read_examples, split_file
from memtx.data.summary_form import SummaryForm
from memtx.data.task import Array
from memtx.data.tokenizers import ByteTokenizer, Tokenizer
from memtx.errors import DataError


@dataclass
class Row:
    """A text and its summary as tokens.

    Attributes:
        ids: (length,) what begins a document, then text, prompt, summary and end.
        first: place of the summary's first token.
        words: of the summary.
        bytes: likewise.
    """

    ids: Array
    first: int
    words: int
    bytes: int

    @property
    def windows(self) -> list[Row]:
        """The row itself: it is read whole."""
        return [self]


def summary_batch(rows: Sequence[Row], padding: int) -> Batch:
    """Return rows as a batch whose labels are the summaries' tokens; each row begins a document."""
    length = max(len(row.ids) for row in rows) - 1
    tokens = np.full((len(rows), length), padding, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row.ids) - 1] = row.ids[:-1]
        labels[place, row.first - 1 : len(row.ids) - 1] = row.ids[row.first :]
    starts = torch.zeros(len(rows), length, dtype=torch.bool)
    starts[:, 0] = True
    counts = (torch.tensor([getattr(row, name) for row in rows]) for name in ("words", "bytes"))
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), starts, *counts)


class SummaryBatches:
    """Every row once, those of about equal length together; no list, which Lightning takes for several loaders."""

    def __init__(self, rows: Sequence[Row], at_once: int, padding: int) -> None:
        ordered = sorted(rows, key=lambda row: len(row.ids))
        self.parts = [ordered[at : at + at_once] for at in range(0, len(ordered), at_once)]
        self.padding = padding

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        for part in self.parts:
            yield summary_batch(part, self.padding)


class SummaryDataModule(ExampleDataModule[Row, Batch]):
    """Texts and summaries in a folder of ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``.

    Args:
        root: the folder.
        tokenizer: a ByteTokenizer (the default), or ``BytePairTokenizer``, trained on the training examples.
        prompt: stands between a text and its summary.
        end: stands behind a summary, and in none.
        rows: of a batch on each device, at least 1.
        segment: tokens a row gives the model in one call, at least 1.
        longest: tokens a row may have; null for any number, since a memory reads texts of any length.
        seed: of the order of examples.

    Raises:
        DataError: a number is out of its range, or prompt or end is empty.
    """

    def __init__(
        self,
        root: str | None = None,
        tokenizer: Tokenizer | None = None,
        prompt: str = "\nSummary: ",
        end: str = "\n\n",
        rows: int = 8,
        segment: int = 512,
        longest: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(root, rows, seed, segment=segment, longest=longest)
        self.form = SummaryForm(prompt, end)
        self.segment, self.longest = segment, longest
        self.tokenizer: Tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()

    @property
    def vocab_size(self) -> int:
        """Rows the model's embedding needs."""
        return self.tokenizer.vocab_size

    def _made(self, split: str) -> list[Row]:
        self._fit()
        found = read_examples(split_file(self.root, split), SummaryExample.parse)
        return self._by_line(split, found, lambda one: [self._row(one)])

    def _row(self, example: SummaryExample) -> Row:
        assert example.summary is not None
        asked, said = self.form.question(example.text), self.form.answer(example.summary)
        first, second = (self.tokenizer.encode(part).astype(np.int64) for part in (asked, said))
        ids = np.concatenate([[self.tokenizer.begin], first, second])
        if self.longest is not None and len(ids) > self.longest:
            raise DataError(
                f"Text and summary have {len(ids)} tokens, longest is {self.longest}.", "Raise --data.longest."
            )
        return Row(ids, 1 + len(first), len(example.summary.split()), len(said.encode()))

    def _fit(self) -> None:
        if not self.tokenizer.fitted:
            found = read_examples(split_file(self.root, "train"), SummaryExample.parse)
            parts = ((self.form.question(one.text), self.form.answer(one.summary or "")) for _, one in found)
            self.tokenizer.fit(part for pair in parts for part in pair)

    def _training(self) -> tuple[int, Callable[[Sequence[Any], int], Batch]]:
        return self.tokenizer.begin, summary_batch

    def _measured(self, split: str) -> SummaryBatches:
        rank, world_size = self._ranks()
        return SummaryBatches(self.prepared(split)[rank::world_size], self.rows, self.tokenizer.begin)

    def _kept(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer.to_json(), "summary": json.dumps(vars(self.form))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's position; in evaluation its tokenizer is this one's already.

        Raises:
            CheckpointError: its tokenizer is another one.
        """
        self._fit()
        self._take(state_dict, ("tokenizer",))

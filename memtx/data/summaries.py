"""Texts and what is to be written after them, as rows for a decoder: the loss is on what follows alone.

A row is the text, a prompt, the summary and an end; so a model that was trained so is asked with text and prompt, and
stops at the end. ``{"text", "summary"}`` are the fields, whatever follows: a summary, a reply, a translation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from memtx.data.batch import IGNORED, Batch
from memtx.data.examples import SummaryExample, read_examples, split_file
from memtx.data.summary_form import SummaryForm
from memtx.data.task import Array
from memtx.data.task_batches import TrainingBatches
from memtx.data.tokenizers import ByteTokenizer, Tokenizer
from memtx.errors import CheckpointError, DataError


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


class SummaryDataModule(LightningDataModule):
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
        super().__init__()
        for name, value in (("rows", rows), ("segment", segment), ("longest", longest)):
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}, expected at least 1.", f"Change --data.{name}.")
        self.form = SummaryForm(prompt, end)
        self.root, self.rows, self.segment, self.longest, self.seed = root, rows, segment, longest, seed
        self.tokenizer: Tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()
        self._rows: dict[str, list[Row]] = {}
        self._batches: TrainingBatches[Batch] | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def vocab_size(self) -> int:
        """Rows the model's embedding needs."""
        return self.tokenizer.vocab_size

    def split(self, name: str) -> list[Row]:
        """Return a split's rows.

        Raises:
            DataError: an example cannot be used; names file and line.
        """
        if name not in self._rows:
            self._fit()
            path = split_file(self.root, name)
            made = []
            for line, example in read_examples(path, SummaryExample.parse):
                try:
                    made.append(self._row(example))
                except DataError as error:
                    raise DataError(f"'{path}', line {line}: {error.what}", error.cure) from error
            self._rows[name] = made
        return self._rows[name]

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

    def setup(self, stage: str | None = None) -> None:
        """Read what the stage needs; a fit begins at the start of the data unless a checkpoint says otherwise."""
        for name in {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage or "", ("test",)):
            if name != "validation" or stage != "fit" or self._validates():
                self.split(name)
        if stage == "fit":
            self._batches = self._restored = None

    def _validates(self) -> bool:
        return self.root is not None and (Path(self.root).expanduser() / "validation.jsonl").is_file()

    def _ranks(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> TrainingBatches[Batch]:
        """Return this rank's batches, going on from the position."""
        rows, padding = self.split("train"), self.tokenizer.begin
        made = TrainingBatches(rows, self.rows, padding, self.seed, *self._ranks(), collate=summary_batch)
        if self._batches is not None:  # asked again within a run
            made.load_state_dict(self._batches.state_dict())
        elif self._restored is not None:
            made.load_state_dict(self._restored)
        self._batches, self._restored = made, None
        return made

    def _measured(self, name: str) -> SummaryBatches:
        rank, world_size = self._ranks()
        return SummaryBatches(self.split(name)[rank::world_size], self.rows, self.tokenizer.begin)

    def val_dataloader(self) -> SummaryBatches | list[Any]:
        """Return the validation examples; none where there are none."""
        return self._measured("validation") if self._validates() else []

    def test_dataloader(self) -> SummaryBatches:
        """Return the test examples."""
        return self._measured("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the tokenizer as JSON text, and how a summary is asked for."""
        position = self._batches.state_dict() if self._batches is not None else self._restored or {}
        return {**position, "tokenizer": self.tokenizer.to_json(), "summary": json.dumps(vars(self.form))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's position; in evaluation its tokenizer is this one's already.

        Raises:
            CheckpointError: its tokenizer is another one.
        """
        self._fit()
        if state_dict.get("tokenizer") != self.tokenizer.to_json():
            raise CheckpointError(
                "The checkpoint was trained with another tokenizer.",
                "Use the config saved beside the checkpoint and its data.",
            )
        self._restored = {
            key: value for key, value in state_dict.items() if key not in ("tokenizer", "summary")
        } or None
        if self._batches is not None and self._restored is not None:
            self._batches.load_state_dict(self._restored)
            self._restored = None

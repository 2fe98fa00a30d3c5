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

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.data.tasks.base import IntArray
from memtx.data.tasks.example_files import ExampleDataModule
from memtx.data.tasks.examples import SummaryExample, read_examples, split_path
from memtx.data.tasks.summary_prompt import SummaryPrompt
from memtx.data.tokenizers import ByteTokenizer, Tokenizer
from memtx.errors import DataError


@dataclass
class EncodedSummary:
    """A text and its summary as tokens.

    Attributes:
        ids: (length,) what begins a document, then text, prompt, summary and end.
        summary_start: place of the summary's first token.
        num_words: of the summary.
        num_bytes: likewise.
    """

    ids: IntArray
    summary_start: int
    num_words: int
    num_bytes: int

    @property
    def windows(self) -> list[EncodedSummary]:
        """The row itself: it is read whole."""
        return [self]


def collate_summaries(examples: Sequence[EncodedSummary], pad_token_id: int) -> Batch:
    """Return rows as a batch whose labels are the summaries' tokens; each row begins a document."""
    length = max(len(row.ids) for row in examples) - 1
    tokens = np.full((len(examples), length), pad_token_id, dtype=np.int64)
    labels = np.full((len(examples), length), IGNORE_INDEX, dtype=np.int64)
    for place, row in enumerate(examples):
        tokens[place, : len(row.ids) - 1] = row.ids[:-1]
        labels[place, row.summary_start - 1 : len(row.ids) - 1] = row.ids[row.summary_start :]
    starts = torch.zeros(len(examples), length, dtype=torch.bool)
    starts[:, 0] = True
    counts = (torch.tensor([getattr(row, name) for row in examples]) for name in ("num_words", "num_bytes"))
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), starts, *counts)


class SummaryBatches:
    """Every row once, those of about equal length together; no list, which Lightning takes for several loaders."""

    def __init__(self, examples: Sequence[EncodedSummary], batch_size: int, pad_token_id: int) -> None:
        ordered = sorted(examples, key=lambda row: len(row.ids))
        self.batches = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
        self.pad_token_id = pad_token_id

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for part in self.batches:
            yield collate_summaries(part, self.pad_token_id)


class SummaryDataModule(ExampleDataModule[EncodedSummary, Batch]):
    """Texts and summaries in a folder of ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``.

    Args:
        root: the folder.
        tokenizer: a ByteTokenizer (the default), or ``BytePairTokenizer``, trained on the training examples.
        prompt: stands between a text and its summary.
        stop_sequence: stands behind a summary, and in none.
        batch_size: of a batch on each device, at least 1.
        segment_length: tokens a row gives the model in one call, at least 1.
        max_length: tokens a row may have; null for any number, since a memory reads texts of any length.
        seed: of the order of examples.

    Raises:
        DataError: a number is out of its range, or prompt or stop_sequence is empty.
    """

    def __init__(
        self,
        root: str | None = None,
        tokenizer: Tokenizer | None = None,
        prompt: str = "\nSummary: ",
        stop_sequence: str = "\n\n",
        batch_size: int = 8,
        segment_length: int = 512,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, seed, segment_length=segment_length, max_length=max_length)
        self.summary_prompt = SummaryPrompt(prompt, stop_sequence)
        self.segment_length, self.max_length = segment_length, max_length
        self.tokenizer: Tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()

    @property
    def vocab_size(self) -> int:
        """Rows the model's embedding needs."""
        return self.tokenizer.vocab_size

    def _encode_split(self, split: str) -> list[EncodedSummary]:
        self._train_tokenizer()
        found = read_examples(split_path(self.root, split), SummaryExample.parse)
        return self._encode_lines(split, found, lambda one: [self._encode_example(one)])

    def _encode_example(self, example: SummaryExample) -> EncodedSummary:
        assert example.summary is not None
        asked, said = (
            self.summary_prompt.format_prompt(example.text),
            self.summary_prompt.format_completion(example.summary),
        )
        first, second = (self.tokenizer.encode(part).astype(np.int64) for part in (asked, said))
        ids = np.concatenate([[self.tokenizer.bos_token_id], first, second])
        if self.max_length is not None and len(ids) > self.max_length:
            raise DataError(
                f"Text and summary have {len(ids)} tokens, max_length is {self.max_length}.", "Raise --data.max_length."
            )
        return EncodedSummary(ids, 1 + len(first), len(example.summary.split()), len(said.encode()))

    def _train_tokenizer(self) -> None:
        if not self.tokenizer.is_trained:
            found = read_examples(split_path(self.root, "train"), SummaryExample.parse)
            parts = (
                (self.summary_prompt.format_prompt(one.text), self.summary_prompt.format_completion(one.summary or ""))
                for _, one in found
            )
            self.tokenizer.train(part for pair in parts for part in pair)

    def _train_collation(self) -> tuple[int, Callable[[Sequence[Any], int], Batch]]:
        return self.tokenizer.bos_token_id, collate_summaries

    def _evaluation_batches(self, split: str) -> SummaryBatches:
        rank, world_size = self._rank_and_world_size()
        return SummaryBatches(
            self.encoded_examples(split)[rank::world_size], self.batch_size, self.tokenizer.bos_token_id
        )

    def _checkpoint_texts(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer.to_json(), "summary": json.dumps(vars(self.summary_prompt))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's position; in evaluation its tokenizer is this one's already.

        Raises:
            CheckpointError: its tokenizer is another one.
        """
        self._train_tokenizer()
        self._restore(state_dict, ("tokenizer",))

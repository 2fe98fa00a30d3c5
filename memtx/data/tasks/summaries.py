"""Texts and completions, such as summaries, replies or translations, for a decoder that is trained on the completion.

A sequence is the text, a prompt, the completion and a stop sequence, up to which the trained model generates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from memtx.data.batch import IGNORE_INDEX, Batch, FixedBatches
from memtx.data.tasks.base import IntArray
from memtx.data.tasks.data_module import ExampleDataModule
from memtx.data.tasks.examples import SummaryExample, SummaryPrompt, read_examples, split_path
from memtx.data.tokenizers import ByteTokenizer, Tokenizer
from memtx.errors import DataError


@dataclass
class EncodedSummary:
    """A text and its summary as tokens."""

    ids: IntArray  # (length,) begin token, text, prompt, summary and stop sequence
    summary_start: int  # index of the summary's first token
    num_words: int  # of the summary
    num_bytes: int  # UTF-8 bytes of the summary with the stop sequence


class SummaryDataModule(ExampleDataModule[EncodedSummary, Batch]):
    """Texts and summaries in ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` of a folder.

    Raises DataError if a number is out of range, or prompt or stop_sequence is empty.

    Args:
        root: Folder of the files.
        tokenizer: Tokenizer, such as ``BytePairTokenizer``, which is trained on the training examples. Defaults to
            ByteTokenizer.
        prompt: String between a text and its summary.
        stop_sequence: String after a summary; no summary contains it.
        batch_size: Examples of a batch on each device. At least 1.
        segment_length: Tokens of an example in one call of the model. At least 1.
        max_length: Maximum tokens of an example. None for no limit, since a memory reads texts of any length.
        seed: Seed of the order of examples.
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
        self.tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()

    def _read_split(self, split: str) -> list[tuple[int, SummaryExample]]:
        return read_examples(split_path(self.root, split), SummaryExample.parse)

    def _get_texts(self, example: SummaryExample) -> tuple[str, str]:
        prompt = self.summary_prompt.format_prompt(example.text)
        return prompt, self.summary_prompt.format_completion(example.summary or "")

    def _encode_example(self, example: SummaryExample) -> EncodedSummary:
        assert example.summary is not None
        prompt, completion = self._get_texts(example)
        prompt_ids, completion_ids = (self.tokenizer.encode(text).astype(np.int64) for text in (prompt, completion))
        ids = np.concatenate([self.tokenizer.bos_token_ids, prompt_ids, completion_ids])
        if self.max_length is not None and len(ids) > self.max_length:
            message = f"Text and summary have {len(ids)} tokens, max_length is {self.max_length}."
            raise DataError(message, "Raise --data.max_length.")
        num_words, num_bytes = len(example.summary.split()), len(completion.encode())
        return EncodedSummary(ids, len(ids) - len(completion_ids), num_words, num_bytes)

    def _collate(self, windows: Sequence[EncodedSummary]) -> Batch:
        """Return a batch with one document per example, whose labels are the tokens of the summaries."""
        ids = [torch.from_numpy(window.ids) for window in windows]
        tokens = pad_sequence([row[:-1] for row in ids], batch_first=True, padding_value=self.tokenizer.pad_id)
        labels = pad_sequence([row[1:] for row in ids], batch_first=True, padding_value=IGNORE_INDEX)
        for row, window in zip(labels, windows, strict=True):
            row[: window.summary_start - 1] = IGNORE_INDEX
        document_starts = torch.zeros_like(tokens, dtype=torch.bool)
        document_starts[:, 0] = True
        num_words = torch.tensor([window.num_words for window in windows])
        num_bytes = torch.tensor([window.num_bytes for window in windows])
        return Batch(tokens, labels, document_starts, num_words, num_bytes)

    def _evaluation_batches(self, split: str) -> FixedBatches[Batch]:
        return self._batches_by_length(split, lambda example: len(example.ids))

    def _checkpoint_texts(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer.to_json(), "summary": json.dumps(vars(self.summary_prompt))}

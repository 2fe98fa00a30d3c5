"""Texts and what follows them, as sequences for a decoder that is trained on the completion alone.

A sequence is the text, a prompt, the summary and a stop sequence; the trained model is asked with text and prompt, and
generates up to the stop sequence. The fields are ``{"text", "summary"}``, whatever the completion is: a summary, a
reply, a translation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memtx.data.batch import IGNORE_INDEX, Batch, FixedBatches, rank_and_world_size
from memtx.data.tasks.base import IntArray
from memtx.data.tasks.data_module import ExampleDataModule
from memtx.data.tasks.examples import SummaryExample, SummaryPrompt, read_examples, split_path
from memtx.data.tokenizers import ByteTokenizer, Tokenizer
from memtx.errors import DataError


@dataclass
class EncodedSummary:
    """A text and its summary as tokens.

    Attributes:
        ids: ``(length,)`` begin token, text, prompt, summary and stop sequence.
        summary_start: Index of the summary's first token.
        num_words: Words of the summary.
        num_bytes: UTF-8 bytes of the summary with the stop sequence.
    """

    ids: IntArray
    summary_start: int
    num_words: int
    num_bytes: int

    @property
    def windows(self) -> list[EncodedSummary]:
        """The sequence itself, which is never split."""
        return [self]


def collate_summaries(examples: Sequence[EncodedSummary], pad_token_id: int) -> Batch:
    """Return a batch with one document per example, whose labels are the tokens of the summaries."""
    length = max(len(example.ids) for example in examples) - 1
    tokens = np.full((len(examples), length), pad_token_id, dtype=np.int64)
    labels = np.full((len(examples), length), IGNORE_INDEX, dtype=np.int64)
    for index, example in enumerate(examples):
        end = len(example.ids) - 1
        tokens[index, :end] = example.ids[:-1]
        labels[index, example.summary_start - 1 : end] = example.ids[example.summary_start :]
    document_starts = torch.zeros(len(examples), length, dtype=torch.bool)
    document_starts[:, 0] = True
    num_words = torch.tensor([example.num_words for example in examples])
    num_bytes = torch.tensor([example.num_bytes for example in examples])
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), document_starts, num_words, num_bytes)


class SummaryDataModule(ExampleDataModule[EncodedSummary, Batch]):
    """Texts and summaries in ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` of a folder.

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

    Raises:
        DataError: A number is out of range, or prompt or stop_sequence is empty.
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
        """Vocabulary size; known before any text is read."""
        return self.tokenizer.vocab_size

    def _read_split(self, split: str) -> list[tuple[int, SummaryExample]]:
        return read_examples(split_path(self.root, split), SummaryExample.parse)

    def _encode_split(self, split: str) -> list[EncodedSummary]:
        self._train_tokenizer()
        return self._encode_lines(split, self._read_split(split), lambda example: [self._encode_example(example)])

    def _prompt_and_completion(self, example: SummaryExample) -> tuple[str, str]:
        prompt = self.summary_prompt.format_prompt(example.text)
        return prompt, self.summary_prompt.format_completion(example.summary or "")

    def _encode_example(self, example: SummaryExample) -> EncodedSummary:
        assert example.summary is not None
        prompt, completion = self._prompt_and_completion(example)
        prompt_ids, completion_ids = (self.tokenizer.encode(text).astype(np.int64) for text in (prompt, completion))
        ids = np.concatenate([[self.tokenizer.bos_token_id], prompt_ids, completion_ids])
        if self.max_length is not None and len(ids) > self.max_length:
            raise DataError(
                f"Text and summary have {len(ids)} tokens, max_length is {self.max_length}.", "Raise --data.max_length."
            )
        num_words, num_bytes = len(example.summary.split()), len(completion.encode())
        return EncodedSummary(ids, 1 + len(prompt_ids), num_words, num_bytes)

    def _train_tokenizer(self) -> None:
        if not self.tokenizer.is_trained:
            examples = self._read_split("train")
            self.tokenizer.train(text for _, example in examples for text in self._prompt_and_completion(example))

    def _train_collation(self) -> tuple[int, Callable[[Sequence[Any], int], Batch]]:
        return self.tokenizer.bos_token_id, collate_summaries

    def _evaluation_batches(self, split: str) -> FixedBatches[Batch]:
        rank, world_size = rank_and_world_size(self.trainer)
        examples = sorted(self.encoded_examples(split)[rank::world_size], key=lambda example: len(example.ids))
        starts = range(0, len(examples), self.batch_size)

        def get_batch(index: int) -> Batch:
            start = starts[index]
            return collate_summaries(examples[start : start + self.batch_size], self.tokenizer.bos_token_id)

        return FixedBatches(len(starts), get_batch)

    def _checkpoint_texts(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer.to_json(), "summary": json.dumps(vars(self.summary_prompt))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint's position; in evaluation its tokenizer is already this module's.

        Raises:
            CheckpointError: Its tokenizer is another one.
        """
        self._train_tokenizer()
        self._restore(state_dict, ("tokenizer",))

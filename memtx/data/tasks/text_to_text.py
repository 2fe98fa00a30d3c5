"""Texts and the texts to make from them, for encoder-decoders: summaries, replies, simplifications."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memtx.data.batch import IGNORE_INDEX, FixedBatches
from memtx.data.hf_tokenizers import HFTokenizer, WordPieceTokenizer
from memtx.data.tasks.base import IntArray, build_inputs, keep_newest
from memtx.data.tasks.data_module import ExampleDataModule
from memtx.data.tasks.examples import SummaryExample, read_examples, split_path
from memtx.errors import DataError


@dataclass
class EncodedPair:
    """A text and its target as tokens, each between the special tokens of a text."""

    ids: IntArray  # (length,)
    target_ids: IntArray  # (target length,)
    summary: str


class TextToTextBatch(NamedTuple):
    """A batch of texts and targets.

    Attributes:
        tokens: ``(batch, length)`` int64.
        attention_mask: ``(batch, length)`` int64, 0 for padding.
        global_attention_mask: ``(batch, length)`` int64, 1 for the first token.
        labels: ``(batch, target length)`` int64, -100 for padding.
        summaries: The targets as texts.
    """

    tokens: Tensor
    attention_mask: Tensor
    global_attention_mask: Tensor
    labels: Tensor
    summaries: list[str]


class TextToTextDataModule(ExampleDataModule[EncodedPair, TextToTextBatch]):
    """Texts and summaries in ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` of a folder.

    Raises DataError if a number is out of range.

    Args:
        root: Folder of the files.
        tokenizer: ``HFTokenizer`` with the path of any ``tokenizer.json``. Defaults to a ``WordPieceTokenizer`` that is
            trained on the training examples.
        max_length: Maximum tokens of a text, with special tokens. A longer text is an error unless ``truncate``.
        max_target_length: Maximum tokens of a summary, with special tokens.
        truncate: If True, longer texts and summaries are cut at their ends, and longer dialogues at their beginnings.
        batch_size: Examples of a batch on each device. At least 1.
        seed: Seed of the order of examples.
    """

    tokenizer: HFTokenizer

    def __init__(
        self,
        root: str | None = None,
        tokenizer: HFTokenizer | None = None,
        max_length: int = 4096,
        max_target_length: int = 256,
        truncate: bool = False,
        batch_size: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, seed, max_length=max_length, max_target_length=max_target_length)
        self.tokenizer = tokenizer if tokenizer is not None else WordPieceTokenizer()
        self.max_length, self.max_target_length, self.truncate = max_length, max_target_length, truncate

    def _read_split(self, split: str) -> list[tuple[int, SummaryExample]]:
        return read_examples(split_path(self.root, split), SummaryExample.parse)

    def _get_texts(self, example: SummaryExample) -> tuple[str, str]:
        return example.text, example.summary or ""

    def _encode(self, text: str, name: str, option: str, limit: int, from_end: bool = False) -> IntArray:
        (encoding,) = self.tokenizer.encode_with_offsets([text])
        ids, *_ = build_inputs(self.tokenizer, encoding.ids)
        if len(ids) > limit:
            if not self.truncate:
                message = f"The {name} has {len(ids)} tokens, {option} is {limit}."
                raise DataError(message, f"Raise --data.{option}, or set --data.truncate true to cut it.")
            ids = keep_newest(ids, limit) if from_end else np.concatenate([ids[: limit - 1], ids[-1:]])
        return ids

    def _encode_example(self, example: SummaryExample) -> EncodedPair:
        assert example.summary is not None
        return EncodedPair(
            self._encode(example.text, "text", "max_length", self.max_length, example.is_dialogue),
            self._encode(example.summary, "summary", "max_target_length", self.max_target_length),
            example.summary,
        )

    def _collate(self, windows: Sequence[EncodedPair]) -> TextToTextBatch:
        ids = [torch.from_numpy(window.ids) for window in windows]
        targets = [torch.from_numpy(window.target_ids) for window in windows]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        is_global = torch.zeros_like(mask)
        is_global[:, 0] = 1
        return TextToTextBatch(
            pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            mask,
            is_global,
            pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX),
            [window.summary for window in windows],
        )

    def _evaluation_batches(self, split: str) -> FixedBatches[TextToTextBatch]:
        return self._batches_by_length(split, lambda example: len(example.ids))

    def _checkpoint_texts(self) -> dict[str, str]:
        options = {"max_length": self.max_length, "max_target_length": self.max_target_length}
        return {"tokenizer": self.tokenizer.to_json(), "text_to_text": json.dumps(options)}

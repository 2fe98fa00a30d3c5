"""A task's model put to use: raw texts or examples in, labels, tags or answers out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from memtx import files
from memtx.checkpoint import pretrained
from memtx.checkpoint.load import TOKENIZER_FILE
from memtx.data.hf_tokenizers import HFTokenizer, hf_tokenizer_from_json
from memtx.data.tasks.base import EncodedExample, Logits, Task, task_from_json, task_to_json
from memtx.data.tasks.batches import BatchExamples, PreparedExample, collate, encode_examples
from memtx.errors import CheckpointError, DataError, check_at_least
from memtx.inference.base_predictor import BasePredictor, PredictInput
from memtx.models.heads import TaskModel

TASK_FILE = pretrained.SIDECAR_FILES["task"]

MAX_BATCH_TOKENS = 1 << 14
"""Places of one call, padding among them; a longer row is read alone."""


class Predictor(BasePredictor):
    """A model, its tokenizer and its task; safe to be asked from several threads, which take turns.

    Args:
        model: in eval mode, on any device.
        tokenizer: that it was trained with.
        task: likewise.
        max_batch_tokens: places of one call at most, padding among them; no effect on what is said beyond rounding.

    Raises:
        MemtxError: max_batch_tokens is not positive, or the parts do not belong together.
    """

    model: TaskModel

    def __init__(
        self, model: TaskModel, tokenizer: HFTokenizer, task: Task, *, max_batch_tokens: int = MAX_BATCH_TOKENS
    ) -> None:
        super().__init__()
        check_at_least(1, max_batch_tokens=max_batch_tokens)
        if tokenizer.vocab_size > model.vocab_size or task.num_labels != model.num_labels:
            raise CheckpointError(
                f"The tokenizer has {tokenizer.vocab_size} tokens and the task {task.num_labels} scores, the model "
                f"{model.vocab_size} and {model.num_labels}.",
                "They do not belong together; take those it was trained with.",
            )
        self.model, self.tokenizer, self.task, self.max_batch_tokens = model.eval(), tokenizer, task, max_batch_tokens
        self.task_name = task.kind

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return what is kept at ``path``: a checkpoint, a run's folder (its best), or a folder of :meth:`save`.

        Raises:
            CheckpointError: missing, damaged, or of a model that serves no task.
        """
        place = pretrained.resolve_model_path(path)
        kept = read_task_metadata(place)
        tokenizer, task = kept.get("tokenizer"), kept.get("task")
        if not isinstance(tokenizer, str) or not isinstance(task, str):
            raise CheckpointError(f"'{place}' has no tokenizer or no task in it.", "Give a run on examples.")
        model = TaskModel.from_pretrained(place)
        return cls(model, hf_tokenizer_from_json(tokenizer), task_from_json(task))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write model, tokenizer and task into the folder ``path``, as files that hold no code."""
        files.write_text(Path(path) / TOKENIZER_FILE, self.tokenizer.to_json())
        files.write_text(Path(path) / TASK_FILE, task_to_json(self.task))
        self.model.save_pretrained(path)

    def to_example(self, raw_input: PredictInput) -> Any:
        """Return one input as an example without a label.

        Args:
            raw_input: a raw text, or the fields of an example (labels may be left out).

        Raises:
            DataError: it is not what the task takes.
        """
        if isinstance(raw_input, str):
            if not raw_input.strip():
                raise DataError("The text is empty.", "Give one with something in it.")
            return self.task.from_text(raw_input)
        return self.task.parse(raw_input, False)

    def predict(self, inputs: Sequence[PredictInput], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return the task's ``postprocess`` of each input."""
        made = self._map_inputs(inputs, self._encode_input)
        windows = [window for one in made for window in one.windows]
        with self._exclusive(deadline):
            scores = self._compute_scores(windows, deadline)
        return BatchExamples(self.task, made).postprocess(scores)

    def _encode_input(self, raw_input: PredictInput) -> PreparedExample:
        # What a user may have labelled is not looked at: it need not be known.
        return encode_examples([drop_labels(self.to_example(raw_input))], self.task, self.tokenizer)[0]

    def _compute_scores(self, encoded_examples: Sequence[EncodedExample], deadline: float | None) -> list[Logits]:
        found: list[Logits] = [np.zeros(0, dtype=np.float32)] * len(encoded_examples)
        device = next(self.model.parameters()).device
        for places in self._batch_indices(encoded_examples):
            self._check_active(deadline)
            batch = collate([encoded_examples[place] for place in places], self.tokenizer.pad_token_id)
            parts = (
                part.to(device)
                for part in (batch.tokens, batch.attention_mask, batch.token_type_ids, batch.global_attention_mask)
            )
            with torch.inference_mode():
                scores = self.model(*parts).float().cpu().numpy()
            for place, row in zip(places, scores, strict=True):
                found[place] = row
            self.num_tokens_read += int(batch.attention_mask.sum())
        return found

    def _batch_indices(self, encoded_examples: Sequence[EncodedExample]) -> Iterator[list[int]]:
        """Yield the rows of each call, those of like length together."""
        call: list[int] = []
        for place in sorted(range(len(encoded_examples)), key=lambda place: len(encoded_examples[place].ids)):
            if call and (len(call) + 1) * len(encoded_examples[place].ids) > self.max_batch_tokens:
                yield call
                call = []
            call.append(place)
        if call:
            yield call


def drop_labels(example: Any) -> Any:
    """Return an example without what is to be found."""
    names = {field.name for field in fields(example)} & {"label", "tags", "answers"}
    return replace(example, **dict.fromkeys(names))


def is_task_model(path: str | os.PathLike[str]) -> bool:
    """Return whether what is kept at ``path`` is the model of a task.

    Raises:
        CheckpointError: missing, damaged or of something else.
    """
    return bool(read_task_metadata(path))


def read_task_metadata(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return what a folder or checkpoint keeps of a task: ``tokenizer`` and ``task`` or ``summary`` as JSON texts.

    Nothing where it is of no task; raises what :func:`is_task_model` raises.
    """
    kept = pretrained.read_sidecars(pretrained.resolve_model_path(path))
    return kept if kept.keys() & {"task", "summary"} else {}

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
from memtx.data.offset_tokenizers import OffsetTokenizer, offset_tokenizer_from_json
from memtx.data.task import Scores, Task, Window
from memtx.data.task_batches import Asked, Prepared, collated, prepared
from memtx.data.task_kinds import task_from_json, task_to_json
from memtx.errors import CheckpointError, DataError, at_least
from memtx.inference.answering import Answering, Input
from memtx.inference.loading import TOKENIZER
from memtx.models import folder
from memtx.models.heads import TaskModel

TASK = folder.TEXTS["task"]

AT_ONCE = 1 << 14
"""Places of one call, padding among them; a longer row is read alone."""


class Predictor(Answering):
    """A model, its tokenizer and its task; safe to be asked from several threads, which take turns.

    Args:
        model: in eval mode, on any device.
        tokenizer: that it was trained with.
        task: likewise.
        at_once: places of one call at most, padding among them; no effect on what is said beyond rounding.

    Raises:
        MemtxError: at_once is not positive, or the parts do not belong together.
    """

    model: TaskModel

    def __init__(self, model: TaskModel, tokenizer: OffsetTokenizer, task: Task, *, at_once: int = AT_ONCE) -> None:
        super().__init__()
        at_least(1, at_once=at_once)
        if tokenizer.vocab_size > model.vocab_size or task.outputs != model.outputs:
            raise CheckpointError(
                f"The tokenizer has {tokenizer.vocab_size} tokens and the task {task.outputs} scores, the model "
                f"{model.vocab_size} and {model.outputs}.",
                "They do not belong together; take those it was trained with.",
            )
        self.model, self.tokenizer, self.task, self.at_once = model.eval(), tokenizer, task, at_once
        self.kind = task.kind

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return what is kept at ``path``: a checkpoint, a run's folder (its best), or a folder of :meth:`save`.

        Raises:
            CheckpointError: missing, damaged, or of a model that serves no task.
        """
        place = folder.chosen_place(path)
        kept = task_parts(place)
        tokenizer, task = kept.get("tokenizer"), kept.get("task")
        if not isinstance(tokenizer, str) or not isinstance(task, str):
            raise CheckpointError(f"'{place}' has no tokenizer or no task in it.", "Give a run on examples.")
        model = TaskModel.from_pretrained(place)
        return cls(model, offset_tokenizer_from_json(tokenizer), task_from_json(task))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write model, tokenizer and task into the folder ``path``, as files that hold no code."""
        files.write_text(Path(path) / TOKENIZER, self.tokenizer.to_json())
        files.write_text(Path(path) / TASK, task_to_json(self.task))
        self.model.save_pretrained(path)

    def example(self, given: Input) -> Any:
        """Return one input as an example without a label.

        Args:
            given: a raw text, or the fields of an example (labels may be left out).

        Raises:
            DataError: it is not what the task takes.
        """
        if isinstance(given, str):
            if not given.strip():
                raise DataError("The text is empty.", "Give one with something in it.")
            return self.task.from_text(given)
        return self.task.parse(given, False)

    def predict(self, inputs: Sequence[Input], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return the task's ``decide`` of each input."""
        made = self._each(inputs, self._prepared)
        windows = [window for one in made for window in one.windows]
        with self._in_turn(deadline):
            scores = self._scores(windows, deadline)
        return Asked(self.task, made).answers(scores)

    def _prepared(self, given: Input) -> Prepared:
        # What a user may have labelled is not looked at: it need not be known.
        return prepared([unlabelled(self.example(given))], self.task, self.tokenizer)[0]

    def _scores(self, windows: Sequence[Window], deadline: float | None) -> list[Scores]:
        found: list[Scores] = [np.zeros(0, dtype=np.float32)] * len(windows)
        device = next(self.model.parameters()).device
        for places in self._calls(windows):
            self._go_on(deadline)
            batch = collated([windows[place] for place in places], self.tokenizer.padding)
            parts = (part.to(device) for part in (batch.tokens, batch.present, batch.types, batch.marked))
            with torch.inference_mode():
                scores = self.model(*parts).float().cpu().numpy()
            for place, row in zip(places, scores, strict=True):
                found[place] = row
            self.tokens_read += int(batch.present.sum())
        return found

    def _calls(self, windows: Sequence[Window]) -> Iterator[list[int]]:
        """Yield the rows of each call, those of like length together."""
        call: list[int] = []
        for place in sorted(range(len(windows)), key=lambda place: len(windows[place].ids)):
            if call and (len(call) + 1) * len(windows[place].ids) > self.at_once:
                yield call
                call = []
            call.append(place)
        if call:
            yield call


def unlabelled(example: Any) -> Any:
    """Return an example without what is to be found."""
    names = {field.name for field in fields(example)} & {"label", "tags", "answers"}
    return replace(example, **dict.fromkeys(names))


def serves_a_task(path: str | os.PathLike[str]) -> bool:
    """Return whether what is kept at ``path`` is the model of a task.

    Raises:
        CheckpointError: missing, damaged or of something else.
    """
    return bool(task_parts(path))


def task_parts(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return what a folder or checkpoint keeps of a task: ``tokenizer`` and ``task`` or ``summary`` as JSON texts.

    Nothing where it is of no task; raises what :func:`serves_a_task` raises.
    """
    kept = folder.kept_texts(folder.chosen_place(path))
    return kept if kept.keys() & {"task", "summary"} else {}

"""Examples of a task for training and measuring, behind Lightning's data hooks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from memtx.data.examples import read_examples, split_file
from memtx.data.offset_tokenizers import OffsetTokenizer, WordPieceTokenizer
from memtx.data.task import Task
from memtx.data.task_batches import ExampleBatches, Prepared, TaskBatch, TrainingBatches, collated, prepared
from memtx.data.task_kinds import task_to_json
from memtx.errors import CheckpointError, DataError


class TaskDataModule(LightningDataModule):
    """Examples in a folder of ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``.

    Labels and a tokenizer that learns come from the training examples, and go into the checkpoint with the task.

    Args:
        root: the folder.
        task: what kind of examples these are and how they are read.
        tokenizer: a ``WordPieceTokenizer`` to be trained (the default), or ``OffsetTokenizer`` with the path of any
            ``tokenizer.json``.
        rows: of a batch on each device, at least 1.
        eval_rows: of a batch in evaluation; null for as many as in training.
        seed: of the order of examples.

    Raises:
        DataError: a number is out of its range.
    """

    def __init__(
        self,
        task: Task,
        root: str | None = None,
        tokenizer: OffsetTokenizer | None = None,
        rows: int = 16,
        eval_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("rows", rows), ("eval_rows", eval_rows)):
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}, expected at least 1.", f"Change --data.{name}.")
        self.task, self.root, self.seed = task, root, seed
        self.tokenizer = tokenizer if tokenizer is not None else WordPieceTokenizer()
        self.rows, self.eval_rows = rows, eval_rows or rows
        self._examples: dict[str, list[tuple[int, Any]]] = {}
        self._prepared: dict[str, list[Prepared]] = {}
        self._batches: TrainingBatches[TaskBatch] | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def vocab_size(self) -> int:
        """Rows the model's embedding needs; known before any text was read."""
        return self.tokenizer.vocab_size

    @property
    def mask(self) -> int:
        """The id that stands for a token to be guessed."""
        self._learn()
        return self.tokenizer.mask

    @property
    def outputs(self) -> int:
        """Scores a row or a token; the labels are read from the training examples where none were given."""
        if not self.task.outputs:
            self.task.learn(self.examples("train"))
        return self.task.outputs

    def examples(self, split: str) -> list[Any]:
        """Return the examples of a split; raises DataError with file and line."""
        if split not in self._examples:
            self._examples[split] = read_examples(split_file(self.root, split), self.task.parse)
        return [example for _, example in self._examples[split]]

    def prepared(self, split: str) -> list[Prepared]:
        """Return a split's examples as rows of tokens.

        Raises:
            DataError: an example cannot be used; names file and line.
        """
        if split not in self._prepared:
            self._learn()
            made, path = [], split_file(self.root, split)
            self.examples(split)
            for line, example in self._examples[split]:
                try:
                    made += prepared([example], self.task, self.tokenizer)
                except DataError as error:
                    raise DataError(f"'{path}', line {line}: {error.what}", error.cure) from error
            self._prepared[split] = made
        return self._prepared[split]

    def _learn(self) -> None:
        """Take labels and tokens from the training examples, where they are to be learned."""
        if not self.tokenizer.fitted:
            self.tokenizer.fit(_texts(self.task, self.examples("train")))
        if not self.task.outputs:
            self.task.learn(self.examples("train"))

    def prepare_data(self) -> None:
        """Nothing: a split is read when it is first asked for."""

    def setup(self, stage: str | None = None) -> None:
        """Read what the stage needs; a fit begins at the start of the data unless a checkpoint says otherwise."""
        for split in {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage or "", ("test",)):
            if split != "validation" or stage != "fit" or self._has("validation"):
                self.prepared(split)
        if stage == "fit":
            self._batches = self._restored = None

    def _has(self, split: str) -> bool:
        return self.root is not None and (Path(self.root).expanduser() / f"{split}.jsonl").is_file()

    def _ranks(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> TrainingBatches[TaskBatch]:
        """Return this rank's batches, going on from the position."""
        rows, padding = self.prepared("train"), self.tokenizer.padding
        made = TrainingBatches(rows, self.rows, padding, self.seed, *self._ranks(), collate=collated)
        if self._batches is not None:  # asked again within a run
            made.load_state_dict(self._batches.state_dict())
        elif self._restored is not None:
            made.load_state_dict(self._restored)
        self._batches, self._restored = made, None
        return made

    def _measured(self, split: str) -> ExampleBatches:
        return ExampleBatches(self.prepared(split), self.task, self.eval_rows, self.tokenizer.padding, *self._ranks())

    def val_dataloader(self) -> ExampleBatches | list[Any]:
        """Return the validation examples; an empty list where there are none."""
        return self._measured("validation") if self._has("validation") else []

    def test_dataloader(self) -> ExampleBatches:
        """Return the test examples."""
        return self._measured("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and tokenizer and task as JSON text."""
        position = self._restored or {}
        if self._batches is not None:
            position = self._batches.state_dict()
        return {**position, "tokenizer": self.tokenizer.to_json(), "task": task_to_json(self.task)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's position.

        Raises:
            CheckpointError: its tokenizer or task is another one.
        """
        self._learn()
        if state_dict.get("tokenizer") != self.tokenizer.to_json() or state_dict.get("task") != task_to_json(self.task):
            raise CheckpointError(
                "The checkpoint was trained with another tokenizer or task.",
                "Use the config saved beside the checkpoint and its data.",
            )
        self._restored = {key: value for key, value in state_dict.items() if key not in ("tokenizer", "task")} or None
        if self._batches is not None and self._restored is not None:
            self._batches.load_state_dict(self._restored)
            self._restored = None


def _texts(task: Task, examples: list[Any]) -> Iterator[str]:
    for example in examples:
        yield from task.texts(example)

"""Examples of a task for training and measuring, behind Lightning's data hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from memtx.data.example_files import ExampleDataModule
from memtx.data.examples import read_examples, split_file
from memtx.data.offset_tokenizers import OffsetTokenizer, WordPieceTokenizer
from memtx.data.task import Task
from memtx.data.task_batches import ExampleBatches, Prepared, TaskBatch, collated, prepared
from memtx.data.task_kinds import task_to_json


class TaskDataModule(ExampleDataModule[Prepared, TaskBatch]):
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
        super().__init__(root, rows, seed, eval_rows=eval_rows)
        self.task, self.eval_rows = task, eval_rows or rows
        self.tokenizer = tokenizer if tokenizer is not None else WordPieceTokenizer()
        self._examples: dict[str, list[tuple[int, Any]]] = {}

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

    def _made(self, split: str) -> list[Prepared]:
        self._learn()
        self.examples(split)
        return self._by_line(split, self._examples[split], lambda one: prepared([one], self.task, self.tokenizer))

    def _learn(self) -> None:
        """Take labels and tokens from the training examples, where they are to be learned."""
        if not self.tokenizer.fitted:
            self.tokenizer.fit(_texts(self.task, self.examples("train")))
        if not self.task.outputs:
            self.task.learn(self.examples("train"))

    def _training(self) -> tuple[int, Callable[[Sequence[Any], int], TaskBatch]]:
        return self.tokenizer.padding, collated

    def _measured(self, split: str) -> ExampleBatches:
        return ExampleBatches(self.prepared(split), self.task, self.eval_rows, self.tokenizer.padding, *self._ranks())

    def _kept(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer.to_json(), "task": task_to_json(self.task)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's position.

        Raises:
            CheckpointError: its tokenizer or task is another one.
        """
        self._learn()
        self._take(state_dict, ("tokenizer", "task"))


def _texts(task: Task, examples: list[Any]) -> Iterator[str]:
    for example in examples:
        yield from task.texts(example)

"""Examples of a task for training and measuring, behind Lightning's data hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from memtx.data.hf_tokenizers import HFTokenizer, WordPieceTokenizer
from memtx.data.tasks.base import Task
from memtx.data.tasks.batches import EvaluationBatches, PreparedExample, TaskBatch, collate, encode_examples
from memtx.data.tasks.example_files import ExampleDataModule
from memtx.data.tasks.examples import read_examples, split_path
from memtx.data.tasks.serialization import task_to_json


class TaskDataModule(ExampleDataModule[PreparedExample, TaskBatch]):
    """Examples in a folder of ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``.

    Labels and a tokenizer that learns come from the training examples, and go into the checkpoint with the task.

    Args:
        root: the folder.
        task: what kind of examples these are and how they are read.
        tokenizer: a ``WordPieceTokenizer`` to be trained (the default), or ``HFTokenizer`` with the path of any
            ``tokenizer.json``.
        batch_size: of a batch on each device, at least 1.
        eval_batch_size: of a batch in evaluation; null for as many as in training.
        seed: of the order of examples.

    Raises:
        DataError: a number is out of its range.
    """

    def __init__(
        self,
        task: Task,
        root: str | None = None,
        tokenizer: HFTokenizer | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, seed, eval_batch_size=eval_batch_size)
        self.task, self.eval_batch_size = task, eval_batch_size or batch_size
        self.tokenizer = tokenizer if tokenizer is not None else WordPieceTokenizer()
        self._examples: dict[str, list[tuple[int, Any]]] = {}

    @property
    def vocab_size(self) -> int:
        """Rows the model's embedding needs; known before any text was read."""
        return self.tokenizer.vocab_size

    @property
    def mask_token_id(self) -> int:
        """The id that stands for a token to be guessed."""
        self._fit_to_training_examples()
        return self.tokenizer.mask_token_id

    @property
    def num_labels(self) -> int:
        """Scores a row or a token; the labels are read from the training examples where none were given."""
        if not self.task.num_labels:
            self.task.fit_labels(self.load_examples("train"))
        return self.task.num_labels

    def load_examples(self, split: str) -> list[Any]:
        """Return the examples of a split; raises DataError with file and line."""
        if split not in self._examples:
            self._examples[split] = read_examples(split_path(self.root, split), self.task.parse)
        return [example for _, example in self._examples[split]]

    def _encode_split(self, split: str) -> list[PreparedExample]:
        self._fit_to_training_examples()
        self.load_examples(split)
        return self._encode_lines(
            split, self._examples[split], lambda one: encode_examples([one], self.task, self.tokenizer)
        )

    def _fit_to_training_examples(self) -> None:
        """Take labels and tokens from the training examples, where they are to be learned."""
        if not self.tokenizer.is_trained:
            self.tokenizer.train(_iter_texts(self.task, self.load_examples("train")))
        if not self.task.num_labels:
            self.task.fit_labels(self.load_examples("train"))

    def _train_collation(self) -> tuple[int, Callable[[Sequence[Any], int], TaskBatch]]:
        return self.tokenizer.pad_token_id, collate

    def _evaluation_batches(self, split: str) -> EvaluationBatches:
        return EvaluationBatches(
            self.encoded_examples(split),
            self.task,
            self.eval_batch_size,
            self.tokenizer.pad_token_id,
            *self._rank_and_world_size(),
        )

    def _checkpoint_texts(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer.to_json(), "task": task_to_json(self.task)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's position.

        Raises:
            CheckpointError: its tokenizer or task is another one.
        """
        self._fit_to_training_examples()
        self._restore(state_dict, ("tokenizer", "task"))


def _iter_texts(task: Task, examples: list[Any]) -> Iterator[str]:
    for example in examples:
        yield from task.get_texts(example)

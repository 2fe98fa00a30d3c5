"""Data modules of examples in JSON lines, and what they share: splits, encoding, the position in the checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning.pytorch import LightningDataModule

from memtx.data.batch import check_counts, rank_and_world_size
from memtx.data.hf_tokenizers import HFTokenizer, WordPieceTokenizer
from memtx.data.tasks.base import Task, task_to_json
from memtx.data.tasks.batches import (
    EvaluationBatches,
    HasWindows,
    PreparedExample,
    TaskBatch,
    TrainingBatches,
    collate,
    encode_examples,
)
from memtx.data.tasks.examples import read_examples, split_path
from memtx.errors import CheckpointError, DataError

B = TypeVar("B")
R = TypeVar("R", bound=HasWindows)


class ExampleDataModule(LightningDataModule, Generic[R, B]):
    """Base of data modules over ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` in a folder.

    Args:
        root: Folder of the files.
        batch_size: Windows of a batch on each device. At least 1.
        seed: Seed of the order of examples.
        **counts: Further options by name, each at least 1 or None.

    Raises:
        DataError: A number is out of range.
    """

    def __init__(self, root: str | None, batch_size: int, seed: int, **counts: int | None) -> None:
        super().__init__()
        check_counts(batch_size=batch_size, **counts)
        self.root, self.batch_size, self.seed = root, batch_size, seed
        self._encoded_examples: dict[str, list[R]] = {}
        self._batches: TrainingBatches[B] | None = None
        self._restored_position: dict[str, Any] | None = None

    # Implemented by subclasses

    @abstractmethod
    def _encode_split(self, split: str) -> list[R]:
        """Read and encode a split; raises DataError with file and line."""

    @abstractmethod
    def _train_collation(self) -> tuple[int, Callable[[Sequence[Any], int], B]]:
        """Return the padding id, and the function that makes a batch from windows and that id."""

    @abstractmethod
    def _evaluation_batches(self, split: str) -> Any:
        """Return the batches of a split for evaluation."""

    @abstractmethod
    def _checkpoint_texts(self) -> dict[str, str]:
        """Return what a checkpoint holds beside the position, as texts, fitted to the training examples if needed."""

    # Called by Lightning and by training

    def encoded_examples(self, split: str) -> list[R]:
        """Return the encoded examples of a split, read once.

        Raises:
            DataError: An example cannot be used; names file and line.
        """
        if split not in self._encoded_examples:
            self._encoded_examples[split] = self._encode_split(split)
        return self._encoded_examples[split]

    def _encode_lines(
        self, split: str, examples: Sequence[tuple[int, Any]], encode: Callable[[Any], list[R]]
    ) -> list[R]:
        """Encode examples with line numbers; errors name file and line."""
        encoded: list[R] = []
        for line, example in examples:
            try:
                encoded += encode(example)
            except DataError as error:
                location = f"'{split_path(self.root, split)}', line {line}"
                raise DataError(f"{location}: {error.message}", error.hint) from error
        return encoded

    def setup(self, stage: str | None = None) -> None:
        """Read what the stage needs; a fit begins at the start of the data unless a checkpoint is restored."""
        for split in {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage or "", ("test",)):
            if split != "validation" or stage != "fit" or self._has_validation():
                self.encoded_examples(split)
        if stage == "fit":
            self._batches = self._restored_position = None

    def _has_validation(self) -> bool:
        return self.root is not None and (Path(self.root).expanduser() / "validation.jsonl").is_file()

    def train_dataloader(self) -> TrainingBatches[B]:
        """Return this rank's batches from the position on."""
        examples = self.encoded_examples("train")
        pad_token_id, collate_fn = self._train_collation()
        ranks = rank_and_world_size(self.trainer)
        batches = TrainingBatches(examples, self.batch_size, pad_token_id, self.seed, *ranks, collate_fn=collate_fn)
        if self._batches is not None:  # called again within a run
            batches.load_state_dict(self._batches.state_dict())
        elif self._restored_position is not None:
            batches.load_state_dict(self._restored_position)
        self._batches, self._restored_position = batches, None
        return batches

    def val_dataloader(self) -> Any:
        """Return the validation examples; an empty list if there are none."""
        return self._evaluation_batches("validation") if self._has_validation() else []

    def test_dataloader(self) -> Any:
        """Return the test examples."""
        return self._evaluation_batches("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the texts of the checkpoint."""
        position = self._batches.state_dict() if self._batches is not None else self._restored_position or {}
        return {**position, **self._checkpoint_texts()}

    def _restore(self, state_dict: dict[str, Any], required: Sequence[str]) -> None:
        """Restore a checkpoint's position.

        Args:
            state_dict: What :meth:`state_dict` returned.
            required: Names of the texts that must equal this module's.

        Raises:
            CheckpointError: One of them differs.
        """
        texts = self._checkpoint_texts()
        if any(state_dict.get(name) != texts[name] for name in required):
            raise CheckpointError(
                f"The checkpoint was trained with another {' or '.join(required)}.",
                "Use the config saved beside the checkpoint and its data.",
            )
        self._restored_position = {key: value for key, value in state_dict.items() if key not in texts} or None
        if self._batches is not None and self._restored_position is not None:
            self._batches.load_state_dict(self._restored_position)
            self._restored_position = None


class TaskDataModule(ExampleDataModule[PreparedExample, TaskBatch]):
    """Examples of a task in ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` of a folder.

    Labels and a trained tokenizer come from the training examples, and are in the checkpoint with the task.

    Args:
        root: Folder of the files.
        task: Task of the examples.
        tokenizer: ``HFTokenizer`` with the path of any ``tokenizer.json``. Defaults to a ``WordPieceTokenizer`` that is
            trained on the training examples.
        batch_size: Windows of a batch on each device. At least 1.
        eval_batch_size: Windows of a batch in evaluation. None uses ``batch_size``.
        seed: Seed of the order of examples.

    Raises:
        DataError: A number is out of range.
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
        """Vocabulary size; known before any text is read."""
        return self.tokenizer.vocab_size

    @property
    def mask_token_id(self) -> int:
        """Id of a masked token."""
        self._fit_to_training_examples()
        return self.tokenizer.mask_token_id

    @property
    def num_labels(self) -> int:
        """Number of logits per example or per token; labels are read from the training examples if none were given."""
        self._fit_labels()
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
            split, self._examples[split], lambda example: encode_examples([example], self.task, self.tokenizer)
        )

    def _fit_labels(self) -> None:
        if not self.task.num_labels:
            self.task.fit_labels(self.load_examples("train"))

    def _fit_to_training_examples(self) -> None:
        """Learn tokens and labels from the training examples, where there are none yet."""
        if not self.tokenizer.is_trained:
            examples = self.load_examples("train")
            self.tokenizer.train(text for example in examples for text in self.task.get_texts(example))
        self._fit_labels()

    def _train_collation(self) -> tuple[int, Callable[[Sequence[Any], int], TaskBatch]]:
        return self.tokenizer.pad_token_id, collate

    def _evaluation_batches(self, split: str) -> EvaluationBatches:
        examples, ranks = self.encoded_examples(split), rank_and_world_size(self.trainer)
        return EvaluationBatches(examples, self.task, self.eval_batch_size, self.tokenizer.pad_token_id, *ranks)

    def _checkpoint_texts(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer.to_json(), "task": task_to_json(self.task)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint's position.

        Raises:
            CheckpointError: Its tokenizer or task is another one.
        """
        self._fit_to_training_examples()
        self._restore(state_dict, ("tokenizer", "task"))

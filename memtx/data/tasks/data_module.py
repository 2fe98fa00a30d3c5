"""Data modules of examples in JSON lines, and what they share: splits, encoding, the position in the checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from memtx.data.batch import FixedBatches, PinnedTransfer, check_options, limit_epochs, rank_and_world_size
from memtx.data.hf_tokenizers import HFTokenizer, WordPieceTokenizer
from memtx.data.tasks.base import PreparedExample, Task, task_to_json
from memtx.data.tasks.batches import EvaluationBatches, TaskBatch, TrainingBatches, collate, collate_examples
from memtx.data.tasks.examples import find_split, read_examples, split_path
from memtx.data.tokenizers import Tokenizer
from memtx.errors import CheckpointError, DataError

B = TypeVar("B")
R = TypeVar("R")


class ExampleDataModule(PinnedTransfer, LightningDataModule, Generic[R, B]):
    """Base of data modules over ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` in a folder.

    ``**counts`` are further options by name; as ``batch_size``, each must be at least 1 or None, or DataError is
    raised.
    """

    # Texts of a checkpoint that must be those of this module.
    REQUIRED_TEXTS: ClassVar[tuple[str, ...]] = ("tokenizer",)
    tokenizer: Tokenizer

    def __init__(self, root: str | None, batch_size: int, seed: int, **counts: int | None) -> None:
        super().__init__()
        check_options(1, batch_size=batch_size, **counts)
        self.root, self.batch_size, self.seed = root, batch_size, seed
        self._encoded_examples: dict[str, list[R]] = {}
        self._batches: TrainingBatches[B] | None = None
        self._restored_position: dict[str, Any] | None = None

    @property
    def vocab_size(self) -> int:
        """Vocabulary size; known before any text is read."""
        return self.tokenizer.vocab_size

    @abstractmethod
    def _read_split(self, split: str) -> list[tuple[int, Any]]:
        """Return line numbers and examples; raises DataError with file and line."""

    @abstractmethod
    def _get_texts(self, example: Any) -> tuple[str, ...]:
        """Return the texts to train a tokenizer on."""

    @abstractmethod
    def _encode_example(self, example: Any) -> R:
        """Encode an example; raises DataError if it cannot be used."""

    def _training_windows(self) -> list[Any]:
        """Return the windows of the training examples; by default each is one."""
        return self.encoded_examples("train")

    @abstractmethod
    def _collate(self, windows: Sequence[Any]) -> B:
        """Return windows as one batch, padded at the end to the longest."""

    @abstractmethod
    def _evaluation_batches(self, split: str) -> Any:
        """Return the batches of a split for evaluation."""

    @abstractmethod
    def _checkpoint_texts(self) -> dict[str, str]:
        """Return what a checkpoint holds beside the position, as texts, fitted to the training examples if needed."""

    def _batches_by_length(self, split: str, length: Callable[[R], int]) -> FixedBatches[B]:
        """Return this rank's examples of a split as batches of similar length."""
        rank, world_size = rank_and_world_size(self.trainer)
        examples = sorted(self.encoded_examples(split)[rank::world_size], key=length)
        batch_starts = range(0, len(examples), self.batch_size)
        batches = [examples[start : start + self.batch_size] for start in batch_starts]
        return FixedBatches(len(batches), lambda index: self._collate(batches[index]))

    def encoded_examples(self, split: str) -> list[R]:
        """Return the encoded examples of a split, read once; raises DataError with file and line of an unusable one."""
        if split not in self._encoded_examples:
            self._fit_to_training_examples()
            encoded: list[R] = []
            for line, example in self._read_split(split):
                try:
                    encoded.append(self._encode_example(example))
                except DataError as error:
                    location = f"'{split_path(self.root, split)}', line {line}"
                    raise DataError(f"{location}: {error.message}", error.hint) from error
            self._encoded_examples[split] = encoded
        return self._encoded_examples[split]

    def _fit_to_training_examples(self) -> None:
        """Train the tokenizer on the training examples, if it is not trained."""
        if not self.tokenizer.is_trained:
            examples = self._read_split("train")
            self.tokenizer.train(text for _, example in examples for text in self._get_texts(example))

    def setup(self, stage: str | None = None) -> None:
        """Read what the stage needs; a fit begins at the start of the data unless a checkpoint is restored."""
        for split in {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage or "", ("test",)):
            if split != "validation" or stage != "fit" or self.has_split("validation"):
                self.encoded_examples(split)
        if stage == "fit":
            self._batches = self._restored_position = None

    def has_split(self, split: str) -> bool:
        """Return whether there are examples of a split; raises DataError if there is no folder of examples."""
        return find_split(self.root, split) is not None

    def train_dataloader(self) -> TrainingBatches[B]:
        """Return this rank's batches from the position on."""
        windows, ranks = self._training_windows(), rank_and_world_size(self.trainer)
        batches = TrainingBatches(windows, self.batch_size, self._collate, self.seed, *ranks)
        limit_epochs(batches, self.trainer)
        if self._batches is not None:  # called again within a run
            batches.load_state_dict(self._batches.state_dict())
        elif self._restored_position is not None:
            batches.load_state_dict(self._restored_position)
        self._batches, self._restored_position = batches, None
        return batches

    def val_dataloader(self) -> Any:
        """Return the validation examples; an empty list if there are none."""
        if not self.has_split("validation"):
            rank_zero_info(f"'{self.root}' has no validation.jsonl, so there is no validation.")
            return []
        return self._evaluation_batches("validation")

    def test_dataloader(self) -> Any:
        """Return the test examples."""
        return self._evaluation_batches("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the texts of the checkpoint."""
        position = self._batches.state_dict() if self._batches is not None else self._restored_position or {}
        return {**position, **self._checkpoint_texts()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint's position; raises CheckpointError if its tokenizer or task is another one."""
        self._fit_to_training_examples()
        texts = self._checkpoint_texts()
        if any(state_dict.get(name) != texts[name] for name in self.REQUIRED_TEXTS):
            message = f"The checkpoint was trained with another {' or '.join(self.REQUIRED_TEXTS)}."
            raise CheckpointError(message, "Use the config saved beside the checkpoint and its data.")
        self._restored_position = {key: value for key, value in state_dict.items() if key not in texts} or None
        if self._batches is not None and self._restored_position is not None:
            self._batches.load_state_dict(self._restored_position)
            self._restored_position = None


class TaskDataModule(ExampleDataModule[PreparedExample, TaskBatch]):
    """Examples of a task in ``train.jsonl``, ``validation.jsonl`` (or valid, val, dev, eval) and ``test.jsonl``.

    Labels and a trained tokenizer come from the training examples, and are in the checkpoint with the task. Raises
    DataError if a number is out of range.

    Args:
        root: Folder of the files.
        task: Task of the examples.
        tokenizer: ``HFTokenizer`` with the path of any ``tokenizer.json``. Defaults to a ``WordPieceTokenizer`` that is
            trained on the training examples.
        batch_size: Windows of a batch on each device, or examples of a task with several texts an example (choices,
            query and documents). At least 1.
        eval_batch_size: Windows of a batch in evaluation. None uses ``batch_size``.
        seed: Seed of the order of examples.
    """

    REQUIRED_TEXTS = ("tokenizer", "task")
    tokenizer: HFTokenizer

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
    def mask_token_id(self) -> int:
        """Id of a masked token."""
        self._fit_to_training_examples()
        return self.tokenizer.mask_token_id

    @property
    def num_labels(self) -> int:
        """Number of logits per example or per token; labels are read from the training examples if none were given."""
        self._fit_labels()
        return self.task.num_labels

    def _read_split(self, split: str) -> list[tuple[int, Any]]:
        if split not in self._examples:
            self._examples[split] = read_examples(split_path(self.root, split), self.task.parse)
        return self._examples[split]

    def _get_texts(self, example: Any) -> tuple[str, ...]:
        return self.task.get_texts(example)

    def _encode_example(self, example: Any) -> PreparedExample:
        return self.task.prepare(example, self.tokenizer)

    def _fit_labels(self) -> None:
        if not self.task.num_labels:
            self.task.fit_labels(example for _, example in self._read_split("train"))

    def _fit_to_training_examples(self) -> None:
        super()._fit_to_training_examples()
        self._fit_labels()

    def encoded_examples(self, split: str) -> list[PreparedExample]:
        """Return the encoded examples of a split, read once, and say on stderr what is in none of their windows."""
        is_new = split not in self._encoded_examples
        examples = super().encoded_examples(split)
        if is_new and (losses := self.task.describe_losses(examples)):
            rank_zero_info(f"memtx: '{split_path(self.root, split)}': {losses}")
        return examples

    def count_labels(self) -> tuple[list[int], int]:
        """Return the number of training examples, or words, with each label in order, and of all examples."""
        examples = self._read_split("train")
        counts = Counter(label for _, example in examples for label in self.task.get_labels(example))
        return [counts[label] for label in self.task.labels], len(examples)

    def _training_windows(self) -> list[Any]:
        examples = self.encoded_examples("train")
        if self.task.keeps_windows_together:
            return examples
        return [window for prepared in examples for window in prepared.windows]

    def _collate(self, windows: Sequence[Any]) -> TaskBatch:
        if self.task.keeps_windows_together:
            return collate_examples(windows, self.tokenizer.pad_token_id)
        return collate(windows, self.tokenizer.pad_token_id)

    def _evaluation_batches(self, split: str) -> EvaluationBatches:
        examples, ranks = self.encoded_examples(split), rank_and_world_size(self.trainer)
        return EvaluationBatches(examples, self.task, self.eval_batch_size, self.tokenizer.pad_token_id, *ranks)

    def _checkpoint_texts(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer.to_json(), "task": task_to_json(self.task)}

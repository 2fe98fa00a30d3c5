"""Examples in a folder behind Lightning's data hooks: what all kinds of them do alike, the position among it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning.pytorch import LightningDataModule

from memtx.data.tasks.batches import HasWindows, TrainingBatches
from memtx.data.tasks.examples import split_path
from memtx.errors import CheckpointError, DataError

B = TypeVar("B")
R = TypeVar("R", bound=HasWindows)


class ExampleDataModule(LightningDataModule, Generic[R, B]):
    """A folder of ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``.

    Args:
        root: the folder.
        batch_size: of a batch on each device, at least 1.
        seed: of the order of examples.
        sizes: further numbers by name, each at least 1 or None.

    Raises:
        DataError: a number is out of its range.
    """

    def __init__(self, root: str | None, batch_size: int, seed: int, **sizes: int | None) -> None:
        super().__init__()
        for name, value in {"batch_size": batch_size, **sizes}.items():
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}, expected at least 1.", f"Change --data.{name}.")
        self.root, self.batch_size, self.seed = root, batch_size, seed
        self._encoded_examples: dict[str, list[R]] = {}
        self._batches: TrainingBatches[B] | None = None
        self._restored_position: dict[str, Any] | None = None

    # What a kind of examples says of itself

    @abstractmethod
    def _encode_split(self, split: str) -> list[R]:
        """Read a split and make rows of it; raises DataError with file and line."""

    @abstractmethod
    def _train_collation(self) -> tuple[int, Callable[[Sequence[Any], int], B]]:
        """Return the id that fills rows up, and what makes a batch of rows and that id."""

    @abstractmethod
    def _evaluation_batches(self, split: str) -> Any:
        """Return a split's batches for evaluation."""

    @abstractmethod
    def _checkpoint_texts(self) -> dict[str, str]:
        """Return what a checkpoint keeps of the data beside the position, as texts; learned first if need be."""

    # What Lightning asks

    def encoded_examples(self, split: str) -> list[R]:
        """Return a split's examples as rows of tokens, read once.

        Raises:
            DataError: an example cannot be used; names file and line.
        """
        if split not in self._encoded_examples:
            self._encoded_examples[split] = self._encode_split(split)
        return self._encoded_examples[split]

    def _encode_lines(
        self, split: str, examples: Sequence[tuple[int, Any]], encode: Callable[[Any], list[R]]
    ) -> list[R]:
        """Make rows of examples and their lines; what is wrong with one is said with file and line."""
        made: list[R] = []
        path = split_path(self.root, split)
        for line, example in examples:
            try:
                made += encode(example)
            except DataError as error:
                raise DataError(f"'{path}', line {line}: {error.message}", error.hint) from error
        return made

    def setup(self, stage: str | None = None) -> None:
        """Read what the stage needs; a fit begins at the start of the data unless a checkpoint says otherwise."""
        for split in {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage or "", ("test",)):
            if split != "validation" or stage != "fit" or self._has_validation():
                self.encoded_examples(split)
        if stage == "fit":
            self._batches = self._restored_position = None

    def _has_validation(self) -> bool:
        return self.root is not None and (Path(self.root).expanduser() / "validation.jsonl").is_file()

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> TrainingBatches[B]:
        """Return this rank's batches, going on from the position."""
        examples = self.encoded_examples("train")
        padding, collate = self._train_collation()
        made = TrainingBatches(
            examples, self.batch_size, padding, self.seed, *self._rank_and_world_size(), collate_fn=collate
        )
        if self._batches is not None:  # asked again within a run
            made.load_state_dict(self._batches.state_dict())
        elif self._restored_position is not None:
            made.load_state_dict(self._restored_position)
        self._batches, self._restored_position = made, None
        return made

    def val_dataloader(self) -> Any:
        """Return the validation examples; an empty list where there are none."""
        return self._evaluation_batches("validation") if self._has_validation() else []

    def test_dataloader(self) -> Any:
        """Return the test examples."""
        return self._evaluation_batches("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what else is kept as texts."""
        position = self._batches.state_dict() if self._batches is not None else self._restored_position or {}
        return {**position, **self._checkpoint_texts()}

    def _restore(self, state_dict: dict[str, Any], required: Sequence[str]) -> None:
        """Take a checkpoint's position.

        Args:
            state_dict: as :meth:`state_dict` returned it.
            required: which of the texts must be this module's.

        Raises:
            CheckpointError: one of them is another one.
        """
        own = self._checkpoint_texts()
        if any(state_dict.get(name) != own[name] for name in required):
            raise CheckpointError(
                f"The checkpoint was trained with another {' or '.join(required)}.",
                "Use the config saved beside the checkpoint and its data.",
            )
        self._restored_position = {key: value for key, value in state_dict.items() if key not in own} or None
        if self._batches is not None and self._restored_position is not None:
            self._batches.load_state_dict(self._restored_position)
            self._restored_position = None

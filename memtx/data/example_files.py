"""Examples in a folder behind Lightning's data hooks: what all kinds of them do alike, the position among it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning.pytorch import LightningDataModule

from memtx.data.examples import split_file
from memtx.data.task_batches import Rows, TrainingBatches
from memtx.errors import CheckpointError, DataError

B = TypeVar("B")
R = TypeVar("R", bound=Rows)


class ExampleDataModule(LightningDataModule, Generic[R, B]):
    """A folder of ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``.

    Args:
        root: the folder.
        rows: of a batch on each device, at least 1.
        seed: of the order of examples.
        sizes: further numbers by name, each at least 1 or None.

    Raises:
        DataError: a number is out of its range.
    """

    def __init__(self, root: str | None, rows: int, seed: int, **sizes: int | None) -> None:
        super().__init__()
        for name, value in {"rows": rows, **sizes}.items():
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}, expected at least 1.", f"Change --data.{name}.")
        self.root, self.rows, self.seed = root, rows, seed
        self._prepared: dict[str, list[R]] = {}
        self._batches: TrainingBatches[B] | None = None
        self._restored: dict[str, Any] | None = None

    # What a kind of examples says of itself

    @abstractmethod
    def _made(self, split: str) -> list[R]:
        """Read a split and make rows of it; raises DataError with file and line."""

    @abstractmethod
    def _training(self) -> tuple[int, Callable[[Sequence[Any], int], B]]:
        """Return the id that fills rows up, and what makes a batch of rows and that id."""

    @abstractmethod
    def _measured(self, split: str) -> Any:
        """Return a split's batches for evaluation."""

    @abstractmethod
    def _kept(self) -> dict[str, str]:
        """Return what a checkpoint keeps of the data beside the position, as texts; learned first if need be."""

    # What Lightning asks

    def prepared(self, split: str) -> list[R]:
        """Return a split's examples as rows of tokens, read once.

        Raises:
            DataError: an example cannot be used; names file and line.
        """
        if split not in self._prepared:
            self._prepared[split] = self._made(split)
        return self._prepared[split]

    def _by_line(self, split: str, found: Sequence[tuple[int, Any]], make: Callable[[Any], list[R]]) -> list[R]:
        """Make rows of examples and their lines; what is wrong with one is said with file and line."""
        made: list[R] = []
        path = split_file(self.root, split)
        for line, example in found:
            try:
                made += make(example)
            except DataError as error:
                raise DataError(f"'{path}', line {line}: {error.what}", error.cure) from error
        return made

    def setup(self, stage: str | None = None) -> None:
        """Read what the stage needs; a fit begins at the start of the data unless a checkpoint says otherwise."""
        for split in {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage or "", ("test",)):
            if split != "validation" or stage != "fit" or self._validates():
                self.prepared(split)
        if stage == "fit":
            self._batches = self._restored = None

    def _validates(self) -> bool:
        return self.root is not None and (Path(self.root).expanduser() / "validation.jsonl").is_file()

    def _ranks(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> TrainingBatches[B]:
        """Return this rank's batches, going on from the position."""
        examples = self.prepared("train")
        padding, collate = self._training()
        made = TrainingBatches(examples, self.rows, padding, self.seed, *self._ranks(), collate=collate)
        if self._batches is not None:  # asked again within a run
            made.load_state_dict(self._batches.state_dict())
        elif self._restored is not None:
            made.load_state_dict(self._restored)
        self._batches, self._restored = made, None
        return made

    def val_dataloader(self) -> Any:
        """Return the validation examples; an empty list where there are none."""
        return self._measured("validation") if self._validates() else []

    def test_dataloader(self) -> Any:
        """Return the test examples."""
        return self._measured("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what else is kept as texts."""
        position = self._batches.state_dict() if self._batches is not None else self._restored or {}
        return {**position, **self._kept()}

    def _take(self, state_dict: dict[str, Any], compared: Sequence[str]) -> None:
        """Take a checkpoint's position.

        Args:
            state_dict: as :meth:`state_dict` returned it.
            compared: which of the texts must be this module's.

        Raises:
            CheckpointError: one of them is another one.
        """
        own = self._kept()
        if any(state_dict.get(name) != own[name] for name in compared):
            raise CheckpointError(
                f"The checkpoint was trained with another {' or '.join(compared)}.",
                "Use the config saved beside the checkpoint and its data.",
            )
        self._restored = {key: value for key, value in state_dict.items() if key not in own} or None
        if self._batches is not None and self._restored is not None:
            self._batches.load_state_dict(self._restored)
            self._restored = None

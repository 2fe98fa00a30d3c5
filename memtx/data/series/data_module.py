"""Series in CSV and NumPy files as a Lightning data module: memory-mapped, standardized, in endless streams."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from memtx.data.batch import check_options, limit_epochs, rank_and_world_size
from memtx.data.series.files import CSV_SUFFIXES, NUMPY_SUFFIX, is_series_file, open_columns, read_column_names
from memtx.data.series.schema import SeriesSchema, find_columns
from memtx.data.series.store import Series, SeriesEvaluationStreams, SeriesStore, SeriesStreams, compute_statistics
from memtx.data.sources.splits import SPLIT_HINT, infer_splits
from memtx.data.stream_module import StreamDataModule
from memtx.errors import CheckpointError, DataError
from memtx.files import default_cache_dir

SERIES_HINT = (
    "Give a folder or file of series: CSV with a line of column names, or NumPy arrays (steps, columns) in .npy files."
)


class SeriesDataModule(StreamDataModule[SeriesStreams]):
    """Series of numbers, one in each file; the checkpoint holds the position, the columns and the standardization.

    CSV is converted once to an array in the cache; both kinds of files are memory-mapped. Names of files and folders
    give the splits (train, validation, test). Without such names, the last steps of every series are its validation and
    test parts. Mean and standard deviation are those of the training parts.

    Raises DataError if a number is out of range, or a file is no series: no header, lines of unequal width, or values
    that are missing or no numbers.

    Args:
        root: Folder or file of series.
        columns: Names of the columns to read; of an array "0", "1" and so on. Defaults to all.
        targets: Names of the columns to predict. Defaults to ``columns``.
        steps_ahead: Steps from the newest input to the predicted values.
        batch_size: Streams per device.
        segment_length: Steps per stream in one call of the model.
        bptt_segments: Segments per batch, so per truncated backward pass.
        max_length: Steps after which a training series is cut, each part with a fresh memory. None cuts the series only
            if they are fewer than the streams, into as many parts.
        eval_batch_size: Streams per device in evaluation. None uses ``batch_size``.
        validation_fraction: Fraction of each series to validate on, without splits by name.
        test_fraction: Fraction of each series to test on, after that.
        seed: Seed of the order of series.
        cache_dir: Folder of converted files. None uses ~/.cache/memtx.
    """

    content_and_hint: ClassVar[tuple[str, str]] = ("series", SERIES_HINT)
    """Words for the command line's message without ``root``."""

    def __init__(
        self,
        root: str | None = None,
        columns: Sequence[str] | None = None,
        targets: Sequence[str] | None = None,
        steps_ahead: int = 1,
        batch_size: int = 8,
        segment_length: int = 128,
        bptt_segments: int = 1,
        max_length: int | None = None,
        eval_batch_size: int | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        check_options(1, batch_size=batch_size, segment_length=segment_length, bptt_segments=bptt_segments)
        check_options(1, max_length=max_length, eval_batch_size=eval_batch_size)
        check_options(0, seed=seed, steps_ahead=steps_ahead)
        if root is None:
            raise DataError("root is not set, expected a folder or file of series.", SERIES_HINT)
        for name, value in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
            if not 0.0 <= value < 1.0 or validation_fraction + test_fraction >= 1.0:
                message = f"{name} is {value}, expected at least 0, and less than 1 together with the other fraction."
                raise DataError(message, f"Change data.{name}.")
        self.root, self.steps_ahead, self.seed = Path(root).expanduser(), steps_ahead, seed
        self.batch_size, self.segment_length, self.bptt_segments = batch_size, segment_length, bptt_segments
        self.length = segment_length * bptt_segments
        self.max_length, self.eval_batch_size = max_length, eval_batch_size or batch_size
        self.fractions = {"validation": validation_fraction, "test": test_fraction}
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        names = read_column_names(self._split_files[0][1])
        self.columns = tuple(map(str, columns)) if columns is not None else names
        self.targets = tuple(map(str, targets)) if targets is not None else self.columns
        for option, chosen in (("columns", self.columns), ("targets", self.targets)):
            if not chosen or len(set(chosen)) < len(chosen):
                raise DataError(f"{option} is {list(chosen)}.", f"Name each column once in data.{option}.")
            find_columns(chosen, names, str(self._split_files[0][1]))
        if steps_ahead == 0 and (known := set(self.columns) & set(self.targets)):
            message = f"steps_ahead is 0, but the target '{min(known)}' is read, too."
            raise DataError(message, "Set data.steps_ahead to at least 1, or name other columns.")
        self.input_dim, self.output_dim = len(self.columns), len(self.targets)
        self._schema: SeriesSchema | None = None
        self._checked_splits: dict[str, tuple[list[Series], str]] = {}

    @cached_property
    def _split_files(self) -> list[tuple[str | None, Path]]:
        """Files with the splits that their names give, or None; says what is left out."""
        if not self.root.exists():
            raise DataError(f"'{self.root}' does not exist.", SERIES_HINT)
        if self.root.is_file():
            paths, others = [self.root], []
        else:
            everything = sorted(path for path in self.root.rglob("*") if path.is_file())
            paths = [path for path in everything if is_series_file(path)]
            others = [path for path in everything if not is_series_file(path)]
        if not paths or not is_series_file(paths[0]):
            endings = ", ".join((*CSV_SUFFIXES, NUMPY_SUFFIX))
            raise DataError(f"'{self.root}' holds no series, expected files ending in {endings}.", SERIES_HINT)
        splits: list[str | None] = [None]
        if self.root.is_dir():
            names = [path.relative_to(self.root).as_posix() for path in paths]
            splits = infer_splits([name.removesuffix(NUMPY_SUFFIX) for name in names])
        if any(splits) and "train" not in splits:
            splits = [split or "train" for split in splits]
        if any(splits):
            others += [path for split, path in zip(splits, paths, strict=True) if split is None]
        if others:
            examples = ", ".join(f"'{path}'" for path in others[:3]) + (", ..." if len(others) > 3 else "")
            rank_zero_info(f"'{self.root}': not read: {examples}.")
        return [(split, path) for split, path in zip(splits, paths, strict=True) if split or not any(splits)]

    @property
    def _has_named_splits(self) -> bool:
        return any(split for split, _ in self._split_files)

    def has_split(self, split: str) -> bool:
        """Return whether there are series in a split."""
        if self._has_named_splits:
            return any(split == other for other, _ in self._split_files)
        return split == "train" or self.fractions[split] > 0

    def _open_checked_split(self, split: str) -> tuple[list[Series], str]:
        """Return the series of a split and the SHA-256 of their values, which are finite; each is read once."""
        if split not in self._checked_splits:
            series = self._open_split(split)
            names = tuple(dict.fromkeys((*self.columns, *self.targets)))
            self._checked_splits[split] = series, compute_statistics(series, names)[2]
        return self._checked_splits[split]

    def _open_split(self, split: str) -> list[Series]:
        """Return the series of a split; raises DataError if there are none."""
        names = tuple(dict.fromkeys((*self.columns, *self.targets)))
        series = []
        for file_split, path in self._split_files:
            if file_split not in (split, None):
                continue
            values = open_columns(path, names, self.cache_dir)
            bounds = {"train": (0, len(values)), "validation": (0, len(values)), "test": (0, len(values))}
            if file_split is None:
                test = len(values) - round(self.fractions["test"] * len(values))
                validation = test - round(self.fractions["validation"] * len(values))
                bounds = {"train": (0, validation), "validation": (validation, test), "test": (test, len(values))}
            start, stop = bounds[split]
            if stop - start > self.steps_ahead:
                series.append(Series(path, values, start, stop))
            else:
                message = f"'{path}': its {split} part has {stop - start} steps, too few for steps_ahead"
                rank_zero_info(f"{message} {self.steps_ahead}; it is not read.")
        if not series:
            message = f"'{self.root}' has no series of more than {self.steps_ahead} steps in the split '{split}'."
            raise DataError(message, f"{SPLIT_HINT} Or change data.validation_fraction and data.test_fraction.")
        return series

    @cached_property
    def _train_store(self) -> SeriesStore:
        series = self._open_split("train")
        names = tuple(dict.fromkeys((*self.columns, *self.targets)))
        mean, std, fingerprint = compute_statistics(series, names)
        statistics = (dict(zip(names, values.tolist(), strict=True)) for values in (mean, std))
        if self._schema is None:
            self._schema = SeriesSchema(self.columns, self.targets, self.steps_ahead, *statistics)
        num_streams = self.batch_size * rank_and_world_size(self.trainer)[1]
        max_length = self.max_length
        if max_length is None and len(series) < num_streams:
            max_length = max(self.steps_ahead + 1, -(-sum(map(len, series)) // num_streams))
        pieces = [piece for part in series for piece in ([part] if max_length is None else part.cut(max_length))]
        return SeriesStore(pieces, f"{fingerprint}:{max_length}", self._schema)

    @property
    def schema(self) -> SeriesSchema:
        """Columns and statistics: of a restored checkpoint, or else of the training series."""
        return self._schema if self._schema is not None else self._train_store.schema

    def prepare_data(self) -> None:
        """Convert and check the series of a fit, so that a mistake in them comes before any work."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            _ = self._train_store
            if self.has_split("validation"):
                self._open_checked_split("validation")

    def train_dataloader(self) -> SeriesStreams:
        """Return this rank's streams from the position on; raises CheckpointError if it is in other series."""
        ranks = rank_and_world_size(self.trainer)
        streams = SeriesStreams(self._train_store, self.batch_size, self.length, self.seed, *ranks)
        limit_epochs(streams, self.trainer)
        return self._continue_with(streams)

    def val_dataloader(self) -> SeriesEvaluationStreams | list[Any]:
        """Return the validation series; an empty list if there are none."""
        if not self.has_split("validation"):
            rank_zero_info(f"'{self.root}' has no validation split, so there is no validation. {SPLIT_HINT}")
            return []
        return self._evaluation_streams("validation")

    def test_dataloader(self) -> SeriesEvaluationStreams:
        """Return the test series."""
        return self._evaluation_streams("test")

    def _evaluation_streams(self, split: str) -> SeriesEvaluationStreams:
        store = SeriesStore(*self._open_checked_split(split), self.schema)
        ranks = rank_and_world_size(self.trainer)
        return SeriesEvaluationStreams(store, self.eval_batch_size, self.length, *ranks)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, what identifies its data, and the schema as JSON text."""
        return {**self._position_state(), "series": self.schema.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint's position and standardization; raises CheckpointError if its columns are others."""
        schema = SeriesSchema.from_json(str(state_dict.get("series")))
        for name in ("columns", "targets", "steps_ahead"):
            if (saved := getattr(schema, name)) != (value := getattr(self, name)):
                message = f"The checkpoint was trained with {name} {saved}, this run has {value}."
                raise CheckpointError(message, f"Set data.{name} as in the config saved beside the checkpoint.")
        if self._schema is not None and self._schema != schema:
            # Its statistics are of other series, unless these are the checkpoint's.
            self.__dict__.pop("_train_store", None)
        self._schema = schema
        self._restore_position({key: value for key, value in state_dict.items() if key != "series"})

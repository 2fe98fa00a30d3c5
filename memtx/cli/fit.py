"""``memtx fit|validate|test|predict``: LightningCLI with memtx's module, data, run folder and one-line errors."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO

from memtx.cli.common import INTERRUPTED, MISTAKE, complain, run, short_message
from memtx.data.books import BookDataModule
from memtx.errors import MemtxError
from memtx.inference.loading import chosen_checkpoint
from memtx.layers.feed_forward import SwiGLU
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.callbacks.checkpoint import AtomicCheckpointIO, BestCheckpoint
from memtx.training.callbacks.interrupt import StopOnInterrupt
from memtx.training.callbacks.throughput import Throughput
from memtx.training.language import LanguageModule

LAST = "last.ckpt"


class OneLineParser(LightningArgumentParser):
    """Says what is wrong in one line, with the nearest valid key, and exits with code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Write the line and exit."""
        complain(short_message(message, self._known()))
        raise SystemExit(MISTAKE)

    def _known(self) -> list[str]:
        parts: list[Any] = [MemoryTransformer, CompressedMemory, SwiGLU, LanguageModule, BookDataModule, Trainer]
        inner = [name for part in parts for name in inspect.signature(part).parameters]
        parsers = [self, *getattr(self, "_subparsers_by_name", {}).values()]
        return [action.dest for parser in parsers for action in parser._actions] + inner


class MemtxCLI(LightningCLI):
    """One YAML is one run, in one folder: config.yaml, checkpoints/, metrics.csv and TensorBoard's events."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's folder and the checkpoint's settings, and let the data decide the vocabulary."""
        parser.add_argument("--run", type=str, default="runs/memtx", help="The run's folder.")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.link_arguments("data.segment", "model.segment")
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        # Lightning's reads the whole checkpoint here and lets its settings overrule what the user typed.
        return

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint, and refuse to write over a run, before any work."""
        settings = self.config[self.subcommand]
        folder = Path(settings.run) / "checkpoints"
        asked = settings.get("ckpt_path")
        if self.subcommand == "fit":
            if asked is None and (folder / LAST).exists():
                raise MemtxError(
                    f"'{settings.run}' already holds a run.",
                    "Add --ckpt_path last to go on with it, or give another folder by --run.",
                )
            settings.ckpt_path = str(folder / LAST) if asked == "last" and (folder / LAST).exists() else asked
            if asked == "last" and not (folder / LAST).exists():
                settings.ckpt_path = None
        else:
            settings.ckpt_path = str(_checkpoint(Path(settings.run), asked))
        if settings.ckpt_path is not None and not Path(settings.ckpt_path).exists():
            raise MemtxError(f"The checkpoint '{settings.ckpt_path}' does not exist.", "Check --ckpt_path.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put loggers and checkpoints into the run's folder, unless the user chose others."""
        settings = self.config_init[self.subcommand]
        run_folder = settings.run
        if settings.trainer.logger is None:
            kwargs["logger"] = [
                CSVLogger(run_folder, name="", version=""),
                TensorBoardLogger(run_folder, name="", version="", default_hp_metric=False),
            ]
        kwargs.setdefault("default_root_dir", run_folder)
        plugins = settings.trainer.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(one, CheckpointIO) for one in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        if settings.checkpoint.dirpath is None:
            settings.checkpoint.dirpath = str(Path(run_folder) / "checkpoints")
        if settings.trainer.logger is False:
            # It refuses to run where it has nowhere to write.
            always = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [one for one in always if not isinstance(one, LearningRateMonitor)]
        return super().instantiate_trainer(**kwargs)


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder when training begins, not when a checkpoint is measured."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Save on fit alone."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


def _checkpoint(run_folder: Path, asked: str | None) -> Path:
    if asked in (None, "best"):
        return chosen_checkpoint(run_folder)
    place = run_folder / "checkpoints" / LAST if asked == "last" else Path(str(asked))
    return chosen_checkpoint(place) if place.is_dir() else place


def _quiet() -> None:
    # Advice to install other products, and warnings about choices made here on purpose.
    for text in (
        ".*does not have many workers.*",
        ".*does not seem to be.*",
        ".*LeafSpec.*",
        ".*no logger configured.*",
    ):
        warnings.filterwarnings("ignore", message=text)
    noise = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    noise.addFilter(lambda record: "litlogger" not in record.getMessage() and "Tip" not in record.getMessage())


def main(argv: list[str]) -> int:
    """Run LightningCLI on ``argv`` (subcommand first) and return the exit code."""
    _quiet()
    interactive = sys.stderr.isatty() or sys.stdout.isatty()
    callbacks: list[Any] = [Throughput(), LearningRateMonitor("step"), StopOnInterrupt()]
    if interactive:
        callbacks.append(RichProgressBar())

    def body() -> int:
        sys.argv = [sys.argv[0]]
        try:
            MemtxCLI(
                LanguageModule,
                BookDataModule,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={
                    "callbacks": callbacks,
                    "gradient_clip_val": 1.0,
                    "use_distributed_sampler": False,
                    "devices": 1,
                    "enable_progress_bar": interactive,
                },
                parser_class=OneLineParser,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                args=argv,
            )
        except SystemExit as stopped:
            if isinstance(stopped.__context__, KeyboardInterrupt):
                return INTERRUPTED
            return stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else MISTAKE
        return 0

    return run(body)


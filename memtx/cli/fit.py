"""``memtx fit|validate|test|predict``: LightningCLI with memtx's module, data, run folder and one-line errors."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from torch.multiprocessing.spawn import ProcessExitedException

from memtx import files
from memtx.checkpoint import pretrained, recovery
from memtx.checkpoint.load import DATA_MODULE_KEY
from memtx.checkpoint.training import AtomicCheckpointIO, BestCheckpoint
from memtx.cli.config import check_config, find_config_files, format_parser_error, read_config
from memtx.cli.launcher import get_trainer_kwargs
from memtx.cli.main import program_name
from memtx.cli.options import EXIT_INTERRUPTED, EXIT_USAGE_ERROR, print_error, run
from memtx.cli.warning_filters import install_warning_filters
from memtx.data.books import BookDataModule
from memtx.data.sources.corpus import PG19_HINT
from memtx.data.tokenizers import tokenizer_from_json
from memtx.errors import CheckpointError, DataError, MemtxError
from memtx.layers.feed_forward import SwiGLU
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.ops.cpu import cpu_info
from memtx.training.callbacks.gates import ClosedGateMonitor
from memtx.training.callbacks.health import MemoryNormMonitor
from memtx.training.callbacks.interrupt import INTERRUPT_EXIT_CODE, StopOnInterrupt
from memtx.training.callbacks.oom import OutOfMemoryHint, is_out_of_memory
from memtx.training.callbacks.predictions import PredictionWriter
from memtx.training.callbacks.progress import PlainProgress, StepProgressBar
from memtx.training.callbacks.skip_nonfinite import SkipNonFinite
from memtx.training.callbacks.throughput import Throughput
from memtx.training.callbacks.worth import UnusedMemoryWarning
from memtx.training.csv_logger import ResumableCSVLogger
from memtx.training.language import LanguageModule

LAST_CHECKPOINT = "last.ckpt"
CONFIG_FILE = "config.yaml"
CHECKPOINT_DIR = "checkpoints"
PREDICTION_DIR = "predictions"
DEFAULT_RUN_DIR = "runs/memtx"


class OneLineParser(LightningArgumentParser):
    """Says what is wrong in one line, with the nearest valid key, and exits with code 2."""

    # Of the class: the parser makes others of its kind for the parts, whose errors are to name the file as well.
    configs: ClassVar[dict[str, dict[str, Any]]] = {}

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """Look at the config files, then parse."""
        subcommands = getattr(self, "_subcommands_action", None)
        if isinstance(args, list) and subcommands is not None and args:
            self.configs.clear()
            chosen = subcommands._name_parser_map.get(args[0])
            for path in find_config_files(args) if chosen is not None else ():
                self.configs[path] = read_config(path)
                check_config(path, self.configs[path], [action.dest for action in chosen._actions])
        return super().parse_args(args, *rest, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Write the line and exit."""
        cause: BaseException | None = ex
        while cause is not None and not isinstance(cause, MemtxError):
            cause = cause.__cause__ or cause.__context__
        print_error(str(cause) if cause is not None else format_parser_error(message, self.configs, self._known_keys()))
        raise SystemExit(EXIT_USAGE_ERROR)

    def _known_keys(self) -> list[str]:
        parts: list[Any] = [MemoryTransformer, CompressedMemory, SwiGLU, LanguageModule, BookDataModule, Trainer]
        inner = [name for part in parts for name in inspect.signature(part).parameters]
        subcommands = getattr(self, "_subcommands_action", None)
        parsers = [self, *(subcommands._name_parser_map.values() if subcommands is not None else ())]
        return [action.dest for parser in parsers for action in parser._actions] + inner


class MemtxCLI(LightningCLI):
    """One YAML is one run, in one folder: config.yaml, checkpoints/, metrics.csv and TensorBoard's events."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's folder and the checkpoint's settings, and let the data decide the vocabulary."""
        parser.add_argument("--run_dir", type=str, default=DEFAULT_RUN_DIR, help="The run's folder.")
        parser.add_argument("--traceback", action="store_true", help="Show where in the program a mistake was noticed.")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        self.link_data_arguments(parser)

    def link_data_arguments(self, parser: LightningArgumentParser) -> None:
        """Let numbers flow from the data into the module."""
        parser.link_arguments("data.segment_length", "model.segment_length")
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        # Lightning's reads the whole checkpoint here and lets its settings overrule what the user typed.
        return

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint, and refuse to write over a run, before any work."""
        self._checkpoint: dict[str, Any] | None = None
        settings = self.config[self.subcommand]
        self.check_data_config(settings)
        run_folder, asked = Path(settings.run_dir), settings.get("ckpt_path")
        if self.subcommand == "fit":
            if run_folder.is_dir():
                files.recover(run_folder / CHECKPOINT_DIR / LAST_CHECKPOINT)
            if asked is None and any((run_folder / CHECKPOINT_DIR).glob("*.ckpt")):
                raise MemtxError(
                    f"'{settings.run_dir}' already holds a run.",
                    "Add --ckpt_path last to go on with it, or give another folder by --run_dir.",
                )
            if run_folder.exists() and not run_folder.is_dir():
                raise MemtxError(
                    f"'{settings.run_dir}' is a file, expected a folder.", "Give another one by --run_dir."
                )
            if asked == "last":
                self._resume_from_last(settings, run_folder / CHECKPOINT_DIR)
                return
        else:
            asked = asked or "best"
        settings.ckpt_path = None if asked is None else str(_resolve_checkpoint(run_folder, asked))
        if settings.ckpt_path is None:
            return
        if not Path(settings.ckpt_path).exists():
            raise CheckpointError(f"The checkpoint '{settings.ckpt_path}' does not exist.", "Check --ckpt_path.")
        self._checkpoint = pretrained.read_metadata(settings.ckpt_path)
        if self.subcommand != "fit":
            self.restore_data_config(settings, self._checkpoint)
        if self.subcommand == "predict" and settings.return_predictions is None:
            settings.return_predictions = False

    def _resume_from_last(self, config: Any, checkpoint_dir: Path) -> None:
        """Take the newest whole checkpoint; a run that has none yet begins."""
        found = recovery.find_latest_valid(checkpoint_dir)
        config.ckpt_path = None if found is None else str(found.path)
        if found is not None:
            self._checkpoint = found.content
            if found.damaged:
                _print_rank_zero(f"memtx: {found.describe_damage()}\n")

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            seed = self.config[self.subcommand].seed_everything
            raise MemtxError(f"seed_everything is {seed}, expected 0 to 4294967295.", "Change it.") from error

    def check_data_config(self, config: Any) -> None:
        """Refuse to begin without texts."""
        if config.data.root is None:
            raise DataError(f"data.root is not set, expected the folder of texts{format_config_hint()}.", PG19_HINT)

    def restore_data_config(self, config: Any, checkpoint: dict[str, Any]) -> None:
        """Take the tokenizer of the checkpoint that is measured: its model knows no other's ids."""
        text = (checkpoint.get(DATA_MODULE_KEY) or {}).get("tokenizer")
        if isinstance(text, str):
            config.data.tokenizer = tokenizer_from_json(text)

    def instantiate_classes(self) -> None:
        """Make everything; what a class says against its arguments is the user's to read."""
        try:
            super().instantiate_classes()
        except Exception as error:  # a class may say it by any: null where a list belongs is a TypeError
            raise _to_memtx_error(error) from error
        if self._checkpoint is not None:
            # Before anything is written, though Lightning will ask again when it restores.
            content, self._checkpoint = self._checkpoint, None
            path = self.config[self.subcommand].ckpt_path
            try:
                self.model.on_load_checkpoint(content)
            except MemtxError as error:
                raise CheckpointError(f"'{path}': {error.message}", error.hint) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put loggers and checkpoints into the run's folder, unless the user chose others."""
        settings = self.config_init[self.subcommand]
        run_folder = settings.run_dir
        if settings.trainer.logger is None:
            # Measuring a run must not touch what its training logged.
            kwargs["logger"] = self.subcommand == "fit" and [
                ResumableCSVLogger(run_folder, resume=settings.ckpt_path is not None),
                TensorBoardLogger(run_folder, name="", version="", default_hp_metric=False),
            ]
        kwargs.setdefault("default_root_dir", run_folder)
        # Not the config's: it is to begin the same run on another machine.
        kwargs |= get_trainer_kwargs(os.environ)
        asked = str(settings.trainer.precision)
        if (precision := cpu_info.choose_precision(asked, str(settings.trainer.accelerator))) != asked:
            kwargs["precision"] = precision
            _print_rank_zero(f"memtx: this CPU is many times slower in bfloat16: {precision} stands in for {asked}.\n")
        plugins = settings.trainer.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(one, CheckpointIO) for one in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        if settings.checkpoint.dirpath is None:
            settings.checkpoint.dirpath = str(Path(run_folder) / CHECKPOINT_DIR)
        # What the user gives stands for ours of its kind; and one refuses to run where it has nowhere to write.
        given = settings.trainer.callbacks or []
        unwanted = {type(one) for one in (given if isinstance(given, list) else [given])}
        if not kwargs.get("logger", settings.trainer.logger):
            unwanted.add(LearningRateMonitor)
        always = self.trainer_defaults["callbacks"]
        self.trainer_defaults["callbacks"] = [one for one in always if type(one) not in unwanted]
        if self.subcommand == "predict":
            always = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [*always, PredictionWriter(Path(run_folder) / PREDICTION_DIR)]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Try optimiser and schedule on one number, so that a wrong setting shows before anything is written."""
        try:
            groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
            optimizer = self.model.make_optimizer(groups)
            if self.model.make_scheduler is not None:
                self.model.make_scheduler(optimizer)
        except MemtxError:
            raise
        except (ValueError, TypeError) as error:
            raise MemtxError(f"model.optimizer or model.scheduler: {error}.", "Change its init_args.") from error

    def after_fit(self) -> None:
        """Say where the run is."""
        settings = self.config[self.subcommand]
        if self.trainer.is_global_zero and not settings.trainer.fast_dev_run:
            sys.stdout.write(
                f"The run is in '{settings.run_dir}'. memtx test --run_dir {settings.run_dir} measures it.\n"
            )

    def after_predict(self) -> None:
        """Say where the predictions are."""
        if self.trainer.is_global_zero:
            target = Path(self.config[self.subcommand].run_dir) / PREDICTION_DIR
            sys.stdout.write(f"Every document's figures and every token's surprisal are in '{target}'.\n")

    def _run_subcommand(self, subcommand: str) -> None:
        run_folder = Path(self.config[subcommand].run_dir)
        is_new = not run_folder.exists()
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            # What failed before a first step leaves no folder behind.
            begun = self.trainer.global_step or any((run_folder / CHECKPOINT_DIR).glob("*"))
            if subcommand == "fit" and is_new and not begun:
                shutil.rmtree(run_folder, ignore_errors=True)
            if isinstance(error, MisconfigurationException):
                raise _to_memtx_error(error) from error
            if is_out_of_memory(error):
                raise MemtxError(getattr(error, "__notes__", ["The memory is full."])[-1]) from error
            raise


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder when training begins, not when a checkpoint is measured."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave it until the checkpoint has been restored."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write what was asked for; without the checkpoint, so that the same file begins the same run again."""
        if trainer.is_global_zero:
            config = self.config.clone()
            config.ckpt_path, config.traceback = None, False
            text = self.parser.dump(config, skip_none=False)
            files.write_text(Path(config.run_dir) / CONFIG_FILE, text)


@rank_zero_only
def _print_rank_zero(text: str) -> None:
    sys.stderr.write(text)


def format_config_hint() -> str:
    """Return the end of a sentence that names the configs given, whose first lines say more; empty without one."""
    which = ", ".join(f"'{path}'" for path in OneLineParser.configs)
    return f"; the first lines of {which} say which" if which else ""


def _to_memtx_error(error: Exception) -> MemtxError:
    """Return the one line of an error that a class raised about its arguments."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemtxError):
            return cause
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return MemtxError(lines[0] if lines else type(error).__name__, "Add --traceback to see where.")


def _resolve_checkpoint(run_dir: Path, checkpoint: str) -> Path:
    if checkpoint == "best":
        return pretrained.find_checkpoint(run_dir)
    place = run_dir / CHECKPOINT_DIR / LAST_CHECKPOINT if checkpoint == "last" else Path(checkpoint)
    return pretrained.find_checkpoint(place) if place.is_dir() else place


def _get_option(argv: list[str], option: str) -> str | None:
    for place, one in enumerate(argv):
        if one.startswith(f"{option}="):
            return one.partition("=")[2]
        if one == option and place + 1 < len(argv):
            return argv[place + 1]
    return None


def add_run_config(argv: list[str]) -> list[str]:
    """Return ``argv`` with the config that a run was made with, where a run is measured and none is given.

    The run is named by ``--run_dir``, else found from ``--ckpt_path``.
    """
    if argv[0] == "fit" or find_config_files(argv) or "--help" in argv or "-h" in argv:
        return argv
    named, checkpoint = _get_option(argv, "--run_dir"), _get_option(argv, "--ckpt_path")
    places = [Path(named if named is not None else DEFAULT_RUN_DIR)]
    if named is None and checkpoint not in (None, "best", "last"):
        place = Path(str(checkpoint))
        places = [place, place.parent, place.parent.parent]
    for place in places:
        if (place / CONFIG_FILE).is_file():
            run_option = [] if named is not None else ["--run_dir", str(place)]
            return [argv[0], "--config", str(place / CONFIG_FILE), *run_option, *argv[1:]]
    return argv


def uses_class_paths(argv: list[str]) -> bool:
    """Return whether a config says by class paths which module is trained on which data, as tasks' configs do."""
    parts = [read_config(path).get(key) for path in find_config_files(argv) for key in ("model", "data")]
    return any(isinstance(part, dict) and "class_path" in part for part in parts)


def main(argv: list[str]) -> int:
    """Run LightningCLI on ``argv`` (subcommand first) and return the exit code."""
    install_warning_filters()
    interactive = sys.stderr.isatty() or sys.stdout.isatty()
    callbacks: list[Any] = [
        Throughput(),
        LearningRateMonitor("step"),
        UnusedMemoryWarning(),
        ClosedGateMonitor(),
        StopOnInterrupt(),
    ]
    callbacks += [SkipNonFinite(), MemoryNormMonitor(), OutOfMemoryHint()]
    callbacks.append(StepProgressBar() if interactive else PlainProgress())

    arguments = add_run_config(argv)

    def body() -> int:
        # Other processes of the run (strategy ddp) are started with these.
        sys.argv[1:] = arguments
        # Classes of one's own, by class_path from a file beside the config; last, so that it hides nothing.
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)
        cli: type[MemtxCLI] = MemtxCLI
        parts: tuple[Any, Any] = (LanguageModule, BookDataModule)
        if uses_class_paths(arguments):
            from memtx.cli.class_config_cli import BASE_CLASSES, ClassPathCLI

            cli, parts = ClassPathCLI, BASE_CLASSES
        try:
            cli(
                *parts,
                save_config_callback=SaveConfig,
                trainer_defaults={
                    "callbacks": callbacks,
                    "gradient_clip_val": 1.0,
                    "use_distributed_sampler": False,
                    "devices": 1,
                    "enable_progress_bar": interactive,
                },
                parser_class=OneLineParser,
                parser_kwargs={"prog": program_name(sys.argv[0])},
                seed_everything_default=0,
                auto_configure_optimizers=False,
                subclass_mode_model=cli is not MemtxCLI,
                subclass_mode_data=cli is not MemtxCLI,
                args=arguments,
            )
        except SystemExit as stopped:
            if isinstance(stopped.__context__, KeyboardInterrupt):
                return EXIT_INTERRUPTED
            return stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else EXIT_USAGE_ERROR
        except ProcessExitedException as stopped:
            if stopped.exit_code != INTERRUPT_EXIT_CODE:
                raise
            return EXIT_INTERRUPTED
        return 0

    return run(body, traceback="--traceback" in argv)

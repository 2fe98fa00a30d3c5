"""LightningCLI with memtx's module, data and run folder, and with one-line errors."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO

from memtx import files
from memtx.checkpoint import pretrained, recovery
from memtx.checkpoint.training import AtomicCheckpointIO, BestCheckpoint, find_best_checkpoint
from memtx.cli import ray_engine
from memtx.cli.class_report import write_class_report
from memtx.cli.config import (
    CONFIG_FILE,
    DEFAULT_RUN_DIR,
    find_class,
    get_option_values,
    put_configs_first,
    uses_class_paths,
)
from memtx.cli.missing_root import missing_root_error
from memtx.cli.one_line_parser import OneLineParser, to_memtx_error
from memtx.cli.options import print_next_command
from memtx.cli.overrides import expand_variables
from memtx.data.books import BookDataModule
from memtx.data.tokenizers import tokenizer_from_json
from memtx.errors import CheckpointError, MemtxError
from memtx.ops.cpu.cpu_info import choose_precision
from memtx.training import trackers
from memtx.training.base_module import BaseModule, adapt_to_checkpoint
from memtx.training.callbacks.defaults import adapt_options
from memtx.training.callbacks.oom import is_out_of_memory
from memtx.training.callbacks.predictions import PredictionWriter
from memtx.training.csv_logger import ResumableCSVLogger
from memtx.training.language import LanguageModule
from memtx.training.memformer import MemformerModule
from memtx.training.optimizers import build_optimizer

LAST_CHECKPOINT = "last.ckpt"
CHECKPOINT_DIR = "checkpoints"
PREDICTION_DIR = "predictions"


class MemtxCLI(LightningCLI):
    """LightningCLI with one folder per run: config.yaml, checkpoints/, metrics.csv and TensorBoard events.

    A config may name module and data by class path, as task configs do; otherwise it trains a language model on books.
    """

    @classmethod
    def from_arguments(cls, argv: list[str], prog: str, **options: Any) -> Self:
        """Parse ``argv``, subcommand first, build all objects and run the subcommand."""
        argv = put_configs_first(argv)
        class_paths = uses_class_paths(argv)
        return cls(
            BaseModule if class_paths else LanguageModule,
            None if class_paths else BookDataModule,
            parser_class=OneLineParser,
            parser_kwargs={"prog": prog},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            subclass_mode_model=class_paths,
            subclass_mode_data=class_paths,
            args=argv,
            **options,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the run folder and the checkpoints, and link the options that follow from the data."""
        parser.add_argument("--run_dir", type=str, default=DEFAULT_RUN_DIR, help="Folder of the run.")
        parser.add_argument(
            "--float32_matmul_precision", type=Literal["highest", "high", "medium"], default="high",
            help="Precision of float32 products on a GPU: 'highest' keeps 24 bits, 'high' rounds factors to TF32.",
        )  # fmt: skip
        parser.add_argument(
            "--engine", type=Literal["local", "ray"], default="local",
            help="Engine of fit: 'ray' starts trainer.num_nodes x trainer.devices workers on a Ray cluster that shares "
            "the files, and restarts them from the last checkpoint if one dies.",
        )  # fmt: skip
        parser.add_argument("--max_restarts", type=int, default=3, help="Restarts by engine 'ray' after a death.")
        parser.add_argument("--traceback", action="store_true", help="Also print the traceback of an error.")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        if not self.subclass_mode_data:
            # The user names the texts, so that a run without options does not train on the embedded ones.
            parser.set_defaults({"data.root": None})
            parser.link_arguments("data.segment_length", "model.segment_length")
            parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
            return
        keys = ("vocab_size", "segment_length", "num_labels", "mask_token_id", "input_dim", "output_dim")
        for key in (*keys, "sentinel_token_ids"):
            # Linked from the object: if an attribute is missing, Lightning reads all data for its error message.
            parser.link_arguments(
                "data", f"model.init_args.{key}", lambda data, key=key: getattr(data, key, None), apply_on="instantiate"
            )

    def _parse_ckpt_path(self) -> None:
        # Lightning would read the whole checkpoint here and let its settings override the user's.
        return

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            seed = self.config[self.subcommand].seed_everything
            raise MemtxError(f"seed_everything is {seed}, expected 0 to 4294967295.", "Change it.") from error

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint, and refuse to overwrite a run, before any work."""
        self._checkpoint: dict[str, Any] | None = None
        config = self.config[self.subcommand]
        config.run_dir = expand_variables(str(config.run_dir))
        if self.subcommand == "fit":
            self._check_data_config(config)
        run_dir, checkpoint = Path(config.run_dir), config.get("ckpt_path")
        checkpoint_dir = run_dir / CHECKPOINT_DIR
        if self.subcommand == "fit":
            if run_dir.is_dir():
                files.recover(checkpoint_dir / LAST_CHECKPOINT)
            elif run_dir.exists():
                raise MemtxError(f"'{run_dir}' is a file, expected a folder.", "Give another one with --run_dir.")
            if checkpoint is None and any(checkpoint_dir.glob("*.ckpt")):
                hint = "Resume it with --ckpt_path last, or give another folder with --run_dir."
                raise MemtxError(f"'{run_dir}' already holds a run.", hint)
            if config.engine == "ray":
                raise SystemExit(ray_engine.fit_config([*sys.argv[1:], "--engine=local"], config))
            if checkpoint == "last":
                self._resume_from_last(config, checkpoint_dir)
                return
        else:
            checkpoint = checkpoint or "best"
        if checkpoint is None:
            config.ckpt_path = None
            return
        path = _resolve_checkpoint(run_dir, checkpoint)
        config.ckpt_path = str(path)
        if not path.exists():
            raise CheckpointError(f"The checkpoint '{path}' does not exist.", "Check --ckpt_path.")
        self._checkpoint = pretrained.read_metadata(path)
        if self.subcommand != "fit":
            self._check_data_config(config)
            self._restore_data_config(config, self._checkpoint)
        if self.subcommand == "predict" and "series" in pretrained.sidecars_from_checkpoint(self._checkpoint):
            hint = f"Use memtx predict FILE --checkpoint {run_dir}, or memtx test for the test series."
            raise MemtxError("--run_dir and --ckpt_path are for the test texts of a language model.", hint)
        if self.subcommand == "predict" and config.return_predictions is None:
            config.return_predictions = False

    def _resume_from_last(self, config: Any, checkpoint_dir: Path) -> None:
        """Resume from the newest valid checkpoint; a run without one starts from scratch."""
        recovered = recovery.find_latest_valid(checkpoint_dir)
        config.ckpt_path = None if recovered is None else str(recovered.path)
        self._checkpoint = None if recovered is None else recovered.content
        if recovered is not None and recovered.damaged:
            _print_rank_zero(f"memtx: {recovered.describe_damage()}\n")

    def _check_data_config(self, config: Any) -> None:
        """Raise if the config names no texts or examples."""
        for name in ("model", "data") if self.subclass_mode_data else ():
            if config.get(name) is None or "class_path" not in config[name]:
                message = f"Only one of model and data has a class_path; '{name}' has none."
                raise MemtxError(message, "Set both class paths, or neither.")
        data_options = get_data_options(config)
        if data_options.get("root", "") is not None:
            return
        if data_options.get("source") is not None:
            data_options.root = "embedded"  # not read, as the source takes its place
            return
        data_class = find_class(config.data.class_path) if self.subclass_mode_data else BookDataModule
        raise missing_root_error(data_class, is_fit=self.subcommand == "fit")

    def _restore_data_config(self, config: Any, checkpoint: dict[str, Any]) -> None:
        """Use the checkpoint's tokenizer and task, which its model was trained with."""
        options, sidecars = get_data_options(config), pretrained.sidecars_from_checkpoint(checkpoint)
        if "task" in sidecars and "task" in options:
            from memtx.data.hf_tokenizers import hf_tokenizer_from_json
            from memtx.data.tasks.base import task_from_json

            options.tokenizer = hf_tokenizer_from_json(sidecars["tokenizer"])
            options.task = task_from_json(sidecars["task"])
        elif "tokenizer" in sidecars and "tokenizer" in options and "task" not in sidecars:
            options.tokenizer = tokenizer_from_json(sidecars["tokenizer"])

    def instantiate_classes(self) -> None:
        """Build all objects and turn errors of their constructors into one line."""
        try:
            super().instantiate_classes()
        except Exception as error:  # of any class: null in place of a list is a TypeError
            raise to_memtx_error(error) from error
        if self._checkpoint is not None:
            # Lightning restores the checkpoint later; check it before anything is written.
            checkpoint, self._checkpoint = self._checkpoint, None
            path = self.config[self.subcommand].ckpt_path
            try:
                adapt_to_checkpoint(self.trainer, self.model, checkpoint)
                self.model.on_load_checkpoint(checkpoint)
            except MemtxError as error:
                raise CheckpointError(f"'{path}': {error.message}", error.hint) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Write logs and checkpoints to the run folder, unless the user chose other loggers and callbacks."""
        config = self.config_init[self.subcommand]
        run_dir, trainer = Path(config.run_dir), config.trainer
        if trainer.logger is None and not trainer.barebones:
            # Evaluation must not change the logs of training.
            kwargs["logger"] = self.subcommand == "fit" and [
                ResumableCSVLogger(config.run_dir, resume=config.ckpt_path is not None),
                TensorBoardLogger(config.run_dir, name="", version="", default_hp_metric=False),
            ]
        kwargs.setdefault("default_root_dir", config.run_dir)
        # Not in the config, which must start the same run on another machine.
        kwargs |= get_launcher_kwargs(os.environ)
        if torch.cuda.is_available():
            torch.set_float32_matmul_precision(config.float32_matmul_precision)
        precision = choose_precision(str(trainer.precision), str(trainer.accelerator))
        if precision != str(trainer.precision):
            kwargs["precision"] = precision
            change = f"using {precision} instead of {trainer.precision}"
            _print_rank_zero(f"memtx: this CPU is many times slower in bfloat16: {change}.\n")
        plugins = _to_list(trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(run_dir / CHECKPOINT_DIR)
        if self.subcommand == "predict":
            self.trainer_defaults["callbacks"] = [PredictionWriter(run_dir / PREDICTION_DIR)]
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        for logger in _to_list(config["logger"]):
            trackers.separate_names(logger)
        interactive = sys.stderr.isatty() or sys.stdout.isatty()
        return super()._instantiate_trainer(adapt_options(config, callbacks, interactive), [])

    def before_fit(self) -> None:
        """Try optimizer and schedule, so that a wrong setting fails before any work."""
        with torch.random.fork_rng(devices=[]):
            optimizer = build_optimizer(self.model.make_optimizer, torch.nn.Linear(2, 2))
        if self.model.make_scheduler is not None:
            self.model.make_scheduler(optimizer)

    def after_fit(self) -> None:
        """Print the run folder, and how to test it if that is possible."""
        config = self.config[self.subcommand]
        if reason := self._describe_untestable(Path(config.run_dir)):
            _print_rank_zero(f"memtx: {reason}\n")
            return
        if self.trainer.is_global_zero and not config.trainer.fast_dev_run:
            sys.stdout.write(f"The run is in '{config.run_dir}'. ")
            print_next_command("Test it with", "test", "--run_dir", str(config.run_dir))

    def after_validate(self) -> None:
        """Print the command that tests the run."""
        if self.trainer.is_global_zero:
            self._write_class_report()
            print_next_command("Test it with", "test", *self._checkpoint_options())

    def after_test(self) -> None:
        """Print a command that uses the model."""
        if self.trainer.is_global_zero:
            self._write_class_report()
            self._print_use()

    def _write_class_report(self) -> None:
        folder = Path(self.config[self.subcommand].run_dir) / str(self.subcommand)
        write_class_report(getattr(self.model, "report", None), folder)

    def _checkpoint_options(self) -> list[str]:
        checkpoints = get_option_values(sys.argv[1:], "--ckpt_path")
        option = ["--ckpt_path", checkpoints[-1]] if checkpoints else []
        return ["--run_dir", str(self.config[self.subcommand].run_dir), *option]

    def _print_use(self) -> None:
        path = str(self.config[self.subcommand].ckpt_path)
        sidecars = pretrained.read_sidecars(pretrained.resolve_model_path(path))
        if not sidecars.keys().isdisjoint(pretrained.TASK_SIDECARS):
            print_next_command("Use it with", "predict", "--checkpoint", path, "--text", "TEXT")
        elif "series" in sidecars:
            print_next_command("Predict a series with", "predict", "FILE", "--checkpoint", path)
        elif not isinstance(self.model, LanguageModule) or isinstance(self.model, MemformerModule):
            print_next_command("Convert it to a model folder with", "convert", path, "FOLDER")
        elif "tokenizer" in sidecars:
            print_next_command("Read a text with", "read", "FILE", "--checkpoint", path)
        else:
            print_next_command("Measure its memory with", "evaluate", "--checkpoint", path, "--task", "recall")

    def _describe_untestable(self, run_dir: Path) -> str:
        """Return why `memtx test` cannot follow a fit; empty if it can."""
        if self.config[self.subcommand].trainer.fast_dev_run:
            return ""
        if not any((run_dir / CHECKPOINT_DIR).glob("*.ckpt")):
            no_step = "" if self.trainer.global_step else ": no step was done"
            reason = no_step if find_best_checkpoint(self.trainer) else ": trainer.enable_checkpointing is false"
            return f"No checkpoint was written{reason}, so there is nothing to test."
        has_split = getattr(self.datamodule, "has_split", None)
        if has_split is not None and not has_split("test"):
            return f"The run is in '{run_dir}'. It has no test split: give `memtx test` a --data.root that has one."
        return ""

    def after_predict(self) -> None:
        """Print the folder of the predictions."""
        if self.trainer.is_global_zero:
            folder = Path(self.config[self.subcommand].run_dir) / PREDICTION_DIR
            sys.stdout.write(f"Metrics per document and surprisal per token are in '{folder}'.\n")
            self._print_use()

    def _run_subcommand(self, subcommand: str) -> None:
        run_dir = Path(self.config[subcommand].run_dir)
        is_new = not run_dir.exists()
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            # A run that failed before its first step leaves no folder.
            has_started = self.trainer.global_step or any((run_dir / CHECKPOINT_DIR).glob("*"))
            if subcommand == "fit" and is_new and not has_started:
                shutil.rmtree(run_dir, ignore_errors=True)
            if isinstance(error, Exception) and _is_raised_by_options(error):
                raise to_memtx_error(error) from error
            if is_out_of_memory(error):
                raise MemtxError(getattr(error, "__notes__", ["Out of memory."])[-1]) from error
            raise


class SaveConfig(SaveConfigCallback):
    """Callback that writes config.yaml to the run folder when training starts, but not in evaluation."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Do nothing; the checkpoint is not restored yet."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write the config without the checkpoint, so that it starts the same run again."""
        if trainer.is_global_zero:
            config = self.config.clone()
            config.ckpt_path, config.traceback = None, False
            text = self.parser.dump(config, skip_none=False)
            files.write_text(Path(config.run_dir) / CONFIG_FILE, text)
            for name, error in trackers.log_options(trainer.loggers, yaml.safe_load(text)).items():
                _print_rank_zero(f"memtx: {name} did not take the options of the run: {error}\n")


def get_launcher_kwargs(environment: Mapping[str, str]) -> dict[str, int]:
    """Return ``devices`` (per node) and ``num_nodes`` of torchrun or srun, else nothing; Lightning reads neither."""

    def read_int(name: str) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdecimal() and int(text) else 1

    if "TORCHELASTIC_RUN_ID" in environment:
        devices = read_int("LOCAL_WORLD_SIZE")
        return {"devices": devices, "num_nodes": max(1, read_int("WORLD_SIZE") // devices)}
    # As in Lightning, where these two job names stand for an interactive shell.
    if "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        num_nodes = read_int("SLURM_NNODES")
        return {"devices": max(1, read_int("SLURM_NTASKS") // num_nodes), "num_nodes": num_nodes}
    return {}


@rank_zero_only
def _print_rank_zero(text: str) -> None:
    sys.stderr.write(text)


def get_data_options(config: Any) -> Any:
    """Return the options of the data module, with or without a class path."""
    return config.data.get("init_args", config.data)


def _to_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_raised_by_options(error: BaseException) -> bool:
    """Return whether Lightning, or an optimizer or schedule of torch, complains about an option of the user."""
    if not isinstance(error, ValueError | TypeError | AttributeError | RuntimeError | ZeroDivisionError):
        return isinstance(error, MisconfigurationException)
    frames = traceback.extract_tb(error.__traceback__)
    path = Path(frames[-1].filename).as_posix() if frames else ""
    return "/site-packages/lightning/" in path or "/site-packages/torch/optim/" in path


def _resolve_checkpoint(run_dir: Path, checkpoint: str) -> Path:
    if checkpoint == "best":
        return pretrained.find_checkpoint(run_dir)
    path = run_dir / CHECKPOINT_DIR / LAST_CHECKPOINT if checkpoint == "last" else Path(checkpoint)
    return pretrained.find_checkpoint(path) if path.is_dir() else path

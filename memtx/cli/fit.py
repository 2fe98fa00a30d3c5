"""``memtx fit|validate|test|predict``: run LightningCLI with memtx's callbacks and without needless warnings."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from pathlib import Path

from torch.multiprocessing.spawn import ProcessExitedException

from memtx import files
from memtx.cli.config import add_run_config
from memtx.cli.errors import EXIT_INTERRUPTED, EXIT_USAGE_ERROR, run
from memtx.cli.lightning_cli import MemtxCLI, SaveConfig
from memtx.cli.main import program_name
from memtx.cli.overrides import to_options
from memtx.training.callbacks.interrupt import INTERRUPT_EXIT_CODE

# Advice to install other products, and warnings about choices made on purpose.
_SUPPRESSED_LOGS = (
    *("Seed set to", "available: False", "litlogger", "Tip", "was configured so"),
    *("Automatic Mixed Precision", "model summary callbacks", "`weights_only` was not set"),
)
_SUPPRESSED_WARNINGS = (
    ".*(does not have many workers|does not seem to be|LeafSpec|no logger configured|exists and is not empty)",
    ".*not supported by the model summary",
    ".*(with a model that overrides the configure_model|SWA is currently only supported|trying to `self.log)",
    "LightningCLI's args parameter is intended to run from within Python",
    ".*across ranks is zero",  # a run without validation texts
    r"\s*Unable to serialize instance",  # the tokenizer of the checkpoint, which is not saved
)


def _is_relevant(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _SUPPRESSED_LOGS)


def _thread_excepthook(args: threading.ExceptHookArgs) -> None:
    # TensorBoard raises the error of a full disk again at its next write, where the command reports it as one line.
    if not isinstance(args.exc_value, OSError) or not files.is_disk_full(args.exc_value):
        threading.__excepthook__(args)


def install_warning_filters() -> None:
    """Suppress needless logs and warnings for the rest of the process."""
    threading.excepthook = _thread_excepthook
    for text in _SUPPRESSED_WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    names = ["fabric.utilities.seed", "fabric.utilities.rank_zero", "pytorch.utilities.rank_zero"]
    for name in [*names, "pytorch.trainer.connectors.checkpoint_connector"]:
        logger = logging.getLogger(f"lightning.{name}")
        if _is_relevant not in logger.filters:
            logger.addFilter(_is_relevant)


def _run_cli(argv: list[str]) -> int:
    # Lightning starts the other processes of a run (strategy ddp) with these arguments.
    sys.argv[1:] = argv
    # A config may name classes in the current folder, which comes last so that it hides no module.
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    defaults = {"gradient_clip_val": 1.0, "use_distributed_sampler": False, "devices": 1}
    program = program_name(sys.argv[0])
    try:
        MemtxCLI.from_arguments(argv, program, save_config_callback=SaveConfig, trainer_defaults=defaults)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            return EXIT_INTERRUPTED
        return error.code if isinstance(error.code, int) else 0 if error.code is None else EXIT_USAGE_ERROR
    except ProcessExitedException as error:
        if error.exit_code != INTERRUPT_EXIT_CODE:
            raise
        return EXIT_INTERRUPTED
    return 0


def main(argv: list[str]) -> int:
    """Run LightningCLI on ``argv``, subcommand first, and return the exit code."""
    install_warning_filters()
    return run(lambda: _run_cli(add_run_config(to_options(argv))), traceback="--traceback" in argv)

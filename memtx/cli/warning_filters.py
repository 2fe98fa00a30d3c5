"""What a training run does not say: advice to install other products, and warnings about choices made on purpose."""

from __future__ import annotations

import logging
import threading
import warnings

from memtx import files

_SUPPRESSED_LOGS = ("Seed set to", "available: False", "litlogger", "Tip", "was configured so")
_SUPPRESSED_WARNINGS = (
    ".*does not have many workers.*",
    ".*does not seem to be.*",
    ".*LeafSpec.*",
    ".*no logger configured.*",
    ".*exists and is not empty.*",
    ".*not supported by the model summary.*",
    "LightningCLI's args parameter is intended to run from within Python.*",
    ".*across ranks is zero.*",  # A run without validation texts.
    r"\s*Unable to serialize instance",  # The checkpoint's tokenizer, which is not to be saved.
)


def _is_relevant(record: logging.LogRecord) -> bool:
    return not any(one in record.getMessage() for one in _SUPPRESSED_LOGS)


def _thread_excepthook(args: threading.ExceptHookArgs) -> None:
    # TensorBoard's thread keeps the error for the next write as well, where the command says it in a line.
    if not isinstance(args.exc_value, OSError) or not files.is_disk_full(args.exc_value):
        threading.__excepthook__(args)


def install_warning_filters() -> None:
    """Filter them, once for the process."""
    threading.excepthook = _thread_excepthook
    for text in _SUPPRESSED_WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    for part in ("fabric.utilities.seed", "fabric.utilities.rank_zero", "pytorch.utilities.rank_zero"):
        noise = logging.getLogger(f"lightning.{part}")
        if _is_relevant not in noise.filters:
            noise.addFilter(_is_relevant)

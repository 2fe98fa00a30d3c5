"""``memtx fit|validate|test`` for a config that names its module and its data by class paths, as tasks' do."""

from __future__ import annotations

from functools import partial
from typing import Any

from memtx.cli.fit import MemtxCLI, format_config_hint
from memtx.data.books import BookDataModule
from memtx.data.hf_tokenizers import hf_tokenizer_from_json
from memtx.data.sources.corpus import PG19_HINT
from memtx.data.tasks.base import task_from_json
from memtx.data.tasks.data_module import TaskDataModule
from memtx.data.tasks.examples import LAYOUT_HINT
from memtx.data.tasks.summaries import SummaryDataModule
from memtx.data.tokenizers import tokenizer_from_json
from memtx.errors import DataError, MemtxError
from memtx.training.base_module import BaseModule

BASE_CLASSES = (BaseModule, None)
"""What the module and the data are to be of; None for any of Lightning's data modules."""


def _get_or_none(name: str, data: Any) -> Any:
    return getattr(data, name, None)


class ClassPathCLI(MemtxCLI):
    """The data decide what the module has to be made for: vocabulary, segment, scores, the id of a masked token."""

    def link_data_arguments(self, parser: Any) -> None:
        """Let numbers flow from the data, where they have them and the module takes them."""
        for name in ("vocab_size", "segment_length", "num_labels", "mask_token_id"):
            # Of the whole: a link from an attribute that is missing has Lightning read all data to say so.
            parser.link_arguments(
                "data", f"model.init_args.{name}", compute_fn=partial(_get_or_none, name), apply_on="instantiate"
            )

    def check_data_config(self, config: Any) -> None:
        """Refuse to begin without texts or examples."""
        for name in ("model", "data"):
            if config.get(name) is None or "class_path" not in config[name]:
                raise MemtxError(f"'{name}' names no class_path, though the other does.", "Name both, or neither.")
        if config.data.init_args.get("root", "") is None:
            names = (TaskDataModule.__name__, SummaryDataModule.__name__)
            task = config.data.class_path.rpartition(".")[2] in names
            what = "folder of examples" if task else "folder of texts"
            raise DataError(
                f"data.root is not set, expected the {what}{format_config_hint()}.", LAYOUT_HINT if task else PG19_HINT
            )

    def restore_data_config(self, config: Any, checkpoint: dict[str, Any]) -> None:
        """Take tokenizer and task of the checkpoint that is measured: its model knows no others."""
        kinds = (BookDataModule, SummaryDataModule)
        texts = next((kept for kind in kinds if isinstance(kept := checkpoint.get(kind.__qualname__), dict)), None)
        task = checkpoint.get(TaskDataModule.__qualname__)
        if texts is not None:
            config.data.init_args.tokenizer = tokenizer_from_json(texts["tokenizer"])
        elif isinstance(task, dict):
            config.data.init_args.tokenizer = hf_tokenizer_from_json(task["tokenizer"])
            config.data.init_args.task = task_from_json(task["task"])

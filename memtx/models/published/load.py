"""A folder in the layout of the ``transformers`` library, or of our own format: the right reader for each."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

from torch import nn

from memtx.errors import CheckpointError, nearest
from memtx.models import folder
from memtx.models.published import content
from memtx.models.published.content import Content
from memtx.models.published.layout import PublishedModel

# The one table of names that stand for classes: model_type is someone else's format.
KNOWN = {
    "bert": "memtx.models.published.bert",
    "big_bird": "memtx.models.published.bigbird",
    "distilbert": "memtx.models.published.distilbert",
    "longformer": "memtx.models.published.longformer",
    "reformer": "memtx.models.published.reformer",
    "transfo-xl": "memtx.models.published.transformer_xl",
}


def from_pretrained(path: str | os.PathLike[str]) -> nn.Module:
    """Build the model kept at ``path``, in eval mode, on the CPU, in the type its weights are kept in.

    Args:
        path: a folder of ours, a training checkpoint file, or a folder in the layout of the ``transformers`` library
            (config.json with a ``model_type``, beside model.safetensors or pytorch_model.bin).

    Raises:
        CheckpointError: missing, damaged, of an unknown ``model_type``, or with tensors that are missing, unknown or
            of another shape; all of them are named.
    """
    place = Path(path)
    if not (place / content.CONFIG).is_file():
        return folder.load(place)
    _, config = content.read_config(place)
    if "model_type" not in config:
        return folder.load(place)
    kind = str(config["model_type"])
    if kind not in KNOWN:
        raise CheckpointError(
            f"'{place}' has model_type '{kind}', known are {', '.join(sorted(KNOWN))}.{nearest(kind, KNOWN)}",
            "Give a checkpoint of one of these.",
        )
    module = importlib.import_module(KNOWN[kind])
    build = cast(Callable[[Content], PublishedModel], module.build)
    return build(content.read(place))

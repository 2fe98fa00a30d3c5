"""Models that training begins with, from a folder, checkpoint or run."""

from __future__ import annotations

from typing import TypeVar, cast

from memtx.checkpoint.load import from_pretrained
from memtx.checkpoint.pretrained import PretrainedModel, resolve_model_path
from memtx.errors import MemtxError
from memtx.models.heads import TaskModel

ModelT = TypeVar("ModelT", bound=PretrainedModel)


def load_initial_model(path: str, model_class: type[ModelT], kind: str, vocab_size: int) -> ModelT:
    """Return the model at ``path``, or the backbone of a task model, in float32 and in training mode.

    Args:
        path: Hugging Face or memtx folder, checkpoint or run folder.
        model_class: Class that it must have.
        kind: Description of the class for the error message, such as "an encoder".
        vocab_size: Number of ids that it must have at least.

    Raises:
        MemtxError: The model has another class or fewer ids.
    """
    model = from_pretrained(resolve_model_path(path))
    if isinstance(model, TaskModel) and isinstance(model.backbone, model_class):
        model = model.backbone
    if not isinstance(model, model_class):
        raise MemtxError(f"'{path}' contains {type(model).__name__}, not {kind}.", "Change model.pretrained.")
    if (num_tokens := cast(int, model.vocab_size)) < vocab_size:
        raise MemtxError(
            f"'{path}' has {num_tokens} tokens, the tokenizer has {vocab_size}.",
            "Set data.tokenizer to an HFTokenizer of the tokenizer.json that it was trained with.",
        )
    return model.float().train()

"""Predictors of fine-tuned encoders in published folders: their task, labels and lengths, from the folder's files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memtx import files
from memtx.checkpoint.load import load
from memtx.data.hf_tokenizers import HFTokenizer
from memtx.data.tasks.base import Task, build_inputs
from memtx.data.tasks.classification import TextClassification
from memtx.data.tasks.question_answering import QuestionAnswering
from memtx.data.tasks.tagging import TokenClassification
from memtx.errors import CheckpointError, DataError
from memtx.hf.checkpoint import CONFIG_FILE, read_config
from memtx.hf.loader import BIDIRECTIONAL_ENCODERS, is_hf_folder
from memtx.hf.task_heads import (
    MASKED_LM,
    QUESTION_ANSWERING,
    SEQUENCE_CLASSIFICATION,
    get_labels,
    get_task,
    unsupported_task_error,
)
from memtx.inference.deadline import acquire_before
from memtx.inference.predictor import BasePredictor, PredictInput, Predictor
from memtx.inference.text_to_text import load_text_to_text
from memtx.models.encoder import Encoder
from memtx.models.encoder_decoder import EncoderDecoder
from memtx.models.heads import TaskModel

MAX_ANSWER_LENGTH = 30
ALWAYS_ANSWER = -1e30
"""Threshold below any score: a published model always answers, since few were trained to decline."""

CONDITIONAL_GENERATION = "ForConditionalGeneration"
"""End of the class name of an encoder-decoder that makes texts."""

DEFAULT_TOP_K, MAX_TOP_K = 5, 100


def get_published_task(path: str | os.PathLike[str]) -> str | None:
    """Return the task that a published folder was fine-tuned for, or None for any other path.

    Raises CheckpointError for an encoder of another task, or of none, which predicts nothing.
    """
    if not ((Path(path) / CONFIG_FILE).is_file() and is_hf_folder(path)):
        return None
    config = read_config(path)[1]
    # Models of text and images are named so, too, and are no encoder-decoders.
    if config.get("is_encoder_decoder") is True:
        return CONDITIONAL_GENERATION
    task = get_task(config)
    if task is None and config.get("model_type") in BIDIRECTIONAL_ENCODERS:
        raise unsupported_task_error(path, config)
    return task


def load_published_predictor(path: str | os.PathLike[str]) -> BasePredictor:
    """Load the predictor of a published folder with a task; raises CheckpointError if a file is missing or damaged."""
    folder, (_, config) = Path(path), read_config(path)
    tokenizer, model = HFTokenizer(str(folder / "tokenizer.json")), load(path).model
    if isinstance(model, EncoderDecoder):
        return load_text_to_text(model, tokenizer, folder)
    max_length = _get_max_length(folder, config)
    task_name = get_task(config)
    if task_name == MASKED_LM and isinstance(model, Encoder):
        return MaskPredictor(model, tokenizer, max_length)
    if not isinstance(model, TaskModel):
        message = f"'{path}' holds a {type(model).__name__}, whose task is not supported."
        raise CheckpointError(message, "Give an encoder with a task head.")
    stride = max(max_length // 2, 1)
    if task_name == QUESTION_ANSWERING:
        task: Task = QuestionAnswering(max_length, stride, MAX_ANSWER_LENGTH, ALWAYS_ANSWER)
    elif task_name == SEQUENCE_CLASSIFICATION:
        problem_type = config.get("problem_type")
        task = TextClassification(get_labels(config, model.num_labels), max_length, stride, problem_type)
    else:
        task = TokenClassification(get_labels(config, model.num_labels), max_length, stride)
    return Predictor(model, tokenizer, task)


def _get_max_length(folder: Path, config: Mapping[str, Any]) -> int:
    """Return the number of tokens that the model reads at once."""
    length = config.get("max_position_embeddings")
    length = length if isinstance(length, int) else 512
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "longformer"):
        length -= (config.get("pad_token_id") or 0) + 1  # its positions begin after that of padding
    path = folder / "tokenizer_config.json"
    settings = files.read_json(path) if path.is_file() else {}
    limit = settings.get("model_max_length") if isinstance(settings, Mapping) else None
    return min(length, int(limit)) if isinstance(limit, int | float) and 8 <= limit < length else length


class MaskPredictor(BasePredictor):
    """Predicts the masked tokens of a text; the model is put into eval mode."""

    task_name = "masked_lm"
    model: Encoder

    def __init__(self, model: Encoder, tokenizer: HFTokenizer, max_length: int) -> None:
        super().__init__()
        if model.head is None:
            raise CheckpointError("The model has no head for masked tokens.", "Give a folder of ForMaskedLM.")
        self.model, self.tokenizer, self.max_length = model.eval(), tokenizer, max_length

    def to_example(self, raw_input: PredictInput) -> tuple[str, int]:
        """Return text and number of predictions of an input: a raw text, or ``{"text": ..., "top_k": 5}``."""
        text, top_k = (
            (raw_input, DEFAULT_TOP_K)
            if isinstance(raw_input, str)
            else (raw_input.get("text"), raw_input.get("top_k", DEFAULT_TOP_K))
        )
        if not isinstance(text, str):
            raise DataError("There is no 'text'.", 'Give a text, or {"text": ..., "top_k": 5}.')
        if type(top_k) is not int or not 1 <= top_k <= MAX_TOP_K:
            raise DataError(f"top_k is {top_k!r}, expected 1 to {MAX_TOP_K}.", "Change top_k.")
        return text, top_k

    def predict(self, inputs: Sequence[PredictInput], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return the ``masks`` of each input in order: ``token``, ``id`` and ``score`` of the likely tokens."""
        examples = self._map_inputs(inputs, lambda raw_input: self._encode(*self.to_example(raw_input)))
        with acquire_before(deadline, self._lock):
            return [self._predict(ids, top_k, deadline) for ids, top_k in examples]

    def _encode(self, text: str, top_k: int) -> tuple[torch.Tensor, int]:
        tokenizer = self.tokenizer
        ids, *_ = build_inputs(tokenizer, tokenizer.encode(text, parse_special=True).astype("int64"))
        if tokenizer.mask_token_id not in ids:
            raise DataError("The text has no masked token.", f"Write {tokenizer.mask_token} for each.")
        if len(ids) > self.max_length:
            message = f"The text has {len(ids)} tokens, the model reads {self.max_length} at once."
            raise DataError(message, "Send less text.")
        return torch.from_numpy(ids), top_k

    def _predict(self, ids: torch.Tensor, top_k: int, deadline: float | None) -> dict[str, Any]:
        self._check_active(deadline)
        device = self.model.embedding.word_embeddings.weight.device
        tokens = ids[None].to(device)
        with torch.inference_mode():
            logits = self.model(tokens, logits_mask=tokens == self.tokenizer.mask_token_id).logits
        self.num_tokens_read += len(ids)
        probs = logits.float().softmax(-1)[:, : self.tokenizer.vocab_size].cpu()
        best = probs.topk(min(top_k, probs.shape[-1]))
        masks = [
            [
                {"token": self.tokenizer.decode([token]).strip(), "id": token, "score": round(score, 6)}
                for score, token in zip(scores, candidates, strict=True)
            ]
            for scores, candidates in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return {"masks": masks}

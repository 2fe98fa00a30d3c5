"""Models read a batch, and show what the losses compare: each kind of training its own way of reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memtx.data.batch import IGNORE_INDEX
from memtx.data.tasks.batches import TaskBatch
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel, run_encoder
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.distillation.losses import CHUNK_SIZE
from memtx.training.distillation.model_outputs import ModelOutputs, get_backbone, get_blocks
from memtx.training.distillation.teacher_cache import LogitTable, make_key, top_k_logits


def forward_task(
    model: nn.Module,
    batch: TaskBatch,
    flatten_logits: Callable[[Tensor, TaskBatch], Tensor],
    *,
    output_hidden_states: bool,
    loss_fn: Callable[[Tensor, TaskBatch], Tensor] | None = None,
) -> ModelOutputs:
    """Read a task's rows.

    Args:
        model: a task's, or an encoder, which shows no scores.
        batch: the rows.
        flatten_logits: makes (n, classes) of scores, one for each label.
        output_hidden_states: whether layers are to be shown.
        loss_fn: the student's, of its scores.
    """
    parts = (batch.tokens, batch.attention_mask, batch.token_type_ids, batch.global_attention_mask)
    body = get_backbone(model)
    marked = (
        batch.global_attention_mask.bool() if isinstance(body, Encoder) and body.supports_global_attention else None
    )
    layers: dict[str, Any] = {
        "blocks": get_blocks(model),
        "attention_mask": batch.attention_mask.bool(),
        "global_attention_mask": marked,
    }
    if isinstance(model, Encoder):
        return ModelOutputs(
            None,
            hidden_states=run_encoder(model, *parts, return_hidden_states=output_hidden_states).hidden_states or (),
            **layers,
        )
    assert isinstance(model, TaskModel)
    hidden, scores = model.forward_with_hidden_states(*parts, return_hidden_states=output_hidden_states)
    own = flatten_logits(scores, batch)[batch.labels.flatten() != IGNORE_INDEX]
    lost = loss_fn(scores, batch) if loss_fn is not None else None
    return ModelOutputs(own, hidden_states=hidden, loss=lost, **layers)


def make_task_keys(batch: TaskBatch) -> list[bytes]:
    """Return a key for each scored label of a batch: of its row's tokens, whatever fills it up, and its number."""
    names = []
    scored = (batch.labels != IGNORE_INDEX).reshape(len(batch.tokens), -1)
    for row, present in enumerate(batch.attention_mask.bool()):
        parts = [
            part[row][present].cpu().numpy().tobytes()
            for part in (batch.tokens, batch.token_type_ids, batch.global_attention_mask)
        ]
        names += [make_key(*parts, bytes(str(int(one)), "ascii")) for one in scored[row].nonzero()[:, 0]]
    return names


def forward_masked_lm(model: Encoder, tokens: Tensor, scored: Tensor, *, output_hidden_states: bool) -> ModelOutputs:
    """Read rows of whole texts, (rows, length) int64; scored: (rows, length) bool, where a token is hidden."""
    out = model(tokens, logits_mask=scored, output_hidden_states=output_hidden_states)
    return ModelOutputs(out.logits, hidden_states=out.hidden_states or (), blocks=get_blocks(model))


def get_output_head(model: MemoryTransformer) -> Callable[[Tensor], Tensor]:
    """Return what makes (n, vocab) scores of (n, dim) outputs of a model's last layer."""

    def head(x: Tensor) -> Tensor:
        out: Tensor = model.head(model.norm(x))
        return out

    return head


def collect_language_outputs(
    model: MemoryTransformer,
    hidden_states: tuple[Tensor, ...],
    labels: Tensor,
    document_starts: Tensor,
    loss: Tensor | None = None,
) -> ModelOutputs:
    """Return what a memory transformer shows of tokens that it has read.

    Args:
        model: the model.
        hidden_states: (rows, length, dim) each, what the embeddings and every layer made.
        labels: (rows, length) int64, -100 where nothing is scored.
        document_starts: (rows, length) bool, where documents begin.
        loss: the student's.
    """
    scored = hidden_states[-1][labels != IGNORE_INDEX]
    return ModelOutputs(
        scored,
        get_output_head(model),
        hidden_states=hidden_states,
        blocks=get_blocks(model),
        document_starts=document_starts,
        loss=loss,
    )


@torch.no_grad()
def fill_logit_table(
    table: LogitTable, token_indices: Tensor, model: MemoryTransformer, last_hidden_state: Tensor
) -> None:
    """Keep the scores that a teacher gives at every token of a batch.

    Args:
        table: of its corpus.
        token_indices: (rows, length) int64, in the corpus.
        model: the teacher.
        last_hidden_state: (rows, length, dim), its last layer's outputs.
    """
    head = get_output_head(model)
    for where, part in zip(
        torch.split(token_indices.flatten(), CHUNK_SIZE),
        torch.split(last_hidden_state.flatten(0, 1), CHUNK_SIZE),
        strict=True,
    ):
        table.put(where, *top_k_logits(head(part), table.top_k))

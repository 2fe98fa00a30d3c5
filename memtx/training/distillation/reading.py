"""Models read a batch, and show what the losses compare: each kind of training its own way of reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memtx.data.batch import IGNORED
from memtx.data.task_batches import TaskBatch
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel, read_whole
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.distillation.cached import ScoreTable, highest, key
from memtx.training.distillation.losses import CHUNK
from memtx.training.distillation.shown import Shown, blocks_of, body_of


def shown_task(
    model: nn.Module,
    batch: TaskBatch,
    choices: Callable[[Tensor, TaskBatch], Tensor],
    *,
    keep: bool,
    loss: Callable[[Tensor, TaskBatch], Tensor] | None = None,
) -> Shown:
    """Read a task's rows.

    Args:
        model: a task's, or an encoder, which shows no scores.
        batch: the rows.
        choices: makes (n, classes) of scores, one for each label.
        keep: whether layers are to be shown.
        loss: the student's, of its scores.
    """
    parts = (batch.tokens, batch.present, batch.types, batch.marked)
    body = body_of(model)
    marked = batch.marked.bool() if isinstance(body, Encoder) and body.knows_globals else None
    layers: dict[str, Any] = {"blocks": blocks_of(model), "present": batch.present.bool(), "marked": marked}
    if isinstance(model, Encoder):
        return Shown(None, hidden=read_whole(model, *parts, keep=keep).hidden_states or (), **layers)
    assert isinstance(model, TaskModel)
    hidden, scores = model.layers_and_scores(*parts, keep=keep)
    own = choices(scores, batch)[batch.labels.flatten() != IGNORED]
    lost = loss(scores, batch) if loss is not None else None
    return Shown(own, hidden=hidden, loss=lost, **layers)


def task_keys(batch: TaskBatch) -> list[bytes]:
    """Return a key for each scored label of a batch: of its row's tokens, whatever fills it up, and its number."""
    names = []
    scored = (batch.labels != IGNORED).reshape(len(batch.tokens), -1)
    for row, present in enumerate(batch.present.bool()):
        parts = [part[row][present].cpu().numpy().tobytes() for part in (batch.tokens, batch.types, batch.marked)]
        names += [key(*parts, bytes(str(int(one)), "ascii")) for one in scored[row].nonzero()[:, 0]]
    return names


def shown_masked(model: Encoder, tokens: Tensor, scored: Tensor, *, keep: bool) -> Shown:
    """Read rows of whole texts, (rows, length) int64; scored: (rows, length) bool, where a token is hidden."""
    out = model(tokens, scored=scored, output_hidden_states=keep)
    return Shown(out.logits, hidden=out.hidden_states or (), blocks=blocks_of(model))


def head_of(model: MemoryTransformer) -> Callable[[Tensor], Tensor]:
    """Return what makes (n, vocab) scores of (n, dim) outputs of a model's last layer."""

    def head(x: Tensor) -> Tensor:
        out: Tensor = model.head(model.norm(x))
        return out

    return head


def shown_language(
    model: MemoryTransformer,
    hidden: tuple[Tensor, ...],
    labels: Tensor,
    starts: Tensor,
    loss: Tensor | None = None,
) -> Shown:
    """Return what a memory transformer shows of tokens that it has read.

    Args:
        model: the model.
        hidden: (rows, length, dim) each, what the embeddings and every layer made.
        labels: (rows, length) int64, -100 where nothing is scored.
        starts: (rows, length) bool, where documents begin.
        loss: the student's.
    """
    scored = hidden[-1][labels != IGNORED]
    return Shown(scored, head_of(model), hidden=hidden, blocks=blocks_of(model), starts=starts, loss=loss)


@torch.no_grad()
def fill(table: ScoreTable, places: Tensor, model: MemoryTransformer, last: Tensor) -> None:
    """Keep the scores that a teacher gives at every token of a batch.

    Args:
        table: of its corpus.
        places: (rows, length) int64, in the corpus.
        model: the teacher.
        last: (rows, length, dim), its last layer's outputs.
    """
    head = head_of(model)
    for where, part in zip(torch.split(places.flatten(), CHUNK), torch.split(last.flatten(0, 1), CHUNK), strict=True):
        table.put(where, *highest(head(part), table.top))

"""Model outputs that distillation losses compare, and functions that compute them for each objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from memtx.data.batch import IGNORE_INDEX
from memtx.data.tasks.batches import TaskBatch
from memtx.errors import MemtxError
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel, run_encoder
from memtx.models.memory_transformer import MemoryTransformer

ALL_POSITIONS = slice(None)


def get_backbone(model: nn.Module) -> nn.Module:
    """Return the backbone of a task model, or any other model unchanged."""
    return model.backbone if isinstance(model, TaskModel) else model


def get_blocks(model: nn.Module) -> list[Any]:
    """Return the layers of an encoder, a task model's encoder or a memory transformer; empty for other models."""
    backbone = get_backbone(model)
    return list(backbone.blocks) if isinstance(backbone, Encoder | MemoryTransformer) else []


@dataclass(frozen=True)
class ModelDims:
    """Dimensions that must match for two models to be compared.

    Attributes:
        name: Class of the model.
        dim: Width of the hidden states.
        depth: Layers whose hidden states the model returns; 0 if it returns none.
        heads: Query heads of each layer, or value heads without queries.
        value_dims: Width of each layer's values, over all heads.
        num_classes: Logits per position or text; 0 without a head for the training objective.
        has_attention_maps: If True, visibility depends on the distance between two tokens alone, so that attention
            scores can be compared.
        classes_are_tokens: If True, the classes are all tokens of a masked language model.
    """

    name: str
    dim: int
    depth: int
    heads: tuple[int, ...]
    value_dims: tuple[int, ...]
    num_classes: int
    has_attention_maps: bool
    classes_are_tokens: bool = False

    @classmethod
    def from_model(cls, model: nn.Module) -> Self:
        """Return the dimensions of a model; raises MemtxError if it can be neither teacher nor student."""
        backbone = get_backbone(model)
        name, attentions = type(backbone).__name__, [block.attention for block in get_blocks(backbone)]
        heads = tuple(attention.heads for attention in attentions)
        if isinstance(backbone, Encoder):
            distance = torch.zeros(1, dtype=torch.int64)
            return cls(
                name,
                backbone.dim,
                backbone.depth,
                heads,
                (backbone.dim,) * backbone.depth,
                model.num_labels if isinstance(model, TaskModel) else backbone.vocab_size * (backbone.head is not None),
                has_attention_maps=all(attention.within_window(distance) is not None for attention in attentions),
                classes_are_tokens=not isinstance(model, TaskModel) and backbone.head is not None,
            )
        if isinstance(model, TaskModel):
            return cls(name, model.backbone.dim, 0, (), (), model.num_labels, has_attention_maps=False)
        if isinstance(backbone, MemoryTransformer):
            widths = tuple(attention.heads * attention.head_dim for attention in attentions)
            classes = backbone.vocab_size
            return cls(name, backbone.dim, backbone.depth, heads, widths, classes, has_attention_maps=False)
        raise MemtxError(
            f"A {name} can be neither teacher nor student.", "Use an Encoder, a task model or a MemoryTransformer."
        )


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of one model for a batch.

    Attributes:
        features: Features ``(n, width)`` of each scored position or text; logits if ``head`` is None.
        head: Computes logits ``(m, classes)`` from features ``(m, width)``.
        masked: ``(n,)`` bool, True for the features of masked tokens; None if no tokens are masked.
        class_indices: Class of each logit, ``(n, width)`` int64, if the features are logits of some classes only; a
            logit of minus infinity is padding.
        hidden_states: Outputs of the embeddings and of every layer, each ``(batch, length, dim)``.
        blocks: The layers.
        attention_mask: ``(batch, length)`` bool, False for padding; None without padding.
        global_attention_mask: ``(batch, length)`` bool, True for global tokens; None without any.
        document_starts: For causal models, ``(batch, length)`` bool, True where a document begins; None for others.
        loss: Loss of the student on the labels, ``()``; None for a teacher.
    """

    features: Tensor | None
    head: Callable[[Tensor], Tensor] | None = None
    masked: Tensor | None = None
    class_indices: Tensor | None = None
    hidden_states: tuple[Tensor, ...] = ()
    blocks: Sequence[Any] = ()
    attention_mask: Tensor | None = None
    global_attention_mask: Tensor | None = None
    document_starts: Tensor | None = None
    loss: Tensor | None = None

    def attention_scores(self, layer: int, queries: slice, keys: slice) -> Tensor:
        """Return a layer's scores ``(batch, heads, queries, keys)`` before masks and softmax."""
        scores: Tensor = self.blocks[layer].attention.attention_scores(self.hidden_states[layer], queries, keys)
        return scores

    def values(self, layer: int) -> Tensor:
        """Return a layer's values ``(batch, length, heads * head_dim)``."""
        values: Tensor = self.blocks[layer].project_values(self.hidden_states[layer])
        return values

    def window_mask(self, layer: int, queries: slice, keys: slice) -> Tensor:
        """Return the visibility ``(batch or 1, queries, keys)`` bool of a layer.

        The queries of global tokens are masked out, because they have separate projections.
        """
        position = torch.arange(self.hidden_states[0].shape[1], device=self.hidden_states[0].device)
        distance = position[keys] - position[queries, None]
        mask: Tensor = self.blocks[layer].attention.within_window(distance)[None]
        return mask if self.global_attention_mask is None else mask & ~self.global_attention_mask[:, queries, None]

    def distance_range(self, layer: int) -> tuple[int, int]:
        """Return the smallest and largest visible distance, key minus query, in a layer."""
        length = self.hidden_states[0].shape[1]
        distance = torch.arange(1 - length, length)
        visible = distance[self.blocks[layer].attention.within_window(distance)]
        return int(visible[0]), int(visible[-1])

    @property
    def token_mask(self) -> Tensor:
        """``(batch, length)`` bool, False for padding."""
        if self.attention_mask is not None:
            return self.attention_mask
        return torch.ones(self.hidden_states[0].shape[:2], dtype=torch.bool, device=self.hidden_states[0].device)

    def pair_mask(self, queries: slice = ALL_POSITIONS, keys: slice = ALL_POSITIONS) -> Tensor:
        """Return ``(batch, queries, keys)`` bool, True for pairs of tokens that may be compared."""
        mask = self.token_mask[:, queries, None] & self.token_mask[:, None, keys]
        if self.document_starts is None:
            return mask
        document = self.document_starts.cumsum(1)
        position = torch.arange(document.shape[1], device=document.device)
        past = position[queries, None] >= position[keys]
        return mask & past & (document[:, queries, None] == document[:, None, keys])


def forward_task(
    model: nn.Module,
    batch: TaskBatch,
    flatten_logits: Callable[[Tensor, TaskBatch], Tensor],
    *,
    output_hidden_states: bool,
    loss_fn: Callable[[Tensor, TaskBatch], Tensor] | None = None,
) -> ModelOutputs:
    """Read a batch of task examples.

    Args:
        model: Task model, or an encoder, which has no logits.
        batch: Batch to read.
        flatten_logits: Reshapes logits to ``(n, classes)``, one row per label.
        output_hidden_states: If True, return the layers' outputs.
        loss_fn: Loss of the student's logits. None computes none.
    """
    inputs = (batch.tokens, batch.attention_mask, batch.token_type_ids, batch.global_attention_mask)
    backbone = get_backbone(model)
    has_global_attention = isinstance(backbone, Encoder) and backbone.supports_global_attention
    masks: dict[str, Any] = {
        "blocks": get_blocks(model),
        "attention_mask": batch.attention_mask.bool(),
        "global_attention_mask": batch.global_attention_mask.bool() if has_global_attention else None,
    }
    if isinstance(model, Encoder):
        output = run_encoder(model, *inputs, return_hidden_states=output_hidden_states)
        return ModelOutputs(None, hidden_states=output.hidden_states or (), **masks)
    assert isinstance(model, TaskModel)
    hidden_states, logits = model.forward_with_hidden_states(*inputs, return_hidden_states=output_hidden_states)
    scored = batch.labels.flatten() != IGNORE_INDEX
    return ModelOutputs(
        flatten_logits(logits, batch)[scored],
        hidden_states=hidden_states,
        loss=loss_fn(logits, batch) if loss_fn is not None else None,
        **masks,
    )


def forward_masked_lm(model: Encoder, tokens: Tensor, masked: Tensor, *, output_hidden_states: bool) -> ModelOutputs:
    """Read ``(batch, length)`` int64 tokens; ``masked``, ``(batch, length)`` bool, is True for those to predict.

    The features are those of all tokens.
    """
    # No logits here: a loss computes those that it compares, in chunks.
    output = model(tokens, logits_mask=torch.zeros_like(masked), output_hidden_states=output_hidden_states)
    return ModelOutputs(
        output.last_hidden_state.flatten(0, 1) if model.head is not None else None,
        model.predict_tokens,
        masked.flatten(),
        hidden_states=output.hidden_states or (),
        blocks=get_blocks(model),
    )


def get_output_head(model: MemoryTransformer) -> Callable[[Tensor], Tensor]:
    """Return a function from last-layer outputs ``(n, dim)`` to logits ``(n, vocab)``."""
    return lambda x: model.head(model.norm(x))


def collect_language_outputs(
    model: MemoryTransformer,
    hidden_states: tuple[Tensor, ...],
    labels: Tensor,
    document_starts: Tensor,
    loss: Tensor | None = None,
) -> ModelOutputs:
    """Return the outputs of a memory transformer for tokens that it has read; ``loss`` is the student's on the labels.

    The hidden states are those of the embedding and of every layer, each ``(batch, length, dim)``. Labels and document
    starts are ``(batch, length)``: int64, -100 where nothing is scored, and bool, True where a document begins.
    """
    return ModelOutputs(
        hidden_states[-1][labels != IGNORE_INDEX],
        get_output_head(model),
        hidden_states=hidden_states,
        blocks=get_blocks(model),
        document_starts=document_starts,
        loss=loss,
    )

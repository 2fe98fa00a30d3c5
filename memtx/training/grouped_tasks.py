"""Fine-tuning of tasks that compare several texts of an example: multiple choice, and retrieval by a bi-encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric

from memtx.data.tasks.batches import BatchExamples, TaskBatch
from memtx.errors import MemtxError
from memtx.metrics import RetrievalScore
from memtx.models.heads import EmbeddingHead, SequenceClassificationHead
from memtx.training.finetuning import TaskModule


def pool_windows(logits: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """Return the mean of each text's windows, ``(texts, width)``, and example, part and label of each, ``(texts, 3)``.

    Texts are ordered by example and part.
    """
    assert batch.groups is not None
    texts = torch.cat([batch.groups, batch.labels.reshape(-1, 1)], 1)
    keys, text = torch.unique(texts, dim=0, return_inverse=True)
    sums = logits.new_zeros(len(keys), logits.shape[1]).index_add(0, text, logits)
    return sums / text.bincount(minlength=len(keys))[:, None], keys


class MultipleChoiceModule(TaskModule):
    """The right one of several choices; logs ``accuracy``."""

    default_head = SequenceClassificationHead
    supports_class_weights = supports_distillation = False

    def make_metrics(self, num_labels: int) -> dict[str, Metric]:
        """Return accuracy."""
        return {"accuracy": MeanMetric()}

    def compute_loss(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """Return the mean cross-entropy over the choices of each example, whose number may differ."""
        scores, keys = pool_windows(logits, batch)
        example, _, is_right = keys.unbind(1)
        num_examples = int(example[-1]) + 1
        position = torch.arange(len(example), device=example.device)
        first = position.new_full((num_examples,), len(example)).scatter_reduce(0, example, position, "amin")
        column = position - first[example]
        table = scores.new_full((num_examples, int(column.max()) + 1), -math.inf)
        table = table.index_put((example, column), scores[:, 0])
        return F.cross_entropy(table, column[is_right == 1])

    def update_metrics(self, stage: str, batch_examples: BatchExamples, predictions: Sequence[dict[str, Any]]) -> None:
        """Compare choices."""
        for item, prediction in zip(batch_examples.examples, predictions, strict=True):
            self.get_metric(stage, "accuracy").update(float(prediction["label"] == item.example.label))


class RetrievalModule(TaskModule):
    """A bi-encoder: queries and documents as vectors of unit length (Reimers and Gurevych 2019).

    Each query learns to be nearer to its document than to all other documents of the batch, the hard negatives of all
    queries included (in-batch negatives, Karpukhin et al. 2020, section 3.2). A document that equals the right one is
    no negative. Logs ``recall_at_1``, ``recall_at_5``, ``recall_at_10`` and ``mrr`` among all documents of a split.

    Args:
        temperature: Divisor of the cosines in the loss.
        **options: Arguments of :class:`TaskModule`.

    Raises:
        MemtxError: The temperature is not positive, or as :class:`TaskModule`.
    """

    default_head = EmbeddingHead
    supports_class_weights = supports_distillation = False

    def __init__(self, temperature: float = 0.05, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < temperature < math.inf:
            raise MemtxError(f"temperature is {temperature}, expected a positive number.", "0.05 is common.")
        self.temperature = temperature

    def make_metrics(self, num_labels: int) -> dict[str, Metric]:
        """Return recall at 1, 5 and 10, and the mean reciprocal rank."""
        return {**{f"recall_at_{k}": RetrievalScore(k) for k in (1, 5, 10)}, "mrr": RetrievalScore()}

    def _embed(self, logits: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Return the vectors of queries and documents, and example, part and text of each."""
        vectors, keys = pool_windows(logits, batch)
        return F.normalize(vectors.float(), dim=-1), keys

    def compute_loss(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """Return the mean cross-entropy of each query's document among the documents of the batch."""
        vectors, keys = self._embed(logits, batch)
        part, text = keys[:, 1], keys[:, 2]
        documents, document_text = vectors[part > 0], text[part > 0]
        scores = vectors[part == 0] @ documents.T / self.temperature
        right = (part[part > 0] == 1).nonzero()[:, 0]
        is_copy = (document_text == document_text[right, None]).scatter(1, right[:, None], False)
        return F.cross_entropy(scores.masked_fill(is_copy, -math.inf), right)

    def evaluate_batch(self, stage: str, batch: TaskBatch, batch_idx: int) -> None:
        """Collect the vectors of a stage, and log its metrics."""
        logits = self._logits(batch)
        vectors, keys = self._embed(logits, batch)
        is_query, text = keys[:, 1] == 0, keys[:, 2]
        queries = (vectors[is_query], text[is_query], text[keys[:, 1] == 1])
        for name, metric in self.metrics.items():
            if name == f"{stage}_loss":
                cast(Metric, metric).update(self.compute_loss(logits, batch), int(is_query.sum()))
            elif name.startswith(f"{stage}_"):
                cast(Metric, metric).update(*queries, vectors[~is_query], text[~is_query])
        self._log_metrics(stage, int(is_query.sum()))

    def update_metrics(self, stage: str, batch_examples: BatchExamples, predictions: Sequence[dict[str, Any]]) -> None:
        """Do nothing: the metrics compare vectors, not predictions."""

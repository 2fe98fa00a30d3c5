"""Fine-tuning: a body, a head, and what the task is measured by, each kind of task a module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from memtx import specs
from memtx.data.batch import IGNORED
from memtx.data.examples import QuestionExample, TaggedExample
from memtx.data.tags import spans_of
from memtx.data.task_batches import Asked, TaskBatch
from memtx.errors import MemtxError
from memtx.metrics import AnswerExactMatch, AnswerF1, SpanF1
from memtx.models import folder
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel, TextHead, TokenHead
from memtx.models.published.layout import PublishedModel
from memtx.models.published.load import from_pretrained
from memtx.training.distillation.distillation import Distillation
from memtx.training.distillation.reading import shown_task, task_keys
from memtx.training.distillation.shown import Shown
from memtx.training.optimizers import WarmupCosine
from memtx.training.trained import TrainedModule


class TaskModule(TrainedModule):
    """Trains a model on a task's examples.

    Args:
        body: makes what reads, from the size of the vocabulary: ``Encoder``, or ``DocumentReader``.
        head: makes what scores, from width and outputs; None for the task's own.
        pretrained: a folder of a published encoder or of our own format, a checkpoint, or a run's folder, whose weights
            the body begins with; ``body`` is then not looked at.
        vocab_size: of the tokenizer; flows from the data.
        outputs: scores a text or a token; flows from the data.
        dropped: share of a training row's tokens, marks apart, that are replaced by ``mask``; keeps a model from
            learning few texts by heart.
        mask: the id that they are replaced by; flows from the data.
        optimizer: makes the optimiser from parameter groups.
        scheduler: makes the schedule from the optimiser, stepped every optimiser step.
        distillation: a teacher and what of it the model is to learn beside, or instead of, the labels; None for none.

    Raises:
        MemtxError: a number is out of range, or the pretrained model is no encoder or of a smaller vocabulary.
    """

    model: TaskModel
    head_kind: Callable[[int, int], nn.Module] = TextHead

    def __init__(
        self,
        body: Callable[[int], nn.Module] = Encoder,
        head: Callable[[int, int], nn.Module] | None = None,
        pretrained: str | None = None,
        vocab_size: int = 8192,
        outputs: int = 2,
        dropped: float = 0.0,
        mask: int = 0,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = WarmupCosine,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, distillation)
        if not 0.0 <= dropped < 1.0:
            raise MemtxError(f"dropped is {dropped}.", "Give a share from 0 up to, not including, 1.")
        made = None if pretrained is None else _encoder(pretrained, vocab_size)
        if made is not None:
            body = specs.built({**made.config, "init_args": without(made.config["init_args"], "vocab_size")})
            vocab_size = made.vocab_size
        self.model = TaskModel(vocab_size, outputs, body, head if head is not None else type(self).head_kind)
        if made is not None:
            weights = self.model.body.state_dict()
            self.model.body.load_state_dict({name: made.state_dict()[name] for name in weights})
        self.dropped, self.mask = dropped, mask
        self.metrics = nn.ModuleDict()
        for stage in ("val", "test"):
            self.metrics[f"{stage}_loss"] = MeanMetric()
            for name, metric in self.measures(outputs).items():
                self.metrics[f"{stage}_{name}"] = metric

    @abstractmethod
    def measures(self, outputs: int) -> dict[str, Metric]:
        """Return what the task is measured by, by name."""

    @abstractmethod
    def count(self, stage: str, asked: Asked, answers: Sequence[dict[str, Any]]) -> None:
        """Add a batch's answers to the stage's measures."""

    def loss(self, scores: Tensor, batch: TaskBatch) -> Tensor:
        """Return the mean loss of scores (rows, outputs) or (rows, length, outputs) against the batch's labels."""
        return F.cross_entropy(self.choices(scores, batch), batch.labels.flatten(), ignore_index=IGNORED)

    def choices(self, scores: Tensor, batch: TaskBatch) -> Tensor:
        """Return (n, classes) of scores (rows, outputs) or (rows, length, outputs): a row for each label."""
        return scores.flatten(0, -2)

    def metric(self, stage: str, name: str) -> Metric:
        """Return a stage's measure."""
        return cast(Metric, self.metrics[f"{stage}_{name}"])

    def training_step(self, batch: TaskBatch, index: int) -> Tensor:
        """Return the batch's loss."""
        read = batch._replace(tokens=self._thinned(batch))
        if self.distillation is None:
            loss = self.loss(self.model(read.tokens, read.present, read.types, read.marked), read)
        else:
            loss = self._distilled(self.distillation, read)
        return self._learned(loss, batch.tokens)

    def _distilled(self, distillation: Distillation, batch: TaskBatch) -> Tensor:
        """Return the losses of a batch that teacher and student read alike."""
        keep = distillation.needs_hidden(self.done)
        teacher = distillation.teacher(batch.tokens.device, self.model, batch.tokens.shape[1])

        def read() -> Shown:
            return shown_task(teacher, batch, self.choices, keep=keep)

        heard = distillation.heard(read, lambda: task_keys(batch))
        return self._compared(shown_task(self.model, batch, self.choices, keep=keep, loss=self.loss), heard)

    def setup(self, stage: str) -> None:
        """Open the teacher, where there is one and training begins."""
        if self.distillation is not None and self.distillation.caches and self.dropped:
            raise MemtxError(
                f"dropped is {self.dropped}, so no text comes again as it was, and a teacher's scores are to be kept.",
                "Set dropped to 0, or leave the distillation's cache out.",
            )
        super().setup(stage)

    def _thinned(self, batch: TaskBatch) -> Tensor:
        if not self.dropped:
            return batch.tokens
        chosen = torch.rand(batch.tokens.shape, device=batch.tokens.device) < self.dropped
        chosen &= (batch.marked == 0) & (batch.present == 1)
        return torch.where(chosen, self.mask, batch.tokens)

    def _measure(self, stage: str, batch: TaskBatch) -> None:
        assert batch.asked is not None
        scores = self.model(batch.tokens, batch.present, batch.types, batch.marked)
        rows = scores.shape[0]
        self.metric(stage, "loss").update(self.loss(scores, batch), rows)
        answers = batch.asked.answers([np.asarray(row) for row in scores.float().cpu()])
        self.count(stage, batch.asked, answers)
        for key, metric in self.metrics.items():
            if key.startswith(f"{stage}_"):
                self.log(key, cast(Metric, metric), prog_bar=True, on_step=False, on_epoch=True, batch_size=rows)

    def validation_step(self, batch: TaskBatch, index: int) -> None:
        """Measure a batch."""
        self._measure("val", batch)

    def test_step(self, batch: TaskBatch, index: int) -> None:
        """Measure a batch."""
        self._measure("test", batch)


class ClassificationModule(TaskModule):
    """One label a text or a pair of texts: ``accuracy``, and ``f1``, the mean of the labels' own."""

    head_kind = TextHead

    def measures(self, outputs: int) -> dict[str, Metric]:
        """Return accuracy and macro F1."""
        labels = max(2, outputs)
        return {
            "accuracy": MulticlassAccuracy(labels, average="micro"),
            "f1": MulticlassF1Score(labels, average="macro"),
        }

    def count(self, stage: str, asked: Asked, answers: Sequence[dict[str, Any]]) -> None:
        """Compare labels."""
        number = asked.task.number
        given = torch.tensor([number(one["label"]) for one in answers], device=self.device)
        wanted = torch.tensor([number(one.example.label) for one in asked.prepared], device=self.device)
        for name in ("accuracy", "f1"):
            self.metric(stage, name).update(given, wanted)


class TaggingModule(TaskModule):
    """A tag a word: ``f1`` of spans by seqeval's rules, and ``accuracy``, the share of words with the right tag."""

    head_kind = TokenHead

    def measures(self, outputs: int) -> dict[str, Metric]:
        """Return span F1 and accuracy."""
        return {"f1": SpanF1(), "accuracy": MeanMetric()}

    def count(self, stage: str, asked: Asked, answers: Sequence[dict[str, Any]]) -> None:
        """Compare spans and tags."""
        for one, said in zip(asked.prepared, answers, strict=True):
            wanted = cast(TaggedExample, one.example).tags or ()
            self.metric(stage, "f1").update(spans_of(said["tags"]), spans_of(wanted))
            right = sum(given == true for given, true in zip(said["tags"], wanted, strict=True))
            self.metric(stage, "accuracy").update(right / len(wanted), len(wanted))


class QuestionModule(TaskModule):
    """Spans that answer questions: SQuAD's ``exact_match`` and ``f1``, unanswerable questions among them."""

    head_kind = TokenHead

    def measures(self, outputs: int) -> dict[str, Metric]:
        """Return exact match and F1."""
        return {"exact_match": AnswerExactMatch(), "f1": AnswerF1()}

    def choices(self, scores: Tensor, batch: TaskBatch) -> Tensor:
        """Return (2 rows, length): of each row the scores of first and of last places, among which one is chosen."""
        scores = scores.masked_fill(batch.present[..., None] == 0, torch.finfo(scores.dtype).min)
        return scores.transpose(1, 2).flatten(0, 1)

    def count(self, stage: str, asked: Asked, answers: Sequence[dict[str, Any]]) -> None:
        """Compare texts."""
        for one, said in zip(asked.prepared, answers, strict=True):
            wanted = [answer.text for answer in cast(QuestionExample, one.example).answers or ()]
            for name in ("exact_match", "f1"):
                self.metric(stage, name).update(said["answer"], wanted)


def without(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """Return arguments but for one."""
    return {key: value for key, value in arguments.items() if key != name}


def _encoder(path: str, vocab_size: int) -> Encoder:
    made = from_pretrained(folder.chosen_place(path))
    if not isinstance(made, Encoder) or not isinstance(made, PublishedModel):
        raise MemtxError(f"'{path}' holds a {type(made).__name__}, expected an encoder.", "Change model.pretrained.")
    if made.vocab_size < vocab_size:
        raise MemtxError(
            f"'{path}' knows {made.vocab_size} tokens, the tokenizer has {vocab_size}.",
            "Give the tokenizer.json that it was trained with: data.tokenizer, OffsetTokenizer and its path.",
        )
    return made

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

from memtx import class_config
from memtx.checkpoint import pretrained
from memtx.checkpoint.load import from_pretrained
from memtx.data.batch import IGNORE_INDEX
from memtx.data.tasks.batches import BatchExamples, TaskBatch
from memtx.data.tasks.examples import QuestionExample, TaggedExample
from memtx.data.tasks.tagging import extract_spans
from memtx.errors import MemtxError
from memtx.metrics import AnswerExactMatch, AnswerF1, SpanF1
from memtx.models.encoder import Encoder
from memtx.models.heads import SequenceClassificationHead, TaskModel, TokenClassificationHead
from memtx.training.base_module import BaseModule
from memtx.training.distillation.distillation import Distillation
from memtx.training.distillation.model_outputs import ModelOutputs
from memtx.training.distillation.reading import forward_task, make_task_keys
from memtx.training.optimizers import WarmupCosine


class TaskModule(BaseModule):
    """Trains a model on a task's examples.

    Args:
        backbone: makes what reads, from the size of the vocabulary: ``Encoder``, or ``MemoryTransformerBackbone``.
        head: makes what scores, from width and num_labels; None for the task's own.
        pretrained: a folder of a published encoder or of our own format, a checkpoint, or a run's folder, whose weights
            the body begins with; ``backbone`` is then not looked at.
        vocab_size: of the tokenizer; flows from the data.
        num_labels: scores a text or a token; flows from the data.
        token_mask_prob: share of a training row's tokens, marks apart, that are replaced by ``mask_token_id``; keeps a
            model from learning few texts by heart.
        mask_token_id: the id that they are replaced by; flows from the data.
        optimizer: makes the optimiser from parameter groups.
        scheduler: makes the schedule from the optimiser, stepped every optimiser step.
        distillation: a teacher and what of it the model is to learn beside, or instead of, the labels; None for none.

    Raises:
        MemtxError: a number is out of range, or the pretrained model is no encoder or of a smaller vocabulary.
    """

    model: TaskModel
    default_head: Callable[[int, int], nn.Module] = SequenceClassificationHead

    def __init__(
        self,
        backbone: Callable[[int], nn.Module] = Encoder,
        head: Callable[[int, int], nn.Module] | None = None,
        pretrained: str | None = None,
        vocab_size: int = 8192,
        num_labels: int = 2,
        token_mask_prob: float = 0.0,
        mask_token_id: int = 0,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = WarmupCosine,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, distillation)
        if not 0.0 <= token_mask_prob < 1.0:
            raise MemtxError(f"token_mask_prob is {token_mask_prob}.", "Give a share from 0 up to, not including, 1.")
        made = None if pretrained is None else _load_encoder(pretrained, vocab_size)
        if made is not None:
            backbone = class_config.from_config(
                {**made.config, "init_args": _without_key(made.config["init_args"], "vocab_size")}
            )
            vocab_size = made.vocab_size
        self.model = TaskModel(vocab_size, num_labels, backbone, head if head is not None else type(self).default_head)
        if made is not None:
            weights = self.model.backbone.state_dict()
            self.model.backbone.load_state_dict({name: made.state_dict()[name] for name in weights})
        self.token_mask_prob, self.mask_token_id = token_mask_prob, mask_token_id
        self.metrics = nn.ModuleDict()
        for stage in ("val", "test"):
            self.metrics[f"{stage}_loss"] = MeanMetric()
            for name, metric in self.make_metrics(num_labels).items():
                self.metrics[f"{stage}_{name}"] = metric

    @abstractmethod
    def make_metrics(self, num_labels: int) -> dict[str, Metric]:
        """Return what the task is measured by, by name."""

    @abstractmethod
    def update_metrics(self, stage: str, batch_examples: BatchExamples, predictions: Sequence[dict[str, Any]]) -> None:
        """Add a batch's answers to the stage's measures."""

    def compute_loss(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """Return the mean loss of scores (rows, num_labels) or (rows, length, num_labels) against batch.labels."""
        return F.cross_entropy(self.flatten_logits(logits, batch), batch.labels.flatten(), ignore_index=IGNORE_INDEX)

    def flatten_logits(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """Return (n, classes) of scores (rows, num_labels) or (rows, length, num_labels): a row for each label."""
        return logits.flatten(0, -2)

    def get_metric(self, stage: str, name: str) -> Metric:
        """Return a stage's measure."""
        return cast(Metric, self.metrics[f"{stage}_{name}"])

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """Return the batch's loss."""
        read = batch._replace(tokens=self._mask_random_tokens(batch))
        if self.distillation is None:
            loss = self.compute_loss(
                self.model(read.tokens, read.attention_mask, read.token_type_ids, read.global_attention_mask), read
            )
        else:
            loss = self._distillation_step(self.distillation, read)
        return self._log_training_step(loss, batch.tokens)

    def _distillation_step(self, distillation: Distillation, batch: TaskBatch) -> Tensor:
        """Return the losses of a batch that teacher and student read alike."""
        keep = distillation.needs_hidden_states(self.progress)
        teacher = distillation.get_teacher(batch.tokens.device, self.model, batch.tokens.shape[1])

        def read() -> ModelOutputs:
            return forward_task(teacher, batch, self.flatten_logits, output_hidden_states=keep)

        heard = distillation.get_teacher_outputs(read, lambda: make_task_keys(batch))
        return self._distillation_loss(
            forward_task(self.model, batch, self.flatten_logits, output_hidden_states=keep, loss_fn=self.compute_loss),
            heard,
        )

    def setup(self, stage: str) -> None:
        """Open the teacher, where there is one and training begins."""
        if self.distillation is not None and self.distillation.uses_cache and self.token_mask_prob:
            raise MemtxError(
                f"token_mask_prob is {self.token_mask_prob}, so no text comes again as it was, and a teacher's scores "
                "are to be kept.",
                "Set token_mask_prob to 0, or leave the distillation's cache_dir out.",
            )
        super().setup(stage)

    def _mask_random_tokens(self, batch: TaskBatch) -> Tensor:
        if not self.token_mask_prob:
            return batch.tokens
        chosen = torch.rand(batch.tokens.shape, device=batch.tokens.device) < self.token_mask_prob
        chosen &= (batch.global_attention_mask == 0) & (batch.attention_mask == 1)
        return torch.where(chosen, self.mask_token_id, batch.tokens)

    def _evaluate(self, stage: str, batch: TaskBatch) -> None:
        assert batch.batch_examples is not None
        scores = self.model(batch.tokens, batch.attention_mask, batch.token_type_ids, batch.global_attention_mask)
        rows = scores.shape[0]
        self.get_metric(stage, "loss").update(self.compute_loss(scores, batch), rows)
        answers = batch.batch_examples.postprocess([np.asarray(row) for row in scores.float().cpu()])
        self.update_metrics(stage, batch.batch_examples, answers)
        for key, metric in self.metrics.items():
            if key.startswith(f"{stage}_"):
                self.log(key, cast(Metric, metric), prog_bar=True, on_step=False, on_epoch=True, batch_size=rows)

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Measure a batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Measure a batch."""
        self._evaluate("test", batch)


class ClassificationModule(TaskModule):
    """One label a text or a pair of texts: ``accuracy``, and ``f1``, the mean of the labels' own."""

    default_head = SequenceClassificationHead

    def make_metrics(self, num_labels: int) -> dict[str, Metric]:
        """Return accuracy and macro F1."""
        labels = max(2, num_labels)
        return {
            "accuracy": MulticlassAccuracy(labels, average="micro"),
            "f1": MulticlassF1Score(labels, average="macro"),
        }

    def update_metrics(self, stage: str, batch_examples: BatchExamples, predictions: Sequence[dict[str, Any]]) -> None:
        """Compare labels."""
        number = batch_examples.task.label_to_id
        given = torch.tensor([number(one["label"]) for one in predictions], device=self.device)
        wanted = torch.tensor([number(one.example.label) for one in batch_examples.examples], device=self.device)
        for name in ("accuracy", "f1"):
            self.get_metric(stage, name).update(given, wanted)


class TaggingModule(TaskModule):
    """A tag a word: ``f1`` of spans by seqeval's rules, and ``accuracy``, the share of words with the right tag."""

    default_head = TokenClassificationHead

    def make_metrics(self, num_labels: int) -> dict[str, Metric]:
        """Return span F1 and accuracy."""
        return {"f1": SpanF1(), "accuracy": MeanMetric()}

    def update_metrics(self, stage: str, batch_examples: BatchExamples, predictions: Sequence[dict[str, Any]]) -> None:
        """Compare spans and tags."""
        for one, said in zip(batch_examples.examples, predictions, strict=True):
            wanted = cast(TaggedExample, one.example).tags or ()
            self.get_metric(stage, "f1").update(extract_spans(said["tags"]), extract_spans(wanted))
            right = sum(given == true for given, true in zip(said["tags"], wanted, strict=True))
            self.get_metric(stage, "accuracy").update(right / len(wanted), len(wanted))


class QuestionAnsweringModule(TaskModule):
    """Spans that answer questions: SQuAD's ``exact_match`` and ``f1``, unanswerable questions among them."""

    default_head = TokenClassificationHead

    def make_metrics(self, num_labels: int) -> dict[str, Metric]:
        """Return exact match and F1."""
        return {"exact_match": AnswerExactMatch(), "f1": AnswerF1()}

    def flatten_logits(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """Return (2 rows, length): of each row the scores of first and of last places, among which one is chosen."""
        logits = logits.masked_fill(batch.attention_mask[..., None] == 0, torch.finfo(logits.dtype).min)
        return logits.transpose(1, 2).flatten(0, 1)

    def update_metrics(self, stage: str, batch_examples: BatchExamples, predictions: Sequence[dict[str, Any]]) -> None:
        """Compare texts."""
        for one, said in zip(batch_examples.examples, predictions, strict=True):
            wanted = [answer.text for answer in cast(QuestionExample, one.example).answers or ()]
            for name in ("exact_match", "f1"):
                self.get_metric(stage, name).update(said["answer"], wanted)


def _without_key(arguments: dict[str, Any], key: str) -> dict[str, Any]:
    """Return arguments but for one."""
    return {name: value for name, value in arguments.items() if name != key}


def _load_encoder(path: str, vocab_size: int) -> Encoder:
    made = from_pretrained(pretrained.resolve_model_path(path))
    if not isinstance(made, Encoder):
        raise MemtxError(f"'{path}' holds a {type(made).__name__}, expected an encoder.", "Change model.pretrained.")
    if made.vocab_size < vocab_size:
        raise MemtxError(
            f"'{path}' knows {made.vocab_size} tokens, the tokenizer has {vocab_size}.",
            "Give the tokenizer.json that it was trained with: data.tokenizer, HFTokenizer and its path.",
        )
    return made

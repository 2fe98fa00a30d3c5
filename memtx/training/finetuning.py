"""Fine-tuning modules, one per task type: encoder, head and metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MultilabelExactMatch, MultilabelF1Score

from memtx import class_config
from memtx.data.batch import IGNORE_INDEX
from memtx.data.tasks.batches import BatchExamples, TaskBatch
from memtx.data.tasks.examples import QuestionExample, TaggedExample
from memtx.data.tasks.tagging import extract_spans
from memtx.errors import MemtxError, check_probability
from memtx.metrics import AnswerExactMatch, AnswerF1, ClassReport, SpanF1
from memtx.models.encoder import Encoder
from memtx.models.heads import SequenceClassificationHead, TaskModel, TokenClassificationHead
from memtx.training.base_module import BaseModule
from memtx.training.class_weights import compute_class_weights
from memtx.training.distillation.model_outputs import ModelOutputs, forward_task
from memtx.training.distillation.teacher_cache import make_task_keys
from memtx.training.initial_model import load_initial_model


def count_pairs(targets: Tensor, predicted: Tensor, num_labels: int) -> Tensor:
    """Return how often each label, ``(n,)`` ids, was predicted for each target: ``(num_labels, num_labels)``."""
    counts = torch.bincount(targets * num_labels + predicted, minlength=num_labels**2)
    return counts.view(num_labels, num_labels)


class TaskModule(BaseModule):
    """Trains a model on the examples of a task.

    Args:
        backbone: Creates the model below the head from the vocabulary size: ``Encoder`` or
            ``MemoryTransformerBackbone``.
        head: Creates the head from width and ``num_labels``. None means the task's default head.
        pretrained: Folder of a Hugging Face or memtx encoder, checkpoint or run folder to initialize the backbone from;
            ``backbone`` is then ignored.
        vocab_size: Vocabulary size; set from the data module.
        num_labels: Logits per text or token; set from the data module.
        token_mask_prob: Probability that a training token, other than special tokens, is replaced by ``mask_token_id``,
            against overfitting to few texts.
        mask_token_id: Id of the mask token; set from the data module.
        class_weights: Weights of the classes in the training loss: ``balanced`` for weights inversely proportional to
            the training examples (or words) of each class, numbers in the order of the labels, or numbers by label,
            where the others have 1. With several labels a text they weight its labels against those it lacks. The
            losses of validation and test are not weighted. None weights all alike.
        **options: ``optimizer``, ``scheduler``, ``gate_lr_multiplier`` and ``distillation`` of :class:`BaseModule`.

    Raises:
        MemtxError: A number is out of range, the pretrained model is no encoder or has a smaller vocabulary, or the
            task supports no class weights or no distillation.
    """

    model: TaskModel
    supports_class_weights: ClassVar[bool] = True
    supports_distillation: ClassVar[bool] = True
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
        class_weights: Literal["balanced"] | list[float] | dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_probability(token_mask_prob=token_mask_prob)
        for name, value in (("class_weights", class_weights), ("distillation", self.distillation)):
            if value is not None and not getattr(self, f"supports_{name}"):
                raise MemtxError(f"{type(self).__name__} does not support {name}.", f"Remove model.{name}.")
        self.class_weights = class_weights
        self.label_weights: Tensor | None
        self.register_buffer("label_weights", None, persistent=False)
        self.class_report: ClassReport | None = None
        self.report: dict[str, Any] | None = None
        encoder = None if pretrained is None else load_initial_model(pretrained, Encoder, "an encoder", vocab_size)
        if encoder is not None:
            init_args = {name: value for name, value in encoder.config["init_args"].items() if name != "vocab_size"}
            backbone = class_config.from_config({**encoder.config, "init_args": init_args})
            vocab_size = encoder.vocab_size
        self.model = TaskModel(vocab_size, num_labels, backbone, head if head is not None else type(self).default_head)
        if encoder is not None:
            weights, names = encoder.state_dict(), self.model.backbone.state_dict().keys()
            self.model.backbone.load_state_dict({name: weights[name] for name in names})
        self.token_mask_prob, self.mask_token_id = token_mask_prob, mask_token_id
        self.metrics = nn.ModuleDict()
        for stage in ("val", "test"):
            self.metrics[f"{stage}_loss"] = MeanMetric()
            for name, metric in self.make_metrics(num_labels).items():
                self.metrics[f"{stage}_{name}"] = metric

    def make_class_report(self, labels: Sequence[str]) -> ClassReport | None:
        """Return the scores of each class that ``memtx validate`` and ``memtx test`` report; None without classes."""
        return None

    @abstractmethod
    def make_metrics(self, num_labels: int) -> dict[str, Metric]:
        """Return the metrics of the task by name."""

    @abstractmethod
    def update_metrics(self, stage: str, batch_examples: BatchExamples, predictions: Sequence[dict[str, Any]]) -> None:
        """Add the predictions for a batch to the metrics of a stage."""

    def compute_loss(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """Return the mean loss of logits ``(batch, num_labels)`` or ``(batch, length, num_labels)``."""
        weight = self.training_weights(logits)
        return F.cross_entropy(
            self.flatten_logits(logits, batch), batch.labels.flatten(), weight=weight, ignore_index=IGNORE_INDEX
        )

    def training_weights(self, logits: Tensor) -> Tensor | None:
        """Return the weights of the classes in the dtype of the logits; None in evaluation."""
        return self.label_weights.to(logits.dtype) if self.training and self.label_weights is not None else None

    def flatten_logits(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """Return the logits as ``(n, classes)``, one row per label."""
        return logits.flatten(0, -2)

    def get_metric(self, stage: str, name: str) -> Metric:
        """Return a metric of a stage."""
        return cast(Metric, self.metrics[f"{stage}_{name}"])

    def _logits(self, batch: TaskBatch) -> Tensor:
        logits: Tensor = self.model(
            batch.tokens, batch.attention_mask, batch.token_type_ids, batch.global_attention_mask
        )
        return logits

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, or its distillation losses."""
        batch = batch._replace(tokens=self._mask_random_tokens(batch))
        if self.distillation is None:
            return self._log_training_step(self.compute_loss(self._logits(batch), batch), batch.tokens)
        needs_hidden = self.distillation.needs_hidden_states(self.progress)
        teacher = self.distillation.get_teacher(batch.tokens.device, self.model, batch.tokens.shape[1])

        def run_teacher() -> ModelOutputs:
            return forward_task(teacher, batch, self.flatten_logits, output_hidden_states=needs_hidden)

        teacher_outputs = self.distillation.get_teacher_outputs(run_teacher, lambda: make_task_keys(batch))
        outputs = forward_task(
            self.model, batch, self.flatten_logits, output_hidden_states=needs_hidden, loss_fn=self.compute_loss
        )
        return self._log_training_step(self._distillation_loss(outputs, teacher_outputs), batch.tokens)

    def setup(self, stage: str) -> None:
        """Load the teacher and compute the weights of the classes when training begins; prepare the class report."""
        if stage == "fit" and self.class_weights is not None:
            self.label_weights = compute_class_weights(self.class_weights, self.datamodule, self.balanced_weights)
        elif stage != "fit" and (task := getattr(self.datamodule, "task", None)) is not None:
            self.class_report = self.make_class_report(task.labels)
        if self.distillation is not None and self.distillation.uses_cache and self.token_mask_prob:
            raise MemtxError(
                f"distillation.cache_dir caches the teacher's logits, but token_mask_prob ({self.token_mask_prob}) "
                "changes the texts in every epoch.",
                "Set token_mask_prob to 0, or remove cache_dir from model.distillation.",
            )
        super().setup(stage)

    def _mask_random_tokens(self, batch: TaskBatch) -> Tensor:
        if not self.token_mask_prob:
            return batch.tokens
        selected = torch.rand(batch.tokens.shape, device=batch.tokens.device) < self.token_mask_prob
        selected &= (batch.global_attention_mask == 0) & (batch.attention_mask == 1)
        return torch.where(selected, self.mask_token_id, batch.tokens)

    def evaluate_batch(self, stage: str, batch: TaskBatch, batch_idx: int) -> None:
        """Update and log the metrics of a stage."""
        assert batch.batch_examples is not None
        logits, batch_size = self._logits(batch), batch.tokens.shape[0]
        self.get_metric(stage, "loss").update(self.compute_loss(logits, batch), batch_size)
        predictions = batch.batch_examples.postprocess([np.asarray(window) for window in logits.float().cpu()])
        self.update_metrics(stage, batch.batch_examples, predictions)
        self._log_metrics(stage, batch_size)

    def _log_metrics(self, stage: str, batch_size: int) -> None:
        for key, metric in self.metrics.items():
            if key.startswith(f"{stage}_"):
                self.log(key, cast(Metric, metric), prog_bar=True, on_step=False, on_epoch=True, batch_size=batch_size)

    def log_at_epoch_end(self, stage: str) -> None:
        """Compute the class report, on all processes."""
        if self.class_report is not None:
            self.report = self.class_report.compute()
            self.class_report.reset()

    @staticmethod
    def balanced_weights(counts: Tensor, num_examples: int) -> Tensor:
        """Return the weights that make all classes count alike, for the number of training examples of each."""
        return counts.sum() / (len(counts) * counts.clamp(min=1))


class ClassificationModule(TaskModule):
    """One label per text or pair of texts; logs ``accuracy`` and macro-averaged ``f1``."""

    default_head = SequenceClassificationHead

    def make_metrics(self, num_labels: int) -> dict[str, Metric]:
        """Return accuracy and macro-averaged F1."""
        num_labels = max(2, num_labels)
        accuracy = MulticlassAccuracy(num_labels, average="micro")
        return {"accuracy": accuracy, "f1": MulticlassF1Score(num_labels, average="macro")}

    def update_metrics(self, stage: str, batch_examples: BatchExamples, predictions: Sequence[dict[str, Any]]) -> None:
        """Compare labels."""
        label_id = batch_examples.task.label_to_id
        predicted = torch.tensor([label_id(prediction["label"]) for prediction in predictions], device=self.device)
        targets = torch.tensor([label_id(item.example.label) for item in batch_examples.examples], device=self.device)
        for name in ("accuracy", "f1"):
            self.get_metric(stage, name).update(predicted, targets)
        self.add_to_picture("confusion", count_pairs(targets, predicted, batch_examples.task.num_labels))
        for item, prediction in zip(batch_examples.examples, predictions, strict=True):
            if self.class_report is not None:
                label, target = prediction["label"], item.example.label
                self.class_report.update([(label,)], [(target,)])
                self.class_report.update_confusion([label], [target])

    def make_class_report(self, labels: Sequence[str]) -> ClassReport:
        """Return scores by label, and the confusion matrix of the labels."""
        return ClassReport(labels, labels)


class MultiLabelModule(TaskModule):
    """Any number of labels a text; logs micro-averaged ``f1``, ``macro_f1`` and ``exact_match`` (of all labels)."""

    supports_distillation = False

    def make_metrics(self, num_labels: int) -> dict[str, Metric]:
        """Return F1 over all labels, the mean F1 of the labels, and the fraction of texts without a mistake."""
        macro_f1 = MultilabelF1Score(num_labels, average="macro")
        exact_match = MultilabelExactMatch(num_labels)
        return {"f1": MultilabelF1Score(num_labels, average="micro"), "macro_f1": macro_f1, "exact_match": exact_match}

    def compute_loss(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """Return the mean binary cross-entropy over labels."""
        labels = batch.labels.reshape(logits.shape).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=self.training_weights(logits))

    def update_metrics(self, stage: str, batch_examples: BatchExamples, predictions: Sequence[dict[str, Any]]) -> None:
        """Compare sets of labels."""
        labels = batch_examples.task.labels
        targets = [item.example.labels or () for item in batch_examples.examples]
        predicted, true = (
            torch.tensor([[label in entry for label in labels] for entry in entries], device=self.device).long()
            for entries in ([prediction["labels"] for prediction in predictions], targets)
        )
        for name in ("f1", "macro_f1", "exact_match"):
            self.get_metric(stage, name).update(predicted, true)
        if self.class_report is not None:
            for prediction, target in zip(predictions, targets, strict=True):
                self.class_report.update([(label,) for label in prediction["labels"]], [(name,) for name in target])

    def make_class_report(self, labels: Sequence[str]) -> ClassReport:
        """Return scores by label."""
        return ClassReport(labels)

    @staticmethod
    def balanced_weights(counts: Tensor, num_examples: int) -> Tensor:
        """Return the ratios of texts without and with each label."""
        return (num_examples - counts).clamp(min=1) / counts.clamp(min=1)


class TaggingModule(TaskModule):
    """One tag per word; logs ``f1`` of spans by seqeval's rules and ``accuracy`` of tags."""

    default_head = TokenClassificationHead

    def make_metrics(self, num_labels: int) -> dict[str, Metric]:
        """Return span F1 and accuracy."""
        return {"f1": SpanF1(), "accuracy": MeanMetric()}

    def update_metrics(self, stage: str, batch_examples: BatchExamples, predictions: Sequence[dict[str, Any]]) -> None:
        """Compare spans and tags."""
        task = batch_examples.task
        for item, prediction in zip(batch_examples.examples, predictions, strict=True):
            predicted, targets = prediction["tags"], cast(TaggedExample, item.example).tags or ()
            self.get_metric(stage, "f1").update(extract_spans(predicted), extract_spans(targets))
            num_correct = sum(tag == target for tag, target in zip(predicted, targets, strict=True))
            self.get_metric(stage, "accuracy").update(num_correct / len(targets), len(targets))
            true_ids, ids = torch.tensor([list(map(task.label_to_id, tags)) for tags in (targets, predicted)])
            self.add_to_picture("confusion", count_pairs(true_ids, ids, task.num_labels))
            if self.class_report is not None:
                self.class_report.update(extract_spans(predicted), extract_spans(targets))
                self.class_report.update_confusion(predicted, targets)

    def make_class_report(self, labels: Sequence[str]) -> ClassReport:
        """Return scores of spans by type, and the confusion matrix of the tags."""
        types = {span_type for label in labels for span_type, *_ in extract_spans([label])}
        return ClassReport(sorted(types), labels)


class QuestionAnsweringModule(TaskModule):
    """Answers as spans of a text; logs ``exact_match`` and ``f1`` of SQuAD, unanswerable questions included."""

    default_head = TokenClassificationHead
    supports_class_weights = False

    def make_metrics(self, num_labels: int) -> dict[str, Metric]:
        """Return exact match and F1."""
        return {"exact_match": AnswerExactMatch(), "f1": AnswerF1()}

    def flatten_logits(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """Return ``(2 * batch, length)``: for each text the logits of the answer's first and of its last position."""
        logits = logits.masked_fill(batch.attention_mask[..., None] == 0, torch.finfo(logits.dtype).min)
        return logits.transpose(1, 2).flatten(0, 1)

    def update_metrics(self, stage: str, batch_examples: BatchExamples, predictions: Sequence[dict[str, Any]]) -> None:
        """Compare answers."""
        for item, prediction in zip(batch_examples.examples, predictions, strict=True):
            targets = [answer.text for answer in cast(QuestionExample, item.example).answers or ()]
            for name in ("exact_match", "f1"):
                self.get_metric(stage, name).update(prediction["answer"], targets)

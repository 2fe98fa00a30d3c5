"""Distillation as a part of a training module: the teacher, its losses and its cached logits.

The teacher is loaded when training begins and is in no checkpoint: a run's student is loaded, evaluated and served
without it, and a resumed run loads it again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from memtx.checkpoint import pretrained
from memtx.data.books import BookDataModule
from memtx.errors import MemtxError
from memtx.memory.base import Losses
from memtx.models.memory_transformer import MemoryTransformer
from memtx.ops.cpu.cpu_info import is_bf16_slow
from memtx.training.distillation.layer_map import LayerMap
from memtx.training.distillation.losses import DistillationLoss, HardLabels, SoftTargets
from memtx.training.distillation.model_outputs import ModelDims, ModelOutputs
from memtx.training.distillation.student_init import init_student
from memtx.training.distillation.teacher import check_teacher, load_teacher
from memtx.training.distillation.teacher_cache import LogitCache, LogitTable, top_k_logits

LossFactory = Callable[[ModelDims, ModelDims], DistillationLoss]

_WORD_BOUNDARY = re.compile(r"(?<=[a-z])(?=[A-Z])")


class Distillation(nn.Module):
    """Distillation of a teacher into the trained model (Hinton et al. 2015; Sanh et al. 2019).

    Attributes:
        losses: Loss terms; empty until training begins.
        logit_table: Cached logits of a book corpus; None without a cache.

    Args:
        teacher: Run folder, checkpoint, or pretrained folder of memtx or ``transformers``.
        losses: Creates the losses from the dimensions of student and teacher; ``HardLabels`` is the loss without a
            teacher. Defaults to ``SoftTargets`` and ``HardLabels``.
        student_init: Teacher layers to initialize the student's layers from. None keeps the random initialization.
        bf16: If True, store and run the teacher in bfloat16, except on CPUs where it is slow.
        cache_dir: Folder to cache the teacher's top-k logits in, so that it reads each text once. The losses must
            compare logits, and every epoch must repeat the same texts. None disables the cache.
        top_k: Cached logits per position. Defaults to 64.
    """

    resets_every_step = False
    """If True, a language model starts every step with fresh streams."""

    def __init__(
        self,
        teacher: str | None = None,
        losses: Sequence[LossFactory] = (SoftTargets, HardLabels),
        student_init: LayerMap | None = None,
        bf16: bool = False,
        cache_dir: str | None = None,
        top_k: int = 64,
    ) -> None:
        super().__init__()
        self.teacher_path, self.loss_factories, self.student_init, self.bf16 = teacher, list(losses), student_init, bf16
        self.cache_dir, self.top_k = cache_dir, top_k
        self.losses = nn.ModuleList()
        # In a list, so that it is no submodule: the teacher is neither optimized nor saved.
        self._teacher: list[nn.Module] = []
        self._logit_cache: LogitCache | None = None
        self.logit_table: LogitTable | None = None

    def setup(self, student: nn.Module, datamodule: Any = None) -> None:
        """Load the teacher, create the losses, and initialize the student if ``student_init`` is given.

        Raises:
            MemtxError: No teacher is given, or it does not fit the student, the data or the losses.
        """
        if self.teacher_path is None:
            raise MemtxError(
                "distillation.teacher is not set.",
                "Add --model.distillation.init_args.teacher with a run folder, a checkpoint or a pretrained folder.",
            )
        teacher = load_teacher(self.teacher_path)
        check_teacher(teacher, student, datamodule)
        self._teacher = [teacher.model]
        self._create_losses(ModelDims.from_model(student), ModelDims.from_model(teacher.model))
        if self.student_init is not None:
            init_student(student, teacher.model, self.student_init)
        if self.bf16 and not is_bf16_slow():
            teacher.model.to(torch.bfloat16)  # after the student took its weights
        if self.cache_dir is not None:
            self._open_cache(self.cache_dir, teacher.model, datamodule)

    def _create_losses(self, student: ModelDims, teacher: ModelDims) -> None:
        if not self.loss_factories:
            raise MemtxError("distillation.losses is empty.", "Add at least one, such as SoftTargets.")
        self.losses = nn.ModuleList(factory(student, teacher) for factory in self.loss_factories)

    def _open_cache(self, cache_dir: str, teacher: nn.Module, datamodule: Any) -> None:
        if names := [type(loss).__name__ for loss in self._loss_modules() if loss.required_outputs == "hidden"]:
            raise MemtxError(
                f"The cache stores a teacher's logits, but {', '.join(names)} needs its layers.",
                "Remove cache_dir, or these losses.",
            )
        assert isinstance(teacher, pretrained.PretrainedModel)
        if isinstance(datamodule, BookDataModule):
            store = datamodule.token_store("train")
            fingerprint = sha256((teacher.fingerprint + store.fingerprint).encode()).hexdigest()
            self.logit_table = LogitTable(cache_dir, fingerprint, store.num_tokens, self.top_k)
        else:
            self._logit_cache = LogitCache(cache_dir, teacher.fingerprint, self.top_k)

    def _loss_modules(self) -> list[DistillationLoss]:
        return [loss for loss in self.losses if isinstance(loss, DistillationLoss)]

    @property
    def uses_cache(self) -> bool:
        """True if the teacher's logits are cached."""
        return self.cache_dir is not None

    def needs_hidden_states(self, progress: float) -> bool:
        """Return whether a loss that is active at this fraction of the run compares layers."""
        return any(loss.required_outputs == "hidden" and loss.is_active(progress) for loss in self._loss_modules())

    def get_teacher(self, device: torch.device, student: nn.Module, length: int) -> nn.Module:
        """Return the teacher on the device of the student, for batches of ``length`` tokens per stream."""
        (teacher,) = self._teacher
        if next(teacher.parameters()).device != device:
            teacher.to(device)
        return teacher

    @torch.no_grad()
    def get_teacher_outputs(
        self, run_teacher: Callable[[], ModelOutputs], make_keys: Callable[[], Sequence[bytes]] = list
    ) -> ModelOutputs:
        """Return the teacher's outputs for a batch, from the cache if it has them.

        ``run_teacher`` reads the batch, and ``make_keys``, called only with a cache, returns a key per scored position.
        """
        if self._logit_cache is None:
            return run_teacher()
        keys = make_keys()
        cached = self._logit_cache.get(keys)
        if cached is None:
            outputs = run_teacher()
            assert outputs.features is not None
            logits = outputs.features if outputs.head is None else outputs.head(outputs.features)
            self._logit_cache.put(keys, *top_k_logits(logits, self.top_k))
            cached = self._logit_cache.get(keys)
            assert cached is not None
        device = next(self._teacher[0].parameters()).device
        return ModelOutputs(cached[0].to(device), class_indices=cached[1].to(device))

    def compute_losses(self, student: ModelOutputs, teacher: ModelOutputs, progress: float) -> Losses:
        """Return the weighted losses by name at ``progress``, the fraction of the run that is done."""
        losses: Losses = {}
        for loss in self._loss_modules():
            if loss.is_active(progress):
                value = loss.weight * loss(student, teacher)
            elif parameters := list(loss.parameters()):
                # Kept in the graph, because DDP needs a gradient for every parameter.
                value = torch.stack([parameter.sum() * 0.0 for parameter in parameters]).sum()
            else:
                continue
            name = _WORD_BOUNDARY.sub("_", type(loss).__name__).lower()
            losses[name] = losses[name] + value if name in losses else value
        return losses


class SelfDistillation(Distillation):
    """Distillation of a memory transformer's full attention over a batch into its memory.

    The teacher has the student's current weights and no memory, and attends to the whole batch, so batches should be
    no longer than the model was trained on. Every step starts with fresh streams, so that both read the same text.

    Args:
        losses: Creates the losses from the dimensions of student and teacher. Defaults to ``SoftTargets`` and
            ``HardLabels``.
    """

    resets_every_step = True

    def __init__(self, losses: Sequence[LossFactory] = (SoftTargets, HardLabels)) -> None:
        super().__init__(None, losses)

    def setup(self, student: nn.Module, datamodule: Any = None) -> None:
        """Create the losses; raises MemtxError if the student is no memory transformer or they do not fit it."""
        if not isinstance(student, MemoryTransformer):
            raise MemtxError(
                f"SelfDistillation needs a model with memory, not {type(student).__name__}.",
                "Use a MemoryTransformer, or Distillation with another teacher.",
            )
        dims = ModelDims.from_model(student)
        self._create_losses(dims, dims)

    def get_teacher(self, device: torch.device, student: nn.Module, length: int) -> nn.Module:
        """Return the student without memory and with a window of ``length`` tokens, in eval mode."""
        assert isinstance(student, MemoryTransformer)
        return student.without_memory(length).eval()

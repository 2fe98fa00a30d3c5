"""A teacher and what of it a student is to learn: the part that makes a training module distil.

The teacher is opened when training begins and is in no checkpoint: a run's student is loaded, measured and served
without it, and going on with the run opens it again.
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
from memtx.training.distillation.layer_map import LayerMap
from memtx.training.distillation.losses import DistillationLoss, HardLabels, SoftTargets
from memtx.training.distillation.model_outputs import ModelDims, ModelOutputs
from memtx.training.distillation.student_init import init_student
from memtx.training.distillation.teacher import check_teacher_data, check_teacher_type, load_teacher
from memtx.training.distillation.teacher_cache import LogitCache, LogitTable, top_k_logits

_WORD_BOUNDARY = re.compile(r"(?<=[a-z])(?=[A-Z])")


class Distillation(nn.Module):
    """Distillation of a teacher into the model that a module trains (Hinton et al. 2015; Sanh et al. 2019).

    Attributes:
        losses: what the student is to have like the teacher; empty until training begins.
        logit_table: the teacher's scores of a corpus, where they are kept.

    Args:
        teacher: a run's folder, a checkpoint, or a folder of ours or of a published model.
        losses: makes the losses from the sizes of student and teacher; ``HardLabels`` is what would be learned without
            a teacher.
        student_init: which layer of the teacher each of the student's begins as; None for a student drawn at random.
        bf16: whether the teacher is held and run in bfloat16; in float32 all the same on CPUs that are slow in it.
        cache_dir: a folder in which the teacher's highest scores are kept, so that it reads each text once; None to let
            it read every time. For losses of scores alone and texts that come again as they were.
        top_k: how many scores a place are kept there.
    """

    resets_every_step = False
    """Whether every step of a language model is to begin with fresh streams."""

    def __init__(
        self,
        teacher: str | None = None,
        losses: Sequence[Callable[[ModelDims, ModelDims], DistillationLoss]] = (SoftTargets, HardLabels),
        student_init: LayerMap | None = None,
        bf16: bool = False,
        cache_dir: str | None = None,
        top_k: int = 64,
    ) -> None:
        super().__init__()
        self.teacher_path, self.loss_factories, self.student_init, self.bf16 = teacher, list(losses), student_init, bf16
        self.cache_dir, self.top_k = cache_dir, top_k
        self.losses = nn.ModuleList()
        # Not a part of this module: neither its optimiser nor its checkpoints are to know the teacher.
        self._teacher: list[nn.Module] = []
        self._logit_cache: LogitCache | None = None
        self.logit_table: LogitTable | None = None

    def setup(self, student: nn.Module, datamodule: Any = None) -> None:
        """Open the teacher and make the losses; where ``student_init`` says so, let the student begin as the teacher.

        Args:
            student: what is trained.
            datamodule: the run's data module, to be compared with what the teacher was trained on.

        Raises:
            MemtxError: no teacher is named, or it does not fit the student, the data or the losses.
        """
        if self.teacher_path is None:
            raise MemtxError(
                "No teacher is given to be distilled.",
                "Add --model.distillation.init_args.teacher RUN: a run's folder, a checkpoint or a published folder.",
            )
        kept = load_teacher(self.teacher_path, bf16=self.bf16)
        check_teacher_type(kept, student)
        check_teacher_data(kept, datamodule)
        self._teacher = [kept.model]
        self._build_losses(ModelDims.from_model(student), ModelDims.from_model(kept.model))
        if self.cache_dir is not None:
            self._open_cache(kept.model, datamodule)
        if self.student_init is not None:
            init_student(student, kept.model, self.student_init)

    def _build_losses(self, student: ModelDims, teacher: ModelDims) -> None:
        if not self.loss_factories:
            raise MemtxError("There are no losses to distil by.", "Give some, such as SoftTargets.")
        self.losses = nn.ModuleList(make(student, teacher) for make in self.loss_factories)

    def _open_cache(self, teacher: nn.Module, datamodule: Any) -> None:
        assert self.cache_dir is not None
        if layers := [type(one).__name__ for one in self._loss_modules() if one.required_outputs == "hidden"]:
            raise MemtxError(
                f"The cache holds a teacher's scores, and {', '.join(layers)} asks for its layers.",
                "Leave out cache_dir, or these losses.",
            )
        assert isinstance(teacher, pretrained.PretrainedModel)
        if isinstance(datamodule, BookDataModule):
            store = datamodule.token_store("train")
            both = sha256((teacher.fingerprint + store.fingerprint).encode()).hexdigest()
            self.logit_table = LogitTable(self.cache_dir, both, store.num_tokens, self.top_k)
        else:
            self._logit_cache = LogitCache(self.cache_dir, teacher.fingerprint, self.top_k)

    def _loss_modules(self) -> list[DistillationLoss]:
        return [one for one in self.losses if isinstance(one, DistillationLoss)]

    @property
    def uses_cache(self) -> bool:
        """Whether scores are kept on disk."""
        return self.cache_dir is not None

    def needs_hidden_states(self, progress: float) -> bool:
        """Return whether a loss that counts now compares layers."""
        return any(one.required_outputs == "hidden" and one.is_active(progress) for one in self._loss_modules())

    def get_teacher(self, device: torch.device, student: nn.Module, length: int) -> nn.Module:
        """Return the teacher on a device.

        Args:
            device: the student's.
            student: what is trained.
            length: of a row of the batch.
        """
        (teacher,) = self._teacher
        if next(teacher.parameters()).device != device:
            teacher.to(device)
        return teacher

    @torch.no_grad()
    def get_teacher_outputs(
        self, run_teacher: Callable[[], ModelOutputs], make_keys: Callable[[], Sequence[bytes]] = list
    ) -> ModelOutputs:
        """Return what the teacher shows, from disk if it is there.

        Args:
            run_teacher: reads with the teacher.
            make_keys: makes the key of each scored place; asked only where scores are kept.
        """
        if self._logit_cache is None:
            return run_teacher()
        names = make_keys()
        found = self._logit_cache.get(names)
        if found is None:
            shown = run_teacher()
            assert shown.features is not None
            scores = shown.features if shown.head is None else shown.head(shown.features)
            self._logit_cache.put(names, *top_k_logits(scores, self.top_k))
            found = self._logit_cache.get(names)
            assert found is not None
        device = next(self._teacher[0].parameters()).device
        return ModelOutputs(found[0].to(device), class_indices=found[1].to(device))

    def compute_losses(self, student: ModelOutputs, teacher: ModelOutputs, progress: float) -> Losses:
        """Return the weighted losses by name.

        Args:
            student: what it shows, with gradient.
            teacher: what it shows of the same text.
            progress: of the run that is done, from 0 to 1.
        """
        named: Losses = {}
        for one in self._loss_modules():
            if one.is_active(progress):
                value = one.weight * one(student, teacher)
            elif own := list(one.parameters()):
                # In the graph all the same, as several processes need it.
                value = torch.stack([weight.sum() * 0.0 for weight in own]).sum()
            else:
                continue
            name = _WORD_BOUNDARY.sub("_", type(one).__name__).lower()
            named[name] = named[name] + value if name in named else value
        return named

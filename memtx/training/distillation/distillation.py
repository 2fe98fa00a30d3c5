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

from memtx.data.books import BookDataModule
from memtx.errors import MemtxError
from memtx.memory.base import Losses
from memtx.models import folder
from memtx.training.distillation.cached import ScoreCache, ScoreTable, highest
from memtx.training.distillation.layer_map import LayerMap
from memtx.training.distillation.losses import HardLabels, Loss, SoftTargets
from memtx.training.distillation.shown import Shown, Sizes
from memtx.training.distillation.start import begin_as
from memtx.training.distillation.teacher import check_data, check_kind, opened

_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


class Distillation(nn.Module):
    """Distillation of a teacher into the model that a module trains (Hinton et al. 2015; Sanh et al. 2019).

    Attributes:
        losses: what the student is to have like the teacher; empty until training begins.
        table: the teacher's scores of a corpus, where they are kept.

    Args:
        teacher: a run's folder, a checkpoint, or a folder of ours or of a published model.
        losses: makes the losses from the sizes of student and teacher; ``HardLabels`` is what would be learned without
            a teacher.
        start: which layer of the teacher each of the student's begins as; None for a student drawn at random.
        bf16: whether the teacher is held and run in bfloat16; in float32 all the same on CPUs that are slow in it.
        cache: a folder in which the teacher's highest scores are kept, so that it reads each text once; None to let it
            read every time. For losses of scores alone and texts that come again as they were.
        top: how many scores a place are kept there.
    """

    fresh = False
    """Whether every step of a language model is to begin with fresh streams."""

    def __init__(
        self,
        teacher: str | None = None,
        losses: Sequence[Callable[[Sizes, Sizes], Loss]] = (SoftTargets, HardLabels),
        start: LayerMap | None = None,
        bf16: bool = False,
        cache: str | None = None,
        top: int = 64,
    ) -> None:
        super().__init__()
        self.path, self.makers, self.start, self.bf16 = teacher, list(losses), start, bf16
        self.folder, self.top = cache, top
        self.losses = nn.ModuleList()
        # Not a part of this module: neither its optimiser nor its checkpoints are to know the teacher.
        self._teacher: list[nn.Module] = []
        self._cache: ScoreCache | None = None
        self.table: ScoreTable | None = None

    def open(self, student: nn.Module, data: Any = None) -> None:
        """Open the teacher and make the losses; where ``start`` says so, let the student begin as the teacher.

        Args:
            student: what is trained.
            data: the run's data module, to be compared with what the teacher was trained on.

        Raises:
            MemtxError: no teacher is named, or it does not fit the student, the data or the losses.
        """
        if self.path is None:
            raise MemtxError(
                "No teacher is given to be distilled.",
                "Add --model.distillation.init_args.teacher RUN: a run's folder, a checkpoint or a published folder.",
            )
        kept = opened(self.path, bf16=self.bf16)
        check_kind(kept, student)
        check_data(kept, data)
        self._teacher = [kept.model]
        self._make(Sizes.of(student), Sizes.of(kept.model))
        if self.folder is not None:
            self._open_cache(kept.model, data)
        if self.start is not None:
            begin_as(student, kept.model, self.start)

    def _make(self, student: Sizes, teacher: Sizes) -> None:
        if not self.makers:
            raise MemtxError("There are no losses to distil by.", "Give some, such as SoftTargets.")
        self.losses = nn.ModuleList(make(student, teacher) for make in self.makers)

    def _open_cache(self, teacher: nn.Module, data: Any) -> None:
        assert self.folder is not None
        if layers := [type(one).__name__ for one in self._losses() if one.asks == "hidden"]:
            raise MemtxError(
                f"The cache holds a teacher's scores, and {', '.join(layers)} asks for its layers.",
                "Leave out cache, or these losses.",
            )
        assert isinstance(teacher, folder.Kept)
        if isinstance(data, BookDataModule):
            store = data.store("train")
            both = sha256((teacher.fingerprint + store.fingerprint).encode()).hexdigest()
            self.table = ScoreTable(self.folder, both, store.total, self.top)
        else:
            self._cache = ScoreCache(self.folder, teacher.fingerprint, self.top)

    def _losses(self) -> list[Loss]:
        return [one for one in self.losses if isinstance(one, Loss)]

    @property
    def caches(self) -> bool:
        """Whether scores are kept on disk."""
        return self.folder is not None

    def needs_hidden(self, share: float) -> bool:
        """Return whether a loss that counts now compares layers."""
        return any(one.asks == "hidden" and one.counts(share) for one in self._losses())

    def teacher(self, device: torch.device, student: nn.Module, tokens: int) -> nn.Module:
        """Return the teacher on a device.

        Args:
            device: the student's.
            student: what is trained.
            tokens: of a row of the batch.
        """
        (teacher,) = self._teacher
        if next(teacher.parameters()).device != device:
            teacher.to(device)
        return teacher

    @torch.no_grad()
    def heard(self, read: Callable[[], Shown], keys: Callable[[], Sequence[bytes]] = list) -> Shown:
        """Return what the teacher shows, from disk if it is there.

        Args:
            read: reads with the teacher.
            keys: makes the key of each scored place; asked only where scores are kept.
        """
        if self._cache is None:
            return read()
        names = keys()
        found = self._cache.get(names)
        if found is None:
            shown = read()
            assert shown.states is not None
            scores = shown.states if shown.head is None else shown.head(shown.states)
            self._cache.put(names, *highest(scores, self.top))
            found = self._cache.get(names)
            assert found is not None
        device = next(self._teacher[0].parameters()).device
        return Shown(found[0].to(device), index=found[1].to(device))

    def compared(self, student: Shown, teacher: Shown, share: float) -> Losses:
        """Return the weighted losses by name.

        Args:
            student: what it shows, with gradient.
            teacher: what it shows of the same text.
            share: of the run that is done, from 0 to 1.
        """
        named: Losses = {}
        for one in self._losses():
            if one.counts(share):
                value = one.weight * one(student, teacher)
            elif own := list(one.parameters()):
                # In the graph all the same, as several processes need it.
                value = torch.stack([weight.sum() * 0.0 for weight in own]).sum()
            else:
                continue
            name = _CAPITAL.sub("_", type(one).__name__).lower()
            named[name] = named[name] + value if name in named else value
        return named

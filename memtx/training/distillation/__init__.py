"""Distillation: a teacher, a student, and what the one is to have like the other."""

from memtx.training.distillation.distillation import Distillation
from memtx.training.distillation.layer_map import EveryKth, Explicit, Last, NoLayers
from memtx.training.distillation.losses import (
    AttentionMaps,
    Embeddings,
    HardLabels,
    HiddenCosine,
    HiddenMSE,
    SoftTargets,
    ValueRelations,
)
from memtx.training.distillation.own import OwnAttention

__all__ = [
    "AttentionMaps",
    "Distillation",
    "Embeddings",
    "EveryKth",
    "Explicit",
    "HardLabels",
    "HiddenCosine",
    "HiddenMSE",
    "Last",
    "NoLayers",
    "OwnAttention",
    "SoftTargets",
    "ValueRelations",
]

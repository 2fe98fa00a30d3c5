"""Distillation: a teacher, a student, and what the one is to have like the other."""

from memtx.training.distillation.distillation import Distillation
from memtx.training.distillation.layer_map import EveryKthLayer, ExplicitLayers, LastLayer, NoLayers
from memtx.training.distillation.losses import (
    AttentionMSE,
    EmbeddingMSE,
    HardLabels,
    HiddenCosine,
    HiddenMSE,
    SoftTargets,
    ValueRelations,
)
from memtx.training.distillation.self_distillation import SelfDistillation

__all__ = [
    "AttentionMSE",
    "Distillation",
    "EmbeddingMSE",
    "EveryKthLayer",
    "ExplicitLayers",
    "HardLabels",
    "HiddenCosine",
    "HiddenMSE",
    "LastLayer",
    "NoLayers",
    "SelfDistillation",
    "SoftTargets",
    "ValueRelations",
]

"""Distillation: a teacher, a student, and the losses between them."""

from memtx.training.distillation.distillation import Distillation, SelfDistillation
from memtx.training.distillation.layer_losses import AttentionMSE, HiddenCosine, HiddenMSE, ValueRelations
from memtx.training.distillation.layer_map import EvenlySpacedLayers, EveryKthLayer, ExplicitLayers, LastLayer, NoLayers
from memtx.training.distillation.losses import EmbeddingMSE, HardLabels, SoftTargets

__all__ = [
    "AttentionMSE",
    "Distillation",
    "EmbeddingMSE",
    "EvenlySpacedLayers",
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

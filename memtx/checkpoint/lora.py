"""Low-rank adapters among a model's weights (LoRA, Hu et al. 2021, section 4.1): W becomes W + (alpha / rank) B A.

A run trains A and B apart from W, made by :mod:`memtx.training.lora` and named as the package it uses names them. What
is kept for reading has them within W, so that reading needs neither of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

BASE_LAYER = ".base_layer."
LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class LoRAConfig:
    """How a model's weights are adapted.

    Attributes:
        rank: width between A, (rank, into), and B, (out, rank).
        alpha: B A counts alpha / rank.
        dropout: of what A is given, in training.
        target_modules: patterns of the maps' names within a layer.
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return them as numbers, texts and lists."""
        return {**asdict(self), "target_modules": list(self.target_modules)}


def is_lora_parameter(name: str) -> bool:
    """Return whether a parameter of this name is an A or a B."""
    return name.endswith((LORA_A, LORA_B))


def merge_lora(weights: Mapping[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """Return a model's weights by the names they have without adapters, B A added to those that are adapted.

    Args:
        weights: name -> tensor, those of adapted maps beside their A and B.
        rank: of the adapters.
        alpha: B A counts alpha / rank.
    """
    found = {}
    for name, tensor in weights.items():
        if is_lora_parameter(name):
            continue
        part, adapted, end = name.partition(BASE_LAYER)
        if adapted and end == "weight":
            # Rounded once: in half precision a small change of a large weight would be lost.
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            down, up = (weights[part + matrix].to(dtype) for matrix in (LORA_A, LORA_B))
            tensor = torch.addmm(tensor.to(dtype), up, down, alpha=alpha / rank).to(tensor.dtype)
        found[f"{part}.{end}" if adapted else name] = tensor
    return found

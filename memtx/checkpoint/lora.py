"""Low-rank adapters in a model's weights (LoRA, Hu et al. 2021, section 4.1): W becomes W + (alpha / rank) B A.

A run trains A and B, created by :mod:`memtx.training.lora` under the names that peft gives them; they are merged into W
for inference.
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
    """Settings of a model's adapters.

    Attributes:
        rank: Inner dimension of A ``(rank, in)`` and B ``(out, rank)``.
        alpha: Scale of B A, divided by the rank.
        dropout: Dropout rate of A's input in training.
        target_modules: Patterns of the names of the adapted linear layers.
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {**asdict(self), "target_modules": list(self.target_modules)}


def is_lora_parameter(name: str) -> bool:
    """Return whether a parameter of this name is an A or a B."""
    return name.endswith((LORA_A, LORA_B))


def merge_lora(weights: Mapping[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """Return the weights without adapters, under their original names, with (alpha / rank) B A added where adapted."""
    merged = {}
    for name, tensor in weights.items():
        if is_lora_parameter(name):
            continue
        layer, is_adapted, leaf = name.partition(BASE_LAYER)
        if is_adapted and leaf == "weight":
            # Rounded once: in half precision a small change of a large weight would be lost.
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            a, b = (weights[layer + matrix].to(dtype) for matrix in (LORA_A, LORA_B))
            tensor = torch.addmm(tensor.to(dtype), b, a, alpha=alpha / rank).to(tensor.dtype)
        merged[f"{layer}.{leaf}" if is_adapted else name] = tensor
    return merged

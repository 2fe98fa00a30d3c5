"""A state's tensors in fewer bits, for snapshots: entries in 8 bits with a scale each, matrices in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE_SUFFIX = ".scale"
"""Suffix of the scales' name, beside the name of the entries."""


def compress_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return floating-point tensors in fewer bits, by name; others are returned as they are.

    Entries, ``(batch, entries, dim)``, become int8 with a float32 scale each; matrices and all else become bfloat16.
    """
    compressed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            compressed[name] = tensor
        elif tensor.dim() != 3:
            compressed[name] = tensor.to(torch.bfloat16)
        else:
            scale = tensor.float().abs().amax(-1, keepdim=True) / 127
            quotient = tensor.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)
            compressed[name] = quotient.round().to(torch.int8)
            compressed[name + SCALE_SUFFIX] = scale
    return compressed


def decompress_tensors(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Return the tensors that :func:`compress_tensors` compressed, in their dtypes by name, where those are known."""
    restored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name + SCALE_SUFFIX)
        if scale is not None:
            restored[name] = (tensor.float() * scale).to(dtypes.get(name, torch.float32))
        elif not name.endswith(SCALE_SUFFIX) or name.removesuffix(SCALE_SUFFIX) not in tensors:
            restored[name] = tensor.to(dtypes.get(name, tensor.dtype))
    return restored

"""Operators that ONNX lacks, or that overflow there, as functions of simpler ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _running(combine: Callable[[Tensor, Tensor], Tensor], x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the running maximum or minimum by doubling, and zeros in place of the indices, which nothing reads."""
    dim, shift = dim % x.dim(), 1
    while shift < x.shape[dim]:
        first, rest = x.narrow(dim, 0, shift), x.narrow(dim, shift, x.shape[dim] - shift)
        x = torch.cat([first, combine(rest, x.narrow(dim, 0, x.shape[dim] - shift))], dim=dim)
        shift *= 2
    return x, torch.zeros_like(x, dtype=torch.int64)


def cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Compute the values of ``torch.cummax``."""
    return _running(torch.maximum, x, dim)


def cummin(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Compute the values of ``torch.cummin``."""
    return _running(torch.minimum, x, dim)


def logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    """Compute ``torch.logsumexp``, whose ONNX operator overflows in onnxruntime for values above 88."""
    largest = x.amax(dim, keepdim=True)
    largest = largest.masked_fill(largest.isinf(), 0.0)
    out = (x - largest).exp().sum(dim, keepdim=True).log() + largest
    return out if keepdim else out.squeeze(dim)


def logaddexp(x: Tensor, other: Tensor) -> Tensor:
    """Compute ``torch.logaddexp``, which would overflow as the logarithm of a sum of exponentials."""
    gap = torch.where(x == other, torch.zeros_like(x), (x - other).abs())  # two equal infinities have none
    return torch.maximum(x, other) + torch.log1p((-gap).exp())


def argsort(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    """Compute ``torch.argsort`` by a choice of all entries, in which ONNX, unlike torch, keeps the order of equals."""
    x = x if x.is_floating_point() else x.long()
    return torch.topk(x, x.shape[dim], dim, largest=descending, sorted=True).indices


def solve_unit_lower_triangular(
    system: Tensor, right_side: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """Compute ``torch.linalg.solve_triangular`` for a lower triangular system whose diagonal is taken as ones.

    The inverse of the diagonal blocks is doubled in size until there is one block, which is as stable as substitution:
    a power series of the system, which is shorter, overflows where keys repeat.
    """
    assert left, "only systems on the left"
    assert unitriangular, "only unit triangular systems"
    assert not upper, "only lower triangular systems"
    size = system.shape[-1]
    row = torch.arange(size)
    inverse = torch.eye(size, dtype=system.dtype).expand(system.shape)
    block = 1
    while block < size:
        pair, half = row // (2 * block), row // block % 2
        is_lower_left = (pair[:, None] == pair) & (half[:, None] > half)
        inverse = inverse - inverse @ system.masked_fill(~is_lower_left, 0.0) @ inverse
        block *= 2
    return inverse @ right_side


ONNX_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.cummax.default: cummax,
    torch.ops.aten.cummin.default: cummin,
    torch.ops.aten.logsumexp.default: logsumexp,
    torch.ops.aten.logaddexp.default: logaddexp,
    torch.ops.aten.argsort.stable: argsort,
    torch.ops.aten.linalg_solve_triangular.default: solve_unit_lower_triangular,
}
"""Functions by operator, for :meth:`torch.export.ExportedProgram.run_decompositions`."""

"""Torchmetrics for language modelling: bits per byte and PG-19's word-level perplexity.

Both count in float64 and divide once, at the end: a mean of per-batch means would weigh a short batch as
much as a long one, and a float32 sum stops growing after some ten million tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from memtx.errors import MemtxError


class _NllPerUnit(Metric):
    """Sum of negative log-likelihood over a sum of units of the raw text."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    unit = "units"

    nll: Tensor
    units: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("units", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def set_dtype(self, dst_type: str | torch.dtype) -> _NllPerUnit:
        """Keep the sums in float64 whatever precision the model runs in."""
        return self

    def _apply(self, fn: object, *arguments: object, **options: object) -> _NllPerUnit:
        # Module.half() and the like reach states through _apply; only the device may follow the model.
        nll, units = self.nll, self.units
        super()._apply(fn, *arguments, **options)  # type: ignore[arg-type]
        self.nll, self.units = nll.to(self.nll.device), units.to(self.units.device)
        return self

    def update(self, nll: Tensor | float, units: Tensor | int) -> None:
        """Add what a batch measured.

        Args:
            nll: negative log-likelihood in nats; a sum, or a tensor of any shape that is summed here.
            units: bytes (or words) of the raw text that these tokens stand for; likewise.

        Raises:
            MemtxError: a likelihood that is not finite, or negative units.
        """
        nll_sum = torch.as_tensor(nll, dtype=torch.float64, device=self.nll.device).detach().sum()
        unit_sum = torch.as_tensor(units, dtype=torch.float64, device=self.units.device).detach().sum()
        if not math.isfinite(nll_sum.item()):
            raise MemtxError(
                f"{type(self).__name__} got a negative log-likelihood of {nll_sum.item()}, expected a finite one.",
                "The loss diverged: lower the learning rate or clip the gradient.",
            )
        if not unit_sum.item() >= 0:
            raise MemtxError(
                f"{type(self).__name__} got {unit_sum.item():g} {self.unit}, expected a count of at least 0."
            )
        self.nll = self.nll + nll_sum
        self.units = self.units + unit_sum

    def _nats(self) -> Tensor:
        # 0 / 0 is NaN: a text without a word has no word perplexity, which is no reason to stop a run.
        return self.nll / self.units


class BitsPerByte(_NllPerUnit):
    """Total negative log-likelihood in bits, per byte of the raw text; comparable across tokenizers."""

    unit = "bytes"

    def compute(self) -> Tensor:
        """Return the bits per byte, () float64; NaN if no byte was counted."""
        return self._nats() / math.log(2)


class WordPerplexity(_NllPerUnit):
    """``exp(total nll / words of the raw text)``, PG-19's measure (Rae et al. 2019, section 4.1)."""

    unit = "words"

    def compute(self) -> Tensor:
        """Return the perplexity, () float64; inf where the exponential overflows, NaN or inf if no word was counted."""
        return self._nats().exp()

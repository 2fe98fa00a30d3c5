"""Reversible layers, whose inputs are recomputed from their outputs so that no activations are stored.

Reversible residual layers (Gomez et al. 2017, section 3.1; Reformer, Kitaev et al. 2020, section 3) have two streams,
y1 = x1 + f(x2) and y2 = x2 + g(y1). The backward pass recovers x2 = y2 - g(y1) and x1 = y1 - f(x2) and runs each part
once more with gradients. A layer stores only a seed if there is dropout, and the hash buckets of ``f``, which rounding
must not change on the way back: bytes, and no hidden state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn


class ReversibleLayer(Protocol):
    """A layer of two residual branches, each with its own norm."""

    training: bool

    def attend(
        self, x: Tensor, attention_mask: Tensor | None, cached_buckets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return f(x) and its hash buckets, which are ``cached_buckets`` if given."""

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return g(x)."""

    def has_dropout(self) -> bool:
        """Return True if dropout is active."""


@contextlib.contextmanager
def _fork_rng(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch's generators and restore them afterwards; None leaves them alone."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class _ReversibleFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        x2: Tensor,
        layers: Sequence[ReversibleLayer],
        attention_mask: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.layers, ctx.attention_mask = layers, attention_mask
        ctx.autocast = (torch.is_autocast_enabled(x1.device.type), torch.get_autocast_dtype(x1.device.type))
        ctx.buckets, ctx.seeds = [], []
        for layer in layers:
            seeds = torch.randint(1 << 62, (2,)).tolist() if layer.has_dropout() else (None, None)
            with _fork_rng(seeds[0], x2.device):
                attended, buckets = layer.attend(x2, attention_mask, None)
            x1 = x1 + attended
            with _fork_rng(seeds[1], x1.device):
                x2 = x2 + layer.feed_forward(x1)
            ctx.buckets.append(buckets)
            ctx.seeds.append(seeds)
        ctx.save_for_backward(x1, x2)
        return x1, x2

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad1: Tensor, grad2: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2 = ctx.saved_tensors
        enabled, dtype = ctx.autocast
        # Tensors that outlive a layer are allocated first: among short-lived ones they would fragment the heap, and the
        # process would grow with depth.
        totals = [[torch.zeros_like(weight) for weight in _trainable_parameters(layer)] for layer in ctx.layers]
        with torch.autocast(x1.device.type, dtype=dtype, enabled=enabled):
            for layer, buckets, seeds, total in zip(
                reversed(ctx.layers), reversed(ctx.buckets), reversed(ctx.seeds), reversed(totals), strict=True
            ):
                weights = _trainable_parameters(layer)
                with torch.enable_grad(), _fork_rng(seeds[1], x1.device):
                    x1 = x1.detach().requires_grad_()
                    fed = layer.feed_forward(x1)
                ff_grads = torch.autograd.grad(fed, [x1, *weights], grad2, allow_unused=True)
                x2 = x2 - fed.detach()
                del fed
                grad1 = grad1 + ff_grads[0]
                with torch.enable_grad(), _fork_rng(seeds[0], x2.device):
                    x2 = x2.detach().requires_grad_()
                    attended, _ = layer.attend(x2, ctx.attention_mask, buckets)
                attention_grads = torch.autograd.grad(attended, [x2, *weights], grad1, allow_unused=True)
                x1 = x1.detach() - attended.detach()
                del attended
                grad2 = grad2 + attention_grads[0]
                for weight_total, *grads in zip(total, ff_grads[1:], attention_grads[1:], strict=True):
                    for grad in grads:
                        if grad is not None:
                            weight_total.add_(grad)
                del ff_grads, attention_grads
        return grad1, grad2, None, None, *(weight_total for total in totals for weight_total in total)


def _trainable_parameters(layer: ReversibleLayer) -> list[Tensor]:
    return [parameter for parameter in cast(nn.Module, layer).parameters() if parameter.requires_grad]


def reversible_forward(
    x1: Tensor, x2: Tensor, layers: Sequence[ReversibleLayer], attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run all layers and return both streams, differentiable without stored activations.

    Attention reads x2 and adds to x1, both ``(batch, n, dim)``. The mask, ``(batch, n)`` bool, is False for padding and
    None if there is none.
    """
    weights = [weight for layer in layers for weight in _trainable_parameters(layer)]
    out1, out2 = _ReversibleFunction.apply(x1, x2, layers, attention_mask, *weights)  # type: ignore[no-untyped-call]
    return out1, out2

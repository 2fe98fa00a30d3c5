"""Layers whose inputs follow from their outputs, so that nothing of them is kept for the backward pass.

Reversible residual layers (Gomez et al. 2017, section 3.1; Reformer, Kitaev et al. 2020, section 3): of two streams,
y1 = x1 + f(x2) and y2 = x2 + g(y1). Going back, x2 = y2 - g(y1) and x1 = y1 - f(x2), and each part is run once more
with gradient. What is kept of a layer is a seed where something is dropped, and what ``f`` decided by rounding, which
must not be decided otherwise on the way back: bytes, and no hidden state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

Seeds = tuple[int, int] | None


class ReversibleLayer(Protocol):
    """A layer of two parts, each with its norm within."""

    training: bool

    def attend(
        self, x: Tensor, attention_mask: Tensor | None, cached_buckets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return f(x), and what it decided, or was told to have decided."""
        ...

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return g(x)."""
        ...

    def has_dropout(self) -> bool:
        """Return whether anything is dropped at random now."""
        ...


@contextlib.contextmanager
def _fork_rng(seed: int | None, device: torch.device) -> Iterator[None]:
    """Run with torch's generators at a seed and leave them as they were; None leaves them alone."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _sample_seeds(layer: ReversibleLayer) -> Seeds:
    if not layer.has_dropout():
        return None
    one, other = torch.randint(1 << 62, (2,)).tolist()
    return one, other


def _attend(
    layer: ReversibleLayer, x: Tensor, attention_mask: Tensor | None, cached_buckets: Tensor | None, seeds: Seeds
) -> tuple[Tensor, Tensor | None]:
    with _fork_rng(None if seeds is None else seeds[0], x.device):
        return layer.attend(x, attention_mask, cached_buckets)


def _feed_forward(layer: ReversibleLayer, x: Tensor, seeds: Seeds) -> Tensor:
    with _fork_rng(None if seeds is None else seeds[1], x.device):
        return layer.feed_forward(x)


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
        ctx.layers, ctx.present = layers, attention_mask
        ctx.cast = (torch.is_autocast_enabled(x1.device.type), torch.get_autocast_dtype(x1.device.type))
        ctx.decided, ctx.seeds = [], []
        for layer in layers:
            seeds = _sample_seeds(layer)
            made, decided = _attend(layer, x2, attention_mask, None, seeds)
            x1 = x1 + made
            x2 = x2 + _feed_forward(layer, x1, seeds)
            ctx.decided.append(decided)
            ctx.seeds.append(seeds)
        ctx.save_for_backward(x1, x2)
        return x1, x2

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad1: Tensor, grad2: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2 = ctx.saved_tensors
        enabled, dtype = ctx.cast
        # All that outlives a layer is made before the first: between short-lived blocks it would scatter the heap, and
        # the process would grow with depth though what is alive does not.
        totals = [[torch.zeros_like(p) for p in _trainable_parameters(layer)] for layer in ctx.layers]
        with torch.autocast(x1.device.type, dtype=dtype, enabled=enabled):
            for layer, decided, seeds, total in zip(
                reversed(ctx.layers), reversed(ctx.decided), reversed(ctx.seeds), reversed(totals), strict=True
            ):
                weights = _trainable_parameters(layer)
                with torch.enable_grad():
                    x1 = x1.detach().requires_grad_()
                    fed = _feed_forward(layer, x1, seeds)
                grads = torch.autograd.grad(fed, [x1, *weights], grad2, allow_unused=True)
                x2 = x2 - fed.detach()
                del fed
                grad1 = grad1 + grads[0]
                with torch.enable_grad():
                    x2 = x2.detach().requires_grad_()
                    attended, _ = _attend(layer, x2, ctx.present, decided, seeds)
                others = torch.autograd.grad(attended, [x2, *weights], grad1, allow_unused=True)
                x1 = x1.detach() - attended.detach()
                del attended
                grad2 = grad2 + others[0]
                for own, one, other in zip(total, grads[1:], others[1:], strict=True):
                    for grad in (one, other):
                        if grad is not None:
                            own.add_(grad)
                del grads, others
        return grad1, grad2, None, None, *(own for total in totals for own in total)


def _trainable_parameters(layer: ReversibleLayer) -> list[Tensor]:
    return [p for p in cast(nn.Module, layer).parameters() if p.requires_grad]


def reversible_forward(
    x1: Tensor, x2: Tensor, layers: Sequence[ReversibleLayer], attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return both streams after all layers, with gradient and without what lies between.

    Args:
        x1: (rows, n, dim), the stream that attention adds to.
        x2: (rows, n, dim), the stream that it reads.
        layers: in order.
        attention_mask: (rows, n) bool, False for padding; None for none.
    """
    weights = [p for layer in layers for p in _trainable_parameters(layer)]
    out1, out2 = _ReversibleFunction.apply(x1, x2, layers, attention_mask, *weights)  # type: ignore[no-untyped-call]
    return out1, out2

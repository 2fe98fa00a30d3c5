"""Heads that predict vectors: by regression, or as a mixture of Gaussians."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least, check_positive
from memtx.ops.cpu.linear import Linear

RegressionLoss = Literal["squared", "absolute", "huber"]


class VectorHead(nn.Module, ABC):
    """Maps hidden states to predictions of vectors.

    A head of your own is any module that is created from (dim, output_dim); it needs :meth:`nll` to be trained on
    labels, and :meth:`mean` if its output is not the predicted vector itself.

    Args:
        dim: Width of the hidden states.
        output_dim: Width of the predicted vectors.
        num_parameters: Numbers that describe a prediction.
    """

    def __init__(self, dim: int, output_dim: int, num_parameters: int) -> None:
        super().__init__()
        check_at_least(1, dim=dim, output_dim=output_dim)
        self.output_dim = output_dim
        self.out = Linear(dim, num_parameters)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the parameters of the predictions ``(..., num_parameters)`` for x ``(..., dim)``."""
        return self.out(x)

    @abstractmethod
    def nll(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each prediction ``(...)`` for labels ``(..., output_dim)``.

        Components that are NaN are not scored; the loss of a label without others is 0.
        """

    @abstractmethod
    def mean(self, prediction: Tensor) -> Tensor:
        """Return the expected vectors, ``(..., output_dim)``."""

    def std(self, prediction: Tensor) -> Tensor | None:
        """Return the standard deviations, ``(..., output_dim)``; None for a head without them."""
        return None


class RegressionHead(VectorHead):
    """Predicts a vector; its loss is the mean over the components that are scored.

    Args:
        dim: Width of the hidden states.
        output_dim: Width of the predicted vectors.
        loss: "squared", "absolute", or "huber": squared up to an error of 1, then absolute.
    """

    def __init__(self, dim: int, output_dim: int, loss: RegressionLoss = "squared") -> None:
        super().__init__(dim, output_dim, output_dim)
        functions: dict[str, Callable[..., Tensor]] = {
            "squared": F.mse_loss,
            "absolute": F.l1_loss,
            "huber": F.huber_loss,
        }
        if loss not in functions:
            raise MemtxError(f"loss is {loss!r}.", f"Give one of: {', '.join(functions)}.")
        self._loss = functions[loss]

    def nll(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each prediction."""
        is_scored = ~labels.isnan()
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        # Not labels with NaN: their gradient would be NaN, even multiplied by zero.
        error = self._loss(prediction, torch.where(is_scored, labels, 0.0).to(prediction.dtype), reduction="none")
        return (error * is_scored).sum(-1) / is_scored.sum(-1).clamp(min=1)

    def mean(self, prediction: Tensor) -> Tensor:
        """Return the prediction itself."""
        return prediction


class GaussianMixtureHead(VectorHead):
    """Predicts a density of vectors: a mixture of Gaussians with diagonal covariances (Bishop 1994).

    The loss is the negative log-likelihood in nats. Components that are NaN are integrated out.

    Args:
        dim: Width of the hidden states.
        output_dim: Width of the predicted vectors.
        num_components: Gaussians of the mixture.
        min_scale: Smallest standard deviation, in the units of the labels, so that the likelihood is bounded.
    """

    def __init__(self, dim: int, output_dim: int, num_components: int = 3, min_scale: float = 1e-3) -> None:
        check_at_least(1, num_components=num_components)
        check_positive(min_scale=min_scale)
        super().__init__(dim, output_dim, num_components * (1 + 2 * output_dim))
        self.num_components, self.min_scale = num_components, min_scale
        if num_components > 1:
            # Apart from each other, since equal components would get equal gradients.
            means = torch.linspace(-1.0, 1.0, num_components).repeat_interleave(output_dim)
            with torch.no_grad():
                self.out.bias[num_components : num_components * (1 + output_dim)] = means

    def distribution(self, prediction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-weights ``(..., components)``, means and scales ``(..., components, output_dim)``."""
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        size = self.num_components * self.output_dim
        logits, means, scales = prediction.split([self.num_components, size, size], dim=-1)  # type: ignore[no-untyped-call]
        shape = (self.num_components, self.output_dim)
        scales = F.softplus(scales.unflatten(-1, shape)) + self.min_scale
        return F.log_softmax(logits, dim=-1), means.unflatten(-1, shape), scales

    def nll(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood of each label in nats."""
        log_weights, means, scales = self.distribution(prediction)
        is_scored = ~labels.isnan()[..., None, :]
        values = torch.where(is_scored, labels[..., None, :], 0.0).to(means.dtype)
        log_density = -0.5 * (((values - means) / scales) ** 2 + math.log(2 * math.pi)) - scales.log()
        return -torch.logsumexp(log_weights + (log_density * is_scored).sum(-1), dim=-1)

    def mean(self, prediction: Tensor) -> Tensor:
        """Return the mean of the mixture."""
        log_weights, means, _ = self.distribution(prediction)
        return (log_weights.exp()[..., None] * means).sum(-2)

    def std(self, prediction: Tensor) -> Tensor:
        """Return the standard deviation of the mixture."""
        log_weights, means, scales = self.distribution(prediction)
        weights = log_weights.exp()[..., None]
        center = (weights * means).sum(-2, keepdim=True)
        return (weights * (scales**2 + (means - center) ** 2)).sum(-2).sqrt()

    def sample(self, prediction: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return one random vector per prediction, ``(..., output_dim)``."""
        log_weights, means, scales = self.distribution(prediction)
        weights = log_weights.exp().flatten(0, -2)
        index = torch.multinomial(weights, 1, generator=generator).view(*log_weights.shape[:-1], 1, 1)
        index = index.expand(*index.shape[:-1], self.output_dim)
        mean, scale = means.gather(-2, index)[..., 0, :], scales.gather(-2, index)[..., 0, :]
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + scale * noise

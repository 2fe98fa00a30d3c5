"""Heads of vectors: likelihoods equal torch.distributions in float64, are stable, and skip what is not scored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from memtx import GaussianMixtureHead, RegressionHead
from memtx.errors import MemtxError


def reference(head: GaussianMixtureHead, prediction: Tensor) -> MixtureSameFamily:
    log_weights, means, scales = head.distribution(prediction)
    return MixtureSameFamily(Categorical(logits=log_weights), Independent(Normal(means, scales), 1))


@pytest.mark.parametrize("components", [1, 4])
@pytest.mark.parametrize("output_dim", [1, 3])
def test_mixture_equals_torch_distributions(components: int, output_dim: int) -> None:
    torch.manual_seed(components)
    head = GaussianMixtureHead(8, output_dim, components).double()
    prediction = head(10 * torch.randn(2, 5, 8, dtype=torch.float64)).requires_grad_()
    labels = 3 * torch.randn(2, 5, output_dim, dtype=torch.float64)
    expected = reference(head, prediction)
    nll = head.nll(prediction, labels)
    assert torch.allclose(nll, -expected.log_prob(labels), rtol=0, atol=1e-12)
    assert torch.allclose(head.mean(prediction), expected.mean, rtol=0, atol=1e-12)
    assert torch.allclose(head.std(prediction), expected.stddev, rtol=0, atol=1e-12)
    gradient = torch.autograd.grad(nll.sum(), prediction, retain_graph=True)[0]
    expected_gradient = torch.autograd.grad(-expected.log_prob(labels).sum(), prediction)[0]
    assert torch.allclose(gradient, expected_gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e4])
def test_mixture_is_finite_far_from_its_labels(dtype: torch.dtype, size: float) -> None:
    head = GaussianMixtureHead(4, 2, 3)
    prediction = (size * torch.randn(6, head.out.out_features)).to(dtype).requires_grad_()
    nll = head.nll(prediction, torch.tensor([[1e4, -1e4]]).expand(6, 2))
    nll.sum().backward()
    assert nll.dtype == torch.float32
    assert nll.isfinite().all()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


def test_missing_components_are_integrated_out() -> None:
    head = GaussianMixtureHead(4, 2, 3).double()
    prediction = torch.randn(5, head.out.out_features, dtype=torch.float64, requires_grad=True)
    labels = torch.randn(5, 2, dtype=torch.float64)
    labels[0, 1] = labels[1] = torch.nan
    nll = head.nll(prediction, labels)
    log_weights, means, scales = head.distribution(prediction[0])
    marginal = MixtureSameFamily(Categorical(logits=log_weights), Normal(means[:, 0], scales[:, 0]))
    assert torch.allclose(nll[0], -marginal.log_prob(labels[0, 0]), rtol=0, atol=1e-12)
    assert abs(float(nll[1].detach())) < 1e-12
    nll.sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


def test_samples_have_the_moments_of_the_mixture() -> None:
    torch.manual_seed(0)
    head = GaussianMixtureHead(4, 2, 3)
    prediction = torch.randn(1, head.out.out_features).expand(20000, -1)
    samples = head.sample(prediction, torch.Generator().manual_seed(1))
    assert torch.allclose(
        samples.mean(0), head.mean(prediction)[0], atol=0.06
    )  # four standard errors of 20,000 samples
    assert torch.allclose(samples.std(0), head.std(prediction)[0], rtol=0.06)  # the same


@pytest.mark.parametrize(("loss", "expected"), [("squared", 5.0), ("absolute", 2.0), ("huber", 1.5)])
def test_regression_scores_what_is_known(loss: Any, expected: float) -> None:
    head = RegressionHead(4, 3, loss)
    prediction = torch.zeros(2, 3, requires_grad=True)
    labels = torch.tensor([[1.0, 3.0, torch.nan], [torch.nan] * 3])
    nll = head.nll(prediction, labels)
    assert nll.tolist() == [expected, 0.0]
    nll.sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    assert head.std(prediction) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixtureHead(4, 1, 0), "num_components is 0"),
        (lambda: GaussianMixtureHead(4, 1, min_scale=0.0), "min_scale is 0.0"),
        (lambda: RegressionHead(4, 0), "output_dim is 0"),
        (lambda: RegressionHead(4, 1, "cubic"), "loss is 'cubic'. Give one of: squared"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_option_is_named(make: Any, message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        make()

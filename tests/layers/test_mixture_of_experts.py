"""A mixture of experts: each token's few experts, whichever way their weights are read."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.layers.mixture_of_experts import MixtureOfExperts

EXACT = 1e-12  # float64, sums in another order


@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_weighted_sum_of_the_most_probable_experts(normalize: bool) -> None:
    layer = MixtureOfExperts(6, 5, 8, 3, shared_hidden_dim=4, normalize_weights=normalize).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    out = layer(x)
    assert layer.shared is not None
    assert layer.shared_gate is not None
    for token, actual in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
        probabilities = torch.softmax(layer.router.weight @ token, dim=0)
        chosen = probabilities.argsort(descending=True)[:3].tolist()
        total = probabilities[chosen].sum() if normalize else 1.0
        expected = torch.sigmoid(layer.shared_gate(token)) * layer.shared(token)
        for expert in chosen:
            gate, up = (layer.gate_up[expert] @ token).chunk(2)
            expected = expected + probabilities[expert] / total * (layer.out[expert] @ (F.silu(gate) * up))
        assert (actual - expected).abs().max() < EXACT
    # Two tokens gather their experts' weights, all eighteen are grouped by expert.
    assert (layer(x[0, :2]) - out[0, :2]).abs().max() < EXACT


def test_gradients_reach_the_router_and_the_chosen_experts() -> None:
    layer = MixtureOfExperts(4, 3, 4, 2).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_more_chosen_experts_than_there_are_raise() -> None:
    with pytest.raises(MemtxError, match="top_k is 3 for 2 experts"):
        MixtureOfExperts(4, 3, 2, 3)

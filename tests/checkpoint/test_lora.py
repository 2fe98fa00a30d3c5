"""Merged adapters: names without adapters, and W + (alpha / rank) B A."""

from __future__ import annotations

import torch

from memtx.checkpoint.lora import merge_lora


def test_adapters_are_merged_and_other_weights_unchanged() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up, weight, bias = (torch.randn(size, generator=generator) for size in ((2, 5), (4, 2), (4, 5), (4,)))
    weights = {
        "norm.weight": torch.ones(5),
        "map.base_layer.weight": weight,
        "map.base_layer.bias": bias,
        "map.lora_A.default.weight": down,
        "map.lora_B.default.weight": up,
    }
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    merged = merge_lora(weights, rank=2, alpha=3.0)
    assert list(merged) == ["norm.weight", "map.weight", "map.bias"]
    assert merged["norm.weight"] is weights["norm.weight"]
    assert merged["map.bias"] is bias
    torch.testing.assert_close(merged["map.weight"], weight + 1.5 * up @ down)
    assert all(torch.equal(weights[name], tensor) for name, tensor in copies.items())


def test_half_precision_merge_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator).bfloat16()
    down, up = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
    weights = {"a.base_layer.weight": weight, "a.lora_A.default.weight": down, "a.lora_B.default.weight": up}
    merged = merge_lora(weights, rank=4, alpha=4.0)["a.weight"]
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, (weight.float() + up @ down).bfloat16(), rtol=0, atol=0)

"""Adaptive inputs and the adaptive softmax in the memory transformer, tied as published."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from memtx import CopyMemory, MemoryTransformer
from memtx.checkpoint.load import from_pretrained
from memtx.errors import MemtxError
from memtx.inference.decoder import Decoder
from memtx.layers.lm_head import AdaptiveInputs, AdaptiveSoftmax
from memtx.training import cost


def build(**options: object) -> MemoryTransformer:
    torch.manual_seed(0)
    adaptive = partial(AdaptiveInputs, cutoffs=[10, 20], div_value=2)
    return MemoryTransformer(30, dim=8, depth=1, heads=2, adaptive_embedding=adaptive, **options)  # type: ignore[arg-type]


def test_embeddings_and_softmax_are_those_of_the_paper() -> None:
    """Baevski and Auli 2019, section 3: a token of cluster i has an embedding of dim / 2^i, projected to dim."""
    model = build().double()
    tables, projections, head = model.embedding.tables, model.embedding.projections, model.head  # type: ignore[union-attr]
    tokens = torch.arange(30)[None]
    for token in range(30):
        cluster, index = divmod(token, 10)
        assert tables[cluster].weight.shape[1] == 8 // 2**cluster
        expected = projections[cluster] @ tables[cluster].weight[index] * 8**0.5
        assert (model.embedding(tokens)[0, token] - expected).abs().max() < 1e-12
    assert isinstance(head, AdaptiveSoftmax)
    assert all(table is embedding.weight for table, embedding in zip(head.tables, tables, strict=True))
    assert [head.projections[i] is projections[i] for i in range(3)] == [False, True, True]
    log_probs = model(tokens).logits
    assert (log_probs.exp().sum(-1) - 1).abs().max() < 1e-12
    labels = tokens.flip(1)
    assert abs(model(tokens, labels=labels).loss - F.nll_loss(log_probs[0], labels[0])) < 1e-12


def test_a_model_decodes_and_is_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = build(tie_embeddings=False).eval()
    tokens = torch.randint(0, 30, (1, 12))
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    state = model(tokens[:, :-1]).state
    assert (Decoder(model, state).step(tokens[:, -1]) - model(tokens[:, -1:], state).logits[:, 0]).abs().max() < 1e-5
    assert cost.count_flops(model, 16).forward > 0


def test_an_output_memory_is_refused() -> None:
    with pytest.raises(MemtxError, match="CopyMemory mixes logits"):
        build(output_memory=partial(CopyMemory, num_entries=4))

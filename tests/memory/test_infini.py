"""Infini-attention against the paper's equations, segment by segment."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.layers.attention import MemoryAttention
from memtx.layers.positions.base import NoPositions
from memtx.memory.infini import InfiniMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.segment import Segment
from memtx.training.optimizers import find_gates

DIM, HEADS = 8, 2
WIDTH = DIM // HEADS


@pytest.mark.parametrize("delta_rule", [False, True])
@given(seed=st.integers(0, 999), segment_length=st.integers(1, 7), num_segments=st.integers(1, 5))
@settings(deadline=None, max_examples=25)
def test_the_layer_matches_the_equations(delta_rule: bool, seed: int, segment_length: int, num_segments: int) -> None:
    """With a window that covers the document, the difference is in the memory alone."""
    torch.manual_seed(seed)
    memory = InfiniMemory(DIM, HEADS, segment_length, delta_rule, gate_init=0.5)
    window, n = 40, segment_length * num_segments
    layer = MemoryAttention(
        DIM, HEADS, HEADS, RecurrentMemory(DIM, window), NoPositions(HEADS, WIDTH), extra_memories=[memory]
    ).double()
    x = torch.randn(1, n, DIM, dtype=torch.float64)
    with torch.no_grad():
        layer.query.weight.mul_(2.0)
        segment = Segment.from_document_starts(torch.zeros(1, dtype=torch.int64), n)
        out, _, _ = layer(x, tuple(part.init_state(1, like=x) for part in layer.memories), segment)
        heads = []
        for head in range(HEADS):
            part = slice(head * WIDTH, (head + 1) * WIDTH)
            k, v = (projected[:, part] for projected in layer.key_value(x[0]).chunk(2, dim=-1))
            q = layer.query(x[0])[:, part]
            sigma_q, sigma_k = F.elu(q) + 1, F.elu(k) + 1
            scores = (q @ k.T * WIDTH**-0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            a_dot = torch.softmax(scores, -1) @ v
            m, z = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
            g, mixed = torch.sigmoid(memory.mix_gate[head]), []
            for start in range(0, n, segment_length):
                s = slice(start, start + segment_length)
                if start:
                    a_mem = sigma_q[s] @ m / (sigma_q[s] @ z)[:, None]
                    mixed.append(g * a_mem + (1 - g) * a_dot[s])
                else:
                    mixed.append(a_dot[s])
                retrieved = sigma_k[s] @ m / (sigma_k[s] @ z)[:, None] if delta_rule and start else 0.0
                m, z = m + sigma_k[s].T @ (v[s] - retrieved), z + sigma_k[s].sum(0)
            heads.append(torch.cat(mixed))
        expected = layer.out(torch.cat(heads, dim=-1))
    # Sums of a few dozen float64 terms in another order.
    torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-10)


def test_the_share_learns_at_a_rate_of_its_own() -> None:
    torch.manual_seed(0)
    stack = [partial(RecurrentMemory, window=4), partial(InfiniMemory, heads=2, interval=4, delta_rule=True)]
    model = MemoryTransformer(11, 8, 1, 2, memories=[stack])
    tokens = torch.randint(11, (2, 20))
    model(tokens, labels=tokens).loss.backward()
    share = model.blocks[0].attention.extra_memories[0].mix_gate
    assert find_gates(model) == {share}
    assert share.grad.abs().min() > 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_rejects_a_layer_with_other_heads() -> None:
    model = MemoryTransformer(11, 8, 1, 2, memories=[[partial(RecurrentMemory, window=4), InfiniMemory]])
    with pytest.raises(MemtxError, match="heads is 4 for a layer with 2 heads of 4"):
        model(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"), [({"heads": 3}, r"heads \(3\)"), ({"interval": 0}, "interval is 0")]
)  # fmt: skip
def test_rejects_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        InfiniMemory(DIM, **options)

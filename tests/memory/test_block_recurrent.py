"""The recurrent layer against the paper's equations, block by block, and its options."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtx.errors import MemtxError
from memtx.layers.attention import MemoryAttention
from memtx.layers.positions.base import NoPositions
from memtx.memory.block_recurrent import BlockRecurrentMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.segment import Segment

# Sums of a few dozen float64 terms in another order, through several updates.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)

DIM, HEADS, VECTORS = 8, 2, 3
WIDTH = DIM // HEADS


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from q ``(queries, DIM)`` to all keys, one head at a time."""
    heads = []
    for head in range(HEADS):
        part = slice(head * WIDTH, (head + 1) * WIDTH)
        heads.append(torch.softmax(q[:, part] @ k[:, part].T * WIDTH**-0.5, -1) @ v[:, part])
    return torch.cat(heads, dim=-1)


def read_block(memory: BlockRecurrentMemory, layer: Any, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a block's tokens ``(tokens, DIM)`` read from the state, and the next state (figure 1)."""
    normalized = memory.norm(state) + memory.vector_positions
    k_s, v_s = memory.vector_key(normalized), memory.vector_value(normalized)
    k_e, v_e = layer.key_value(x).chunk(2, dim=-1)
    read = attend(memory.token_query(x), k_s, v_s) @ memory.out.weight.T
    to_state, to_block = (
        attend(memory.self_query(normalized), k_s, v_s),
        attend(memory.cross_query(normalized), k_e, v_e),
    )
    h = torch.cat([to_state, to_block], dim=-1)
    z = h @ memory.update.weight.T + memory.update.bias
    if memory.gate == "fixed":
        g = 1 / (1 + torch.exp(-memory.fixed_gate))
        return read, state * g + z * (1 - g)
    i, f = (h @ memory.input_forget_gates.weight.T + memory.input_forget_gates.bias).split(DIM, dim=-1)
    return read, state * torch.sigmoid(f + 1) + torch.tanh(z) * torch.sigmoid(i - 1)


@pytest.mark.parametrize("gate", ["fixed", "lstm"])
@given(seed=st.integers(0, 999), interval=st.integers(1, 7), n=st.integers(1, 30), start=st.integers(1, 29))
@settings(deadline=None, max_examples=25)
def test_matches_the_equations(gate: Any, seed: int, interval: int, n: int, start: int) -> None:
    torch.manual_seed(seed)
    memory = BlockRecurrentMemory(DIM, VECTORS, interval, HEADS, gate)
    layer = MemoryAttention(
        DIM, HEADS, HEADS, RecurrentMemory(DIM, 4), NoPositions(HEADS, WIDTH), extra_memories=[memory]
    )
    x = torch.randn(1, n, DIM, dtype=torch.float64)
    segment = Segment.from_document_starts(torch.zeros(1, dtype=torch.int64), n, torch.arange(n)[None] == start)
    with torch.no_grad():
        for parameter in layer.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        view = memory.read(memory.init_state(1, like=x), x, segment, layer)
        expected = []
        for document in (x[0, :start], x[0, start:]):
            state = memory.initial
            for block in document.split(interval) if len(document) else ():
                read, next_state = read_block(memory, layer, state, block)
                expected.append(read)
                # The state of the last block, whose update waits for the next one.
                last, state = state, next_state
    close(view.context[0], torch.cat(expected))
    close(view.next_state.vectors[0], last)


def test_every_parameter_learns_in_one_recurrent_layer() -> None:
    window = partial(RecurrentMemory, window=4)
    for gate in ("fixed", "lstm"):
        torch.manual_seed(0)
        recurrent = partial(BlockRecurrentMemory, num_vectors=3, interval=4, heads=2, gate=gate)
        model = MemoryTransformer(11, 8, 2, 2, memories=[[window], [window, recurrent]])
        tokens = torch.randint(11, (2, 20))
        model(tokens, labels=tokens, document_starts=torch.rand(2, 20) < 0.1).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_vectors": 0}, "num_vectors is 0"), ({"interval": 0}, "interval is 0"), ({"gate": "gru"}, "gate is 'gru'")],
)
def test_rejects_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        BlockRecurrentMemory(DIM, **options)


def test_rejects_a_layer_with_other_heads() -> None:
    memory = partial(BlockRecurrentMemory, heads=4)
    model = MemoryTransformer(11, 8, 1, 2, memories=[[partial(RecurrentMemory, window=4), memory]])
    with pytest.raises(MemtxError, match="heads is 4 for a layer with 2 heads of 4"):
        model(torch.zeros(1, 3, dtype=torch.int64))

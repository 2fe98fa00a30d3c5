"""The store against its equations, and the keys that a query can reach."""

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
from memtx.memory import retrieval
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.retrieval import RetrievalMemory
from memtx.segment import Segment

# Sums of a few float64 terms in another order.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)

DIM, HEADS = 8, 2
HEAD_DIM = DIM // HEADS


def build_memory(seed: int = 0, **options: Any) -> RetrievalMemory:
    torch.manual_seed(seed)
    memory = RetrievalMemory(
        DIM, **({"capacity": 6, "top_k": 2, "exclude_recent": 3, "heads": HEADS} | options)
    ).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


def run(
    memory: RetrievalMemory, x: Tensor, document_starts: Tensor | None = None, past_length: int = 0, state: Any = None
) -> Any:
    """Return the reads and their gates, both ``(batch, length, DIM)``, and the next state."""
    state = state if state is not None else memory.init_state(x.shape[0], like=x)
    segment = Segment.from_document_starts(torch.full((x.shape[0],), past_length), x.shape[1], document_starts)
    view = memory.read(state, x, segment, None)  # type: ignore[arg-type]
    readout = memory.readout(view, x.new_zeros(*x.shape[:2], HEADS, HEAD_DIM))
    out, gate = (part.transpose(1, 2).flatten(2) for part in (readout.out, readout.gate))
    return out, gate, memory.write(view, segment, None)[0]  # type: ignore[arg-type]


def shift_tokens(memory: RetrievalMemory, x: Tensor) -> Tensor:
    """Mix each token of a document with the previous one."""
    if memory.token_shift is None:
        return x
    previous = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    return (1 - memory.token_shift.mix_ratio) * x + memory.token_shift.mix_ratio * previous


def read_naively(memory: RetrievalMemory, x: Tensor) -> Tensor:
    """Read one document ``(tokens, DIM)``, one query and head at a time; zeros where nothing is visible."""
    outputs = torch.zeros_like(x)
    parts = ((memory.query, x), (memory.key, shift_tokens(memory, x)), (memory.value, x))
    q, k, v = (proj(inputs).view(-1, HEADS, HEAD_DIM) for proj, inputs in parts)
    for query in range(len(x)):
        visible = range(max(0, query - memory.exclude_recent - memory.capacity + 1), query - memory.exclude_recent + 1)
        for head in range(HEADS):
            scores = {j: torch.cosine_similarity(q[query, head], k[j, head], dim=0) for j in visible}
            best = sorted(scores, key=lambda j: -float(scores[j]))[: memory.top_k]
            if best:
                weights = torch.softmax(torch.stack([scores[j] for j in best]) * memory.log_scale[head].exp(), 0)
                outputs[query, head * HEAD_DIM : (head + 1) * HEAD_DIM] = weights @ torch.stack(
                    [v[j, head] for j in best]
                )
    return outputs


@given(
    seed=st.integers(0, 999),
    capacity=st.integers(1, 9),
    top_k=st.integers(1, 5),
    exclude_recent=st.integers(1, 6),
    n=st.integers(1, 30),
    start=st.integers(1, 29),
    step=st.sampled_from([1, 40, retrieval.MAX_SCORES]),
    token_shift=st.booleans(),
)
def test_matches_the_equations(
    seed: int, capacity: int, top_k: int, exclude_recent: int, n: int, start: int, step: int, token_shift: bool
) -> None:
    """The result does not depend on the number of queries scored at a time."""
    memory = build_memory(seed, capacity=capacity, top_k=top_k, exclude_recent=exclude_recent, token_shift=token_shift)
    x = torch.randn(1, n, DIM, dtype=torch.float64)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "MAX_SCORES", step)
        out, gate, _ = run(memory, x, torch.arange(n)[None] == start)
        for low, high in ((0, min(start, n)), (start, n)):
            if low < high:
                close(out[0, low:high], read_naively(memory, x[0, low:high]))
    share = torch.sigmoid(memory.mix_gate).repeat_interleave(HEAD_DIM)
    position = torch.tensor([offset if offset < start else offset - start for offset in range(n)])
    close(gate[0], share * (position >= exclude_recent)[:, None])


def test_untrained_neighbors_have_a_small_share() -> None:
    assert torch.sigmoid(RetrievalMemory(DIM, heads=HEADS).mix_gate).max() < 0.05


def test_finds_an_equal_key_among_thousands() -> None:
    memory = build_memory(capacity=4000, top_k=1, exclude_recent=1, token_shift=False)
    with torch.no_grad():
        memory.query.weight.copy_(memory.key.weight)
    x = torch.randn(1, 4000, DIM, dtype=torch.float64)
    x[0, -1] = x[0, 17]
    with torch.no_grad():
        out, _, _ = run(memory, x)
        close(out[0, -1], memory.value(x[0, 17]))


def test_gradients_reach_retrieved_tokens_only() -> None:
    memory = build_memory(top_k=1, exclude_recent=1, capacity=20)
    x = torch.randn(1, 12, DIM, dtype=torch.float64, requires_grad=True)
    out, _, _ = run(memory, x)
    (grad,) = torch.autograd.grad(out[0, -1].sum(), x)
    with_gradient = set(grad[0].abs().sum(-1).nonzero().flatten().tolist())
    # Each head retrieved one key, which learns through its value; a softmax over one score has no gradient.
    assert 1 <= len(with_gradient) <= HEADS
    memory = build_memory(top_k=2, exclude_recent=1, capacity=20)
    out, _, _ = run(memory, x)
    (grad,) = torch.autograd.grad(out[0, -1].sum(), x)
    assert 11 in set(grad[0].abs().sum(-1).nonzero().flatten().tolist()), "the query must learn"


@given(seed=st.integers(0, 999), top_k=st.integers(1, 5), n=st.integers(1, 20), exclude_recent=st.integers(1, 6))
@settings(deadline=None, max_examples=25)
def test_the_layer_with_its_own_keys_matches_the_equations(seed: int, top_k: int, n: int, exclude_recent: int) -> None:
    """Memorizing Transformers, section 3.1: local attention and the nearest keys, mixed by a gate per head."""
    torch.manual_seed(seed)
    memory = RetrievalMemory(DIM, 6, top_k, exclude_recent, HEADS, layer_projections=True)
    torch.nn.init.normal_(memory.mix_gate)
    window = RecurrentMemory(DIM, exclude_recent)
    layer = MemoryAttention(DIM, HEADS, HEADS, window, NoPositions(HEADS, HEAD_DIM), extra_memories=[memory]).double()
    x, expected = torch.randn(1, n, DIM, dtype=torch.float64), []
    state = tuple(part.init_state(1, like=x) for part in layer.memories)
    with torch.no_grad():
        out, _, _ = layer(x, state, Segment.from_document_starts(torch.zeros(1, dtype=torch.int64), n))
        k, v = (part.view(n, HEADS, HEAD_DIM) for part in layer.key_value(x[0]).chunk(2, dim=-1))
        q = layer.query(x[0]).view(n, HEADS, HEAD_DIM)
        for i in range(n):
            heads, first = [], max(0, i - exclude_recent + 1)
            for h in range(HEADS):
                local = torch.softmax(k[first : i + 1, h] @ q[i, h] * HEAD_DIM**-0.5, 0) @ v[first : i + 1, h]
                stored = range(max(0, first - 6), first)
                scores = {j: torch.cosine_similarity(q[i, h], k[j, h], dim=0) for j in stored}
                nearest = sorted(scores, key=lambda j: -float(scores[j]))[:top_k]
                if nearest:
                    weights = torch.softmax(torch.stack([scores[j] for j in nearest]) * memory.log_scale[h].exp(), 0)
                    g = torch.sigmoid(memory.mix_gate[h])
                    local = g * (weights @ torch.stack([v[j, h] for j in nearest])) + (1 - g) * local
                heads.append(local)
            expected.append(layer.out(torch.cat(heads)))
    close(out[0], torch.stack(expected))


def test_no_gradient_reaches_what_the_layer_has_stored() -> None:
    memory = RetrievalMemory(DIM, 20, 2, exclude_recent=1, heads=HEADS, layer_projections=True)
    layer = MemoryAttention(
        DIM, HEADS, HEADS, RecurrentMemory(DIM, 1), NoPositions(HEADS, HEAD_DIM), extra_memories=[memory]
    )
    x = torch.randn(1, 12, DIM, requires_grad=True)
    state = tuple(part.init_state(1, like=x) for part in layer.memories)
    out, _, _ = layer(x, state, Segment.from_document_starts(torch.zeros(1, dtype=torch.int64), 12))
    (grad,) = torch.autograd.grad(out[0, -1].sum(), x)
    assert set(grad[0].abs().sum(-1).nonzero().flatten().tolist()) == {11}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_shift": True, "layer_projections": True, "heads": HEADS}, "token_shift is True with"),
        ({"capacity": 0}, "capacity is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"exclude_recent": 0}, "exclude_recent is 0"),
        ({"heads": 3}, r"heads \(3\)"),
    ],
)
def test_rejects_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        RetrievalMemory(DIM, **options)

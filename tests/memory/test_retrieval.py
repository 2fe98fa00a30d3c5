"""The store against its equations, and what of it a query can reach."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.errors import MemtxError
from memtx.memory import knn_index
from memtx.memory.retrieval import RetrievalMemory
from memtx.segment import Segment

# float64 sums of a few terms, in another order.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)

DIM, HEADS = 8, 2
FINE = DIM // HEADS


def made(seed: int = 0, **options: Any) -> RetrievalMemory:
    torch.manual_seed(seed)
    memory = RetrievalMemory(
        DIM, **({"capacity": 6, "top_k": 2, "exclude_recent": 3, "heads": HEADS} | options)
    ).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


def run(memory: RetrievalMemory, x: Tensor, starts: Tensor | None = None, carried: int = 0, state: Any = None) -> Any:
    """Return what was read (rows, segment, DIM), its share likewise, and the next state."""
    state = state if state is not None else memory.init_state(x.shape[0], like=x)
    segment = Segment.from_document_starts(torch.full((x.shape[0],), carried), x.shape[1], starts)
    view = memory.read(state, x, segment, None)  # type: ignore[arg-type]
    readout = memory.readout(view, x.new_zeros(*x.shape[:2], HEADS, FINE))
    out, gate = (part.transpose(1, 2).flatten(2) for part in (readout.out, readout.gate))
    return out, gate, memory.write(view, segment, None)[0]  # type: ignore[arg-type]


def mixed(memory: RetrievalMemory, x: Tensor) -> Tensor:
    """Mix each token of one document with the one before it."""
    if memory.token_shift is None:
        return x
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    return (1 - memory.token_shift.mix_ratio) * x + memory.token_shift.mix_ratio * before


def by_hand(memory: RetrievalMemory, x: Tensor) -> Tensor:
    """Read one document (tokens, DIM), a query and a head at a time; nothing found gives zeros."""
    outputs = torch.zeros_like(x)
    parts = ((memory.query, x), (memory.key, mixed(memory, x)), (memory.value, x))
    q, k, v = (part(given).view(-1, HEADS, FINE) for part, given in parts)
    for at in range(len(x)):
        reach = range(max(0, at - memory.exclude_recent - memory.capacity + 1), at - memory.exclude_recent + 1)
        for head in range(HEADS):
            scores = {j: torch.cosine_similarity(q[at, head], k[j, head], dim=0) for j in reach}
            best = sorted(scores, key=lambda j: -float(scores[j]))[: memory.top_k]
            if best:
                weights = torch.softmax(torch.stack([scores[j] for j in best]) * memory.log_scale[head].exp(), 0)
                outputs[at, head * FINE : (head + 1) * FINE] = weights @ torch.stack([v[j, head] for j in best])
    return outputs


@given(
    seed=st.integers(0, 999),
    capacity=st.integers(1, 9),
    nearest=st.integers(1, 5),
    skip=st.integers(1, 6),
    n=st.integers(1, 30),
    begin=st.integers(1, 29),
    step=st.sampled_from([1, 40, knn_index.MAX_SCORES]),
    shift=st.booleans(),
)
def test_it_is_its_equations(
    seed: int, capacity: int, nearest: int, skip: int, n: int, begin: int, step: int, shift: bool
) -> None:
    """However many queries are scored at a time."""
    memory = made(seed, capacity=capacity, top_k=nearest, exclude_recent=skip, token_shift=shift)
    x = torch.randn(1, n, DIM, dtype=torch.float64)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn_index, "MAX_SCORES", step)
        out, gate, _ = run(memory, x, torch.arange(n)[None] == begin)
        for low, high in ((0, min(begin, n)), (begin, n)):
            if low < high:
                close(out[0, low:high], by_hand(memory, x[0, low:high]))
    share = torch.sigmoid(memory.mix_gate).repeat_interleave(FINE)
    position = torch.tensor([at if at < begin else at - begin for at in range(n)])
    close(gate[0], share * (position >= skip)[:, None])


def test_an_exact_key_is_found_among_thousands() -> None:
    memory = made(capacity=4000, top_k=1, exclude_recent=1, token_shift=False)
    with torch.no_grad():
        memory.query.weight.copy_(memory.key.weight)
    x = torch.randn(1, 4000, DIM, dtype=torch.float64)
    x[0, -1] = x[0, 17]
    with torch.no_grad():
        out, _, _ = run(memory, x)
        close(out[0, -1], memory.value(x[0, 17]))


def test_gradients_reach_what_was_found_and_nothing_else() -> None:
    memory = made(top_k=1, exclude_recent=1, capacity=20)
    x = torch.randn(1, 12, DIM, dtype=torch.float64, requires_grad=True)
    out, _, _ = run(memory, x)
    (grad,) = torch.autograd.grad(out[0, -1].sum(), x)
    touched = set(grad[0].abs().sum(-1).nonzero().flatten().tolist())
    # The one key that each head found, by its value; a softmax of one has no gradient for scores.
    assert 1 <= len(touched) <= HEADS
    memory = made(top_k=2, exclude_recent=1, capacity=20)
    out, _, _ = run(memory, x)
    (grad,) = torch.autograd.grad(out[0, -1].sum(), x)
    assert 11 in set(grad[0].abs().sum(-1).nonzero().flatten().tolist()), "the query itself learns"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"capacity": 0}, "capacity is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"exclude_recent": 0}, "exclude_recent is 0"),
        ({"heads": 3}, r"heads \(3\)"),
    ],
)
def test_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(MemtxError, match=says):
        RetrievalMemory(DIM, **options)

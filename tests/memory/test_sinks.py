"""The first tokens of a document against a plain softmax over them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx import MemoryTransformer, RecurrentMemory
from memtx.errors import MemtxError
from memtx.memory.sinks import SinkMemory
from memtx.segment import Segment
from tests.memory.harness import DIM, HEADS, Layer

# float64 sums of a few terms, in another order.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def by_hand(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Read one document (tokens, DIM): outputs (tokens, HEADS, width), zero where nothing is seen, and its lse."""
    memory = layer.memory
    q, k, v = (layer.project(x[None], part, frozen=False)[0] for part in ("query", "key", "value"))
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], float("-inf"), dtype=x.dtype)
    for at in range(len(x)):
        seen = [sink for sink in range(min(memory.num_sinks, len(x))) if at - sink >= memory.exclude_recent]
        if seen:
            scores = torch.einsum("hd,shd->hs", q[at], k[seen]) * q.shape[-1] ** -0.5
            out[at] = torch.einsum("hs,shd->hd", scores.softmax(-1), v[seen])
            lse[at] = scores.logsumexp(-1)
    return out, lse


@given(
    seed=st.integers(0, 999),
    skip=st.integers(1, 6),
    count=st.integers(1, 7),
    n=st.integers(1, 40),
    chance=st.sampled_from([0.0, 0.05, 0.2]),
    cuts=st.lists(st.integers(1, 39), max_size=4),
)
def test_it_is_a_softmax_over_the_first_tokens(
    seed: int, skip: int, count: int, n: int, chance: float, cuts: list[int]
) -> None:
    """However the stream is cut, and wherever documents begin."""
    torch.manual_seed(seed)
    layer = Layer(SinkMemory(DIM, num_sinks=min(count, skip + 1), exclude_recent=skip)).double()
    x = torch.randn(2, n, DIM, dtype=torch.float64)
    starts = torch.rand(2, n) < chance
    state, carried, found, begin = layer.memory.init_state(2, like=x), torch.zeros(2, dtype=torch.int64), [], 0
    for stop in sorted({*(cut for cut in cuts if cut < n), n}):
        part = x[:, begin:stop]
        segment = Segment.from_document_starts(carried, stop - begin, starts[:, begin:stop])
        view = layer.memory.read(state, part, segment, layer)
        found.append(layer.memory.readout(view, layer.project(part, "query", frozen=False)))
        state, _ = layer.memory.write(view, segment, None)  # type: ignore[arg-type]
        carried, begin = segment.next_position, stop
    out, lse = torch.cat([one.out for one in found], 2), torch.cat([one.lse for one in found], 2)
    for row in range(2):
        begins = sorted({0, *starts[row].nonzero().flatten().tolist()})
        for low, high in zip(begins, [*begins[1:], n], strict=True):
            expected, expected_lse = by_hand(layer, x[row, low:high])
            close(out[row, :, low:high], expected.transpose(0, 1))
            close(lse[row, :, low:high], expected_lse.T)
        kept = x[row, low : min(high, low + layer.memory.num_sinks)]
        close(state.hidden[row], torch.cat([kept, kept.new_zeros(layer.memory.num_sinks - len(kept), DIM)]))
    assert out.shape[1] == HEADS


def test_beside_a_window_it_sees_the_first_tokens_for_ever() -> None:
    torch.manual_seed(0)
    memories = [partial(RecurrentMemory, window=4), partial(SinkMemory, num_sinks=2, exclude_recent=4)]
    model = MemoryTransformer(11, dim=8, depth=1, heads=2, memories=[memories]).eval()
    tokens = torch.randint(0, 11, (1, 200))
    for at, reached in ((0, True), (1, True), (2, False), (150, False), (198, True)):
        other = tokens.clone()
        other[0, at] = (other[0, at] + 1) % 11
        assert reached == (not torch.equal(model(tokens).logits[:, -1], model(other).logits[:, -1])), at


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_sinks": 0}, "num_sinks is 0"),
        ({"exclude_recent": 0}, "exclude_recent is 0"),
        ({"num_sinks": 7, "exclude_recent": 5}, "num_sinks is 7, exclude_recent is 5"),
    ],
)
def test_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(MemtxError, match=says):
        SinkMemory(DIM, **options)

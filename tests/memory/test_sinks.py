"""Attention to the first tokens of a document against a plain softmax over them."""

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

# Sums of a few float64 terms in another order.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


class DecayingLayer(Layer):
    """A layer whose keys are smaller the farther away they are seen from."""

    def apply_relative(self, keys: Tensor, distance: Tensor) -> Tensor:
        return keys * 0.8 ** distance[:, None, None]


def attend_naively(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs ``(tokens, HEADS, width)`` and lse for a document ``(tokens, DIM)``, zero and -inf for no sink."""
    memory = layer.memory
    q, k, v = (layer.project(x[None], part, frozen=False)[0] for part in ("query", "key", "value"))
    if memory.use_positions:
        # The first sink is seen at the end of the window, the others one position nearer each.
        distance = [max(0, memory.exclude_recent - 1 - index) for index in range(len(x))]
        k = k * 0.8 ** torch.tensor(distance, dtype=x.dtype)[:, None, None]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], float("-inf"), dtype=x.dtype)
    for query in range(len(x)):
        seen = [sink for sink in range(min(memory.num_sinks, len(x))) if query - sink >= memory.exclude_recent]
        if seen:
            scores = torch.einsum("hd,shd->hs", q[query], k[seen]) * q.shape[-1] ** -0.5
            out[query] = torch.einsum("hs,shd->hd", scores.softmax(-1), v[seen])
            lse[query] = scores.logsumexp(-1)
    return out, lse


@given(
    seed=st.integers(0, 999),
    exclude_recent=st.integers(1, 6),
    num_sinks=st.integers(1, 7),
    n=st.integers(1, 40),
    start_prob=st.sampled_from([0.0, 0.05, 0.2]),
    ends=st.lists(st.integers(1, 39), max_size=4),
    use_positions=st.booleans(),
)
def test_it_is_a_softmax_over_the_first_tokens(
    seed: int, exclude_recent: int, num_sinks: int, n: int, start_prob: float, ends: list[int], use_positions: bool
) -> None:
    """This holds for any segmentation and any document starts."""
    torch.manual_seed(seed)
    options = {"num_sinks": min(num_sinks, exclude_recent + 1), "exclude_recent": exclude_recent}
    layer = DecayingLayer(SinkMemory(DIM, **options, use_positions=use_positions)).double()
    x = torch.randn(2, n, DIM, dtype=torch.float64)
    document_starts = torch.rand(2, n) < start_prob
    state, past_length, readouts, start = layer.memory.init_state(2, like=x), torch.zeros(2, dtype=torch.int64), [], 0
    for stop in sorted({*(end for end in ends if end < n), n}):
        part = x[:, start:stop]
        segment = Segment.from_document_starts(past_length, stop - start, document_starts[:, start:stop])
        view = layer.memory.read(state, part, segment, layer)
        readouts.append(layer.memory.readout(view, layer.project(part, "query", frozen=False)))
        state, _ = layer.memory.write(view, segment, None)  # type: ignore[arg-type]
        past_length, start = segment.next_position, stop
    out, lse = torch.cat([readout.out for readout in readouts], 2), torch.cat([readout.lse for readout in readouts], 2)
    for stream in range(2):
        offsets = sorted({0, *document_starts[stream].nonzero().flatten().tolist()})
        for low, high in zip(offsets, [*offsets[1:], n], strict=True):
            expected, expected_lse = attend_naively(layer, x[stream, low:high])
            close(out[stream, :, low:high], expected.transpose(0, 1))
            close(lse[stream, :, low:high], expected_lse.T)
        sinks = x[stream, low : min(high, low + layer.memory.num_sinks)]
        close(state.hidden[stream], torch.cat([sinks, sinks.new_zeros(layer.memory.num_sinks - len(sinks), DIM)]))
    assert out.shape[1] == HEADS


def test_sinks_stay_visible_beyond_the_window() -> None:
    torch.manual_seed(0)
    memories = [partial(RecurrentMemory, window=4), partial(SinkMemory, num_sinks=2, exclude_recent=4)]
    model = MemoryTransformer(11, dim=8, depth=1, heads=2, memories=[memories]).eval()
    tokens = torch.randint(0, 11, (1, 200))
    for position, expected_change in ((0, True), (1, True), (2, False), (150, False), (198, True)):
        other = tokens.clone()
        other[0, position] = (other[0, position] + 1) % 11
        assert expected_change == (not torch.equal(model(tokens).logits[:, -1], model(other).logits[:, -1])), position


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sinks": 0}, "num_sinks is 0"),
        ({"exclude_recent": 0}, "exclude_recent is 0"),
        ({"num_sinks": 7, "exclude_recent": 5}, "num_sinks is 7, exclude_recent is 5"),
    ],
)
def test_rejects_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        SinkMemory(DIM, **options)

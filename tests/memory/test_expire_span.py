"""Expire-Span against the paper's equations, with gradients, and its loss."""

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
from memtx.layers.positions.base import Alibi, NoPositions
from memtx.memory.expire_span import ExpireSpanMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.segment import Segment

# Sums of a few dozen float64 terms in another order.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-9)

DIM, HEADS = 8, 2
WIDTH = DIM // HEADS


def attend_naively(layer: Any, memory: ExpireSpanMemory, x: Tensor) -> Tensor:
    """Attend within a document ``(tokens, DIM)``, one query and head at a time."""
    e = memory.max_span * torch.sigmoid(x @ memory.span_predictor.weight[0] + memory.span_predictor.bias)
    k, v = layer.key_value(x).chunk(2, dim=-1)
    outputs = []
    for t in range(len(x)):
        distance = t - torch.arange(t + 1)
        m = ((e[: t + 1] - distance) / memory.ramp + 1).clamp(0, 1)
        heads = []
        for head in range(HEADS):
            part = slice(head * WIDTH, (head + 1) * WIDTH)
            scores = k[: t + 1, part] @ layer.query(x[t])[part] * WIDTH**-0.5
            if isinstance(layer.positions, Alibi):
                scores = scores - layer.positions.slopes[head] * distance
            weights = m * torch.softmax(scores, 0)
            heads.append((weights / weights.sum()) @ v[: t + 1, part])
        outputs.append(layer.out(torch.cat(heads)))
    return torch.stack(outputs)


@pytest.mark.parametrize("positions", [NoPositions, Alibi])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@given(seed=st.integers(0, 999), max_span=st.integers(1, 12), ramp=st.integers(1, 6), n=st.integers(1, 20))
@settings(deadline=None, max_examples=20)
def test_matches_the_equations(positions: Any, backend: Any, seed: int, max_span: int, ramp: int, n: int) -> None:
    torch.manual_seed(seed)
    memory = ExpireSpanMemory(DIM, max_span, ramp)
    layer = MemoryAttention(DIM, HEADS, HEADS, memory, positions(HEADS, WIDTH), backend=backend).double()
    torch.nn.init.normal_(memory.span_predictor.weight)
    x = torch.randn(1, n, DIM, dtype=torch.float64)
    state = (memory.init_state(1, like=x),)
    segment = Segment.from_document_starts(torch.zeros(1, dtype=torch.int64), n)
    results = []
    for out in (layer(x, state, segment)[0], attend_naively(layer, memory, x[0])[None]):
        gradients = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        results.append((out, *gradients))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)
    with torch.no_grad():
        close(layer(x, state, segment)[0], results[0][0])


def test_an_expired_entry_is_not_seen() -> None:
    torch.manual_seed(0)
    memory = partial(ExpireSpanMemory, max_span=20, ramp=2, initial_fraction=0.1)
    model = MemoryTransformer(11, 8, 1, 2, memories=[memory]).eval()
    tokens = torch.randint(11, (1, 12))
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 11
    differs = (model(tokens).logits != model(other).logits).any(-1)[0].tolist()
    # A span of 2 and a ramp of 2: the weights at distances 0 to 2 are full, that at 3 is half, that at 4 is 0.
    assert differs == [True] * 4 + [False] * 8


def test_the_loss_is_the_mean_span_of_new_tokens() -> None:
    memory = ExpireSpanMemory(DIM, 20, 4, span_penalty=0.5, initial_fraction=0.25)
    x = torch.randn(2, 6, DIM)
    segment = Segment.from_document_starts(torch.full((2,), 9), 6)
    view = memory.read(memory.init_state(2, like=x), x, segment, None)  # type: ignore[arg-type]
    close(memory.write(view, segment, None)[1]["span_penalty"], torch.tensor(2.5))  # type: ignore[arg-type]
    assert memory.eval().read(memory.init_state(2, like=x), x, segment, None).losses == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_span": 0}, "max_span is 0"),
        ({"ramp": 0}, "ramp is 0"),
        ({"span_penalty": -1.0}, "span_penalty is -1"),
        ({"initial_fraction": 1.0}, "initial_fraction is 1.0"),
    ],
)
def test_rejects_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        ExpireSpanMemory(DIM, **options)

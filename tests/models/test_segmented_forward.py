"""Memory tokens: written at the top of the stack once per interval, read at the bottom, and their reach."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx import FeedForward, MemoryTransformer, MemtxError, NoMemory, RecurrentMemory
from memtx.memory.memory_tokens import TokenMemory
from memtx.segment import Segment

# float64: sums of a few dozen terms in another order, through several layers.
EXACT = 1e-10

WINDOW = 12
TOKENS = torch.randint(0, 11, (2, 40), generator=torch.Generator().manual_seed(1))


def small(interval: int = 5, count: int = 2, window: int = WINDOW, depth: int = 2) -> MemoryTransformer:
    torch.manual_seed(0)
    stack = [partial(RecurrentMemory, window=window), partial(TokenMemory, num_tokens=count, interval=interval)]
    model = MemoryTransformer(11, dim=8, depth=depth, heads=2, memories=[stack], feed_forward=FeedForward).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 30), st.integers(0, 20), st.integers(0, 999))
def test_chunk_ends_are_interval_ends_of_any_stream(
    interval: int, batch_size: int, length: int, past_length: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    document_starts = torch.rand(batch_size, length, generator=draw) < 0.1
    segment = Segment.from_document_starts(
        torch.randint(0, past_length + 1, (batch_size,), generator=draw), length, document_starts
    )
    offsets = [(stream, offset) for stream in range(batch_size) for offset in range(length)]
    expected = {offset + 1 for stream, offset in offsets if (int(segment.position[stream, offset]) + 1) % interval == 0}
    assert segment.split_offsets(interval) == sorted(expected | {length})


def attended(block: Any, x: Tensor, keys: Tensor, entries: Tensor | None) -> Tensor:
    """Return a layer's attention of x, the last of the keys, over the keys up to each query and the entries."""
    attention, length = block.attention, keys.shape[1]
    q = attention.project(x, "query", frozen=True)
    k, v = (attention.project(keys, part, frozen=True) for part in ("key", "value"))
    at = torch.arange(length, dtype=torch.float64)[None]
    rotate = partial(attention.positions.apply_absolute, memo=lambda _, make: make())
    rotated = [rotate(q, at[:, length - x.shape[1] :]), rotate(k, at)]
    future = torch.arange(length) > torch.arange(length - x.shape[1], length)[:, None]
    scores = torch.einsum("rqhd,rkhd->rhqk", *rotated).masked_fill(future, float("-inf"))
    if entries is not None:
        ek, ev = (attention.project(entries, part, frozen=True) for part in ("key", "value"))
        scores = torch.cat([scores, torch.einsum("rqhd,rkhd->rhqk", q, ek)], dim=-1)
        v = torch.cat([v, ev], dim=1)
    weights = (scores * q.shape[-1] ** -0.5).softmax(-1)
    out: Tensor = attention.out(torch.einsum("rhqk,rkhd->rqhd", weights, v).flatten(2))
    return out


def by_hand(model: Any, tokens: Tensor, interval: int) -> Tensor:
    """Return the logits of one document within the window, read interval by interval by plain formulas."""
    blocks, length = list(model.blocks), tokens.shape[1]
    entries = [block.attention.memories[1].initial_tokens[None] for block in blocks]
    past: list[Tensor] = [torch.zeros(1, 0, 8).double() for _ in blocks]

    def layer(number: int, x: Tensor, before: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        block = blocks[number]
        memory_tokens = block.attention_norm(x)
        keys = torch.cat([before, memory_tokens], dim=1)
        x = x + attended(block, memory_tokens, keys, seen)
        return x + block.feed_forward(block.feed_forward_norm(x)), keys

    logits = []
    for start in range(0, length, interval):
        x = model.embedding(tokens[:, start : start + interval])
        is_interval = x.shape[1] == interval
        for number in range(len(blocks)):
            x, past[number] = layer(number, x, past[number], entries[number])
        logits.append(model.head(model.norm(x)))
        if not is_interval:
            break
        x = model.write_tokens[None]
        for number in range(len(blocks)):
            x, _ = layer(number, x, past[number], entries[number])
        for number, block in enumerate(blocks):
            entries[number] = block.attention_norm(x)
            x, _ = layer(number, x, past[number][:, :0], None)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("interval", "count"), [(1, 1), (4, 3), (5, 2), (50, 2)])
def test_matches_hand_written_recurrence(interval: int, count: int) -> None:
    model = small(interval, count, window=100)
    with torch.no_grad():
        actual = model(TOKENS[:1, :23]).logits
        assert (actual - by_hand(model, TOKENS[:1, :23], interval)).abs().max() < EXACT


def test_memory_tokens_reach_past_the_window() -> None:
    """Two layers with a window of 3 reach 4 tokens back, memory tokens any number of intervals."""
    changed = TOKENS.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 11
    for interval, reached in ((3, True), (50, False)):
        model = small(interval, window=3)
        assert reached == (not torch.equal(model(TOKENS).logits[:, -1], model(changed).logits[:, -1]))


def test_gradients_flow_from_last_interval_to_first() -> None:
    """The gradient can flow only through the tokens: the window is far too short."""
    model = small(interval=3, window=3)
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda _, __, out: embedded.append(out))
    last = model(TOKENS).logits[:, -1].sum()
    (grad,) = torch.autograd.grad(last, embedded)
    assert float(grad[:, 0].abs().min()) > 0


def test_layers_must_have_equal_memory_tokens() -> None:
    window = partial(RecurrentMemory, window=8)
    first, second = (partial(TokenMemory, num_tokens=count, interval=4) for count in (2, 3))
    for memories in ([[window, first], NoMemory], [[window, first], [window, second]], [[window, first, first]]):
        with pytest.raises(MemtxError, match="all layers"):
            MemoryTransformer(11, dim=8, depth=2, heads=2, memories=memories)
    for options, message in (({"num_tokens": 0}, "num_tokens is 0"), ({"interval": 0}, "interval is 0")):
        with pytest.raises(MemtxError, match=message):
            TokenMemory(8, **options)

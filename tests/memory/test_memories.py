"""Exact and compressed memories: independence of segmentation, documents and batch, fixed shapes, visibility."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx.errors import MemtxError
from memtx.memory import compression
from memtx.memory.compressed import CompressedMemory
from memtx.memory.none import NoMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.ops.attention.mask import create_mask, find_key_ranges
from memtx.segment import Segment
from tests.memory.harness import DIM, Stack, streams

COMPRESSIONS: list[Callable[..., compression.Compression]] = [
    compression.MeanPooling,
    compression.MaxPooling,
    compression.StridedConvolution,
    compression.DilatedConvolution,
    compression.MostUsed,
    partial(compression.AttentionPooling, heads=2),
]

windows, compression_rates, bank_sizes = st.integers(1, 9), st.integers(1, 5), st.integers(0, 4)

compressed = st.builds(
    partial,
    st.just(CompressedMemory),
    window=windows,
    compression_rate=compression_rates,
    num_entries=bank_sizes,
    compression=st.sampled_from(COMPRESSIONS),
)
recurrent = st.builds(partial, st.just(RecurrentMemory), window=windows)
published = st.one_of(
    st.builds(
        partial,
        st.just(CompressedMemory),
        window=windows,
        compression_rate=compression_rates,
        num_entries=bank_sizes,
        compress_per_segment=st.just(True),
    ),
    st.builds(partial, st.just(RecurrentMemory), window=windows, same_length=st.just(False)),
)

# Sums of a few dozen terms of order 1 in another order; 1e-10 leaves a margin of four digits.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def assert_same_state(actual: Any, expected: Any) -> None:
    for leaf, expected_leaf in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        close(leaf, expected_leaf)


@given(st.one_of(compressed, recurrent), streams(), st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_results_do_not_depend_on_segmentation(kind: Any, stream: tuple[Tensor, Tensor, list[int]], seed: int) -> None:
    torch.manual_seed(seed)
    stack, (x, document_starts, ends) = Stack(kind), stream
    with torch.no_grad():
        expected, state = stack.run(x, document_starts, [])
        for other_ends in (ends, range(x.shape[1])):
            out, end_state = stack.run(x, document_starts, list(other_ends))
            close(out, expected)
            assert_same_state(end_state, state)


@given(st.one_of(compressed, recurrent, published, st.just(NoMemory)), streams(40), st.integers(0, 99))
@settings(deadline=None, max_examples=80)
def test_documents_and_streams_are_independent(kind: Any, stream: tuple[Tensor, Tensor, list[int]], seed: int) -> None:
    """This holds for published schedules too: a document within a call equals a call of its own."""
    torch.manual_seed(seed)
    stack, (x, document_starts, ends) = Stack(kind), stream
    with torch.no_grad():
        expected, state = stack.run(x, document_starts, ends)
        for index in range(x.shape[0]):
            offsets = sorted({0, *document_starts[index].nonzero().flatten().tolist()})
            for start, stop in zip(offsets, [*offsets[1:], x.shape[1]], strict=True):
                document_ends = [end - start for end in ends if start < end < stop]
                out, last = stack.run(
                    x[index : index + 1, start:stop], torch.zeros(1, stop - start, dtype=torch.bool), document_ends
                )
                close(out, expected[index : index + 1, start:stop])
            assert_same_state(last, state.select([index]))


@given(st.one_of(compressed, recurrent, published), streams(30), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_state_is_a_value_of_fixed_shape(kind: Any, stream: tuple[Tensor, Tensor, list[int]], seed: int) -> None:
    torch.manual_seed(seed)
    stack, (x, document_starts, ends) = Stack(kind), stream
    fresh = stack.init_state(x.shape[0])
    with torch.no_grad():
        _, state = stack.run(x, document_starts, ends)
        state_copy = pytree.tree_map(torch.clone, state)
        first, _ = stack.run(x, document_starts, ends, state)
        second, _ = stack.run(x, document_starts, ends, state)
        is_first = torch.arange(x.shape[0]) == 0
        reset, _ = stack.run(x[:1], document_starts[:1], ends, state.reset(is_first).select([0]))
        alone, _ = stack.run(x[:1], document_starts[:1], ends)
    assert torch.equal(first, second)
    assert torch.equal(reset, alone)
    assert state.equals(state_copy)
    assert [leaf.shape for leaf in pytree.tree_leaves(state)] == [leaf.shape for leaf in pytree.tree_leaves(fresh)]
    assert not any("hidden" in name for name, _ in stack.named_buffers())


def naive_view(t: int, window: int, rate: int, length: int) -> tuple[set[int], set[int]]:
    """Return the exact positions and the blocks that the query at position t sees."""
    boundary = rate * max(0, (t - window + 1) // rate)
    evicted = [b for b in range(t + 1) if (b + 1) * rate <= boundary]
    return set(range(boundary, t + 1)), set(evicted[max(0, len(evicted) - length) :])


@given(windows, compression_rates, bank_sizes, st.integers(0, 70), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_visibility_is_a_function_of_positions(window: int, rate: int, length: int, past_length: int, n: int) -> None:
    """Entries are identified by position = offset + past_length, blocks by their centers."""
    memory = CompressedMemory(DIM, window, rate, length, compression.MeanPooling)
    segment = Segment.from_document_starts(torch.tensor([past_length]), n)
    x = torch.zeros(1, n, DIM)
    entry_positions = memory.read(memory.init_state(1, like=x), x, segment, None).entry_positions  # type: ignore[arg-type]
    seen, position = create_mask(entry_positions.visibility)[0], entry_positions.offset[0] + past_length
    entries = entry_positions.offset.shape[1] - memory.cache_length - n
    for query in range(n):
        exact, blocks = naive_view(past_length + query, window, rate, length)
        assert position[entries:][seen[query, entries:]].tolist() == sorted(exact)
        centers = sorted(position[:entries][seen[query, :entries]].tolist())
        assert centers == [b * rate + (rate - 1) / 2 for b in sorted(blocks)]


@given(st.one_of(compressed, recurrent, published, st.just(NoMemory)), streams(50), st.integers(1, 16))
@settings(deadline=None, max_examples=80)
def test_static_bounds_contain_every_visible_pair(
    kind: Any, stream: tuple[Tensor, Tensor, list[int]], block: int
) -> None:
    stack, (x, document_starts, ends) = Stack(kind, depth=1), stream
    with torch.no_grad():
        stack.run(x, document_starts, ends)
    for view in stack.layers[0].views:
        visibility = view.entry_positions.visibility
        assert sum(key_range.num_keys for key_range in visibility.key_ranges) == visibility.num_keys
        assert visibility.num_keys == sum(part.shape[1] for part in view.parts)
        for start in range(0, visibility.num_queries, block):
            stop = min(start + block, visibility.num_queries)
            outside = torch.ones(visibility.num_keys, dtype=torch.bool)
            for low, high in find_key_ranges(visibility, start, stop):
                outside[low:high] = False
            assert not create_mask(visibility, (start, stop))[..., outside].any()


@given(windows, streams(30))
@settings(deadline=None, max_examples=30)
def test_recurrent_memory_sees_its_window(window: int, stream: tuple[Tensor, Tensor, list[int]]) -> None:
    """A query sees itself and the ``window - 1`` positions before it in its document."""
    stack, (x, document_starts, ends) = Stack(partial(RecurrentMemory, window=window), depth=1), stream
    with torch.no_grad():
        stack.run(x, document_starts, ends)
    seen = torch.cat([create_mask(view.entry_positions.visibility).sum(-1) for view in stack.layers[0].views], 1)
    position = Segment.from_document_starts(
        torch.zeros(x.shape[0], dtype=torch.int64), x.shape[1], document_starts
    ).position
    assert torch.equal(seen, (position + 1).clamp(max=window))


def test_transformer_xl_sees_the_whole_cache() -> None:
    """With ``same_length=False``, query i of a call sees the whole cache and the call's first i + 1 tokens (3.2)."""
    stack = Stack(partial(RecurrentMemory, window=5, same_length=False), depth=1)
    stack.run(torch.randn(1, 12, DIM, dtype=torch.float64), torch.zeros(1, 12, dtype=torch.bool), [4, 8])
    counts = [create_mask(view.entry_positions.visibility)[0].sum(-1).tolist() for view in stack.layers[0].views]
    assert counts == [[1, 2, 3, 4], [5, 6, 7, 8], [6, 7, 8, 9]]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_compress_per_segment_is_the_published_schedule(
    blocks: int, rate: int, blocks_per_call: int, calls: int, seed: int
) -> None:
    """Compressive Transformer, algorithm 1: after each call of n tokens, the n oldest states are compressed."""
    torch.manual_seed(seed)
    window, n, length = max(blocks, blocks_per_call) * rate, blocks_per_call * rate, 5
    layer = Stack(
        partial(CompressedMemory, window=window, compression_rate=rate, num_entries=length, compress_per_segment=True),
        depth=1,
    ).layers[0]
    memory, bank = torch.zeros(1, 0, DIM).double(), torch.zeros(1, 0, DIM).double()
    state, position = layer.memory.init_state(1, like=memory), 0
    with torch.no_grad():
        for _ in range(calls):
            x = torch.randn(1, n, DIM, dtype=torch.float64)
            _, state, _ = layer(x, state, Segment.from_document_starts(torch.tensor([position]), n))
            position += n
            view = layer.views[-1]
            seen = create_mask(view.entry_positions.visibility)[0]
            for query in range(n):
                close(torch.cat(view.parts, dim=1)[0][seen[query]], torch.cat([bank, memory, x[:, : query + 1]], 1)[0])
            memory = torch.cat([memory, x], 1)
            old = max(0, memory.shape[1] - window)
            new = layer.memory.compression(memory[:, :old].unflatten(1, (-1, rate))) if old else bank[:, :0]
            memory, bank = memory[:, old:], torch.cat([bank, new], 1)[:, -length:]
            close(state.bank[:, length - bank.shape[1] :], bank)


def test_compression_learns_within_one_segment() -> None:
    """A segment reads the entry of a block evicted in it, so one segment's loss reaches the weights."""
    stack = Stack(partial(CompressedMemory, window=4, compression_rate=2, num_entries=3), depth=1)
    x = torch.randn(2, 12, DIM, dtype=torch.float64)
    out, _, _ = stack.step(x, stack.init_state(2), None)
    out.square().sum().backward()
    for parameter in stack.layers[0].memory.compression.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 1e-6


def test_most_used_ranks_by_the_newest_queries_at_eviction() -> None:
    """The rank is the mean attention, within the block, from the ``rate`` positions up to its eviction."""
    torch.manual_seed(0)
    window, rate, n = 4, 3, 90
    kind = partial(
        CompressedMemory, window=window, compression_rate=rate, num_entries=40, compression=compression.MostUsed
    )
    layer = Stack(kind, depth=1).layers[0]
    x = 3 * torch.randn(1, n, DIM, dtype=torch.float64)
    with torch.no_grad():
        _, state, _ = layer(x, layer.memory.init_state(1, like=x), Segment.from_document_starts(torch.tensor([0]), n))
        q, k = (layer.project(x, part, frozen=True)[0] for part in ("query", "key"))
    chosen = []
    for block in range((n - window) // rate):
        eviction = (block + 1) * rate + window - 1
        usage = torch.zeros(rate, dtype=torch.float64)
        for t in range(eviction - rate + 1, eviction + 1):
            scores = torch.einsum("hd,khd->hk", q[t], k[block * rate : (block + 1) * rate])
            usage += (scores * q.shape[-1] ** -0.5).softmax(-1).sum(0)
        chosen.append(block * rate + int(usage.argmax()))
    assert len({position % rate for position in chosen}) > 1, "all blocks have the same winner"
    assert torch.equal(state.bank[0, -len(chosen) :], x[0, chosen])


def test_every_weight_has_a_gradient_even_if_no_block_is_evicted() -> None:
    """DDP fails on parameters without a gradient."""
    stack = Stack(partial(CompressedMemory, window=40, compression_rate=4, num_entries=3))
    out, _, _ = stack.step(torch.randn(1, 3, DIM, dtype=torch.float64), stack.init_state(1), None)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in stack.parameters())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (partial(CompressedMemory, window=0), "window is 0"),
        (partial(CompressedMemory, compression_rate=0), "compression_rate is 0"),
        (partial(CompressedMemory, num_entries=-1), "num_entries is -1"),
        (partial(RecurrentMemory, window=0), "window is 0"),
        (partial(CompressedMemory, compression=partial(compression.AttentionPooling, heads=3)), r"heads \(3\)"),
    ],
)
def test_rejects_invalid_options(kind: Callable[[int], object], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        kind(DIM)

"""Ring buffers: the slot of every position and block, round trips of states, and streams that are moved."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.memory.kv_ring import KVRing, RingLayout, from_ring, to_ring

layouts = st.builds(
    lambda window, rate, num_entries: RingLayout(window, rate, num_entries, window + rate - 1),
    st.integers(1, 5), st.integers(1, 4), st.integers(0, 3),
)  # fmt: skip


@given(layouts, st.lists(st.integers(0, 30), min_size=1, max_size=3))
def test_a_state_survives_the_ring(layout: RingLayout, lengths: list[int]) -> None:
    """States hold the numbers of their positions and blocks, from 1; 0 where nothing was read yet."""
    past_length = torch.tensor(lengths)
    cache = past_length[:, None] - layout.cache_length + torch.arange(1, layout.cache_length + 1)
    # A block leaves the window with the token that is `window` positions after its last one.
    evicted = torch.tensor([max(0, (length - layout.window) // layout.compression_rate) for length in lengths])
    bank = evicted[:, None] - layout.num_entries + torch.arange(1, layout.num_entries + 1)
    cache, bank = (part.clamp(min=0)[..., None].double() for part in (cache, bank))
    hidden = to_ring(layout, cache, bank, past_length)
    assert hidden.shape == (len(lengths), layout.num_slots, 1)
    for stream, length in enumerate(lengths):
        expected = [0.0] * layout.num_slots
        for block in range(max(0, int(evicted[stream]) - layout.num_entries), int(evicted[stream])):
            expected[block % layout.num_entries] = block + 1
        for position in range(max(0, length - layout.num_exact_slots), length):
            expected[layout.num_entries + position % layout.num_exact_slots] = position + 1
        assert hidden[stream, :, 0].tolist() == expected
    actual_cache, actual_bank = from_ring(layout, hidden, past_length)
    assert torch.equal(actual_cache, cache)
    assert torch.equal(actual_bank, bank)


@given(layouts, st.integers(0, 30))
def test_a_block_is_evicted_as_soon_as_it_is_out_of_the_window(layout: RingLayout, position: int) -> None:
    def num_evicted(position: int) -> int:
        return int(layout.num_evicted_blocks(torch.tensor(position)))

    rate = layout.compression_rate
    assert num_evicted(position) == sum((block + 1) * rate <= position - layout.window + 1 for block in range(40))
    evicts = position > 0 and num_evicted(position) > num_evicted(position - 1)
    assert layout.evicts_block(position) == (evicts and layout.num_entries > 0)
    centers = layout.block_center(torch.arange(3))
    assert centers.tolist() == [sum(range(block * rate, block * rate + rate)) / rate for block in range(3)]


def make_ring(batch_size: int, start: int) -> KVRing:
    """Return a ring whose streams are numbered from ``start``."""
    number = torch.arange(start, start + batch_size).double()
    layout = RingLayout(2, 1, 0, 1)
    buffers = (number.view(-1, 1, 1).repeat(1, 2, 3), number.view(-1, 1, 1, 1, 1).repeat(1, 2, 2, 1, 3))
    return KVRing(buffers, layout=layout)


def streams(ring: KVRing) -> list[int]:
    for buffer in (ring.hidden, ring.key_value):
        flat: Any = buffer.flatten(1)
        assert torch.equal(flat, flat[:, :1].expand_as(flat))
        assert torch.equal(flat[:, 0], ring.hidden[:, 0, 0])
    return [int(number) for number in ring.hidden[:, 0, 0]]


def test_streams_are_copied_moved_and_narrowed() -> None:
    ring = make_ring(3, 1).resized(5)
    assert streams(ring) == [1, 2, 3, 0, 0]
    ring.copy_from(2, make_ring(2, 7))
    assert streams(ring) == [1, 2, 7, 8, 0]
    ring.compact(torch.tensor([3, 0]), torch.tensor([0, 1]))
    assert streams(ring) == [8, 1, 7, 8, 0]
    # A narrow view writes into the ring.
    narrow = ring.narrow(2)
    assert streams(narrow) == [8, 1]
    narrow.copy_from(1, make_ring(1, 9))
    assert streams(ring) == [8, 9, 7, 8, 0]

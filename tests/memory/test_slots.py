"""Slots against Memformer's equations, an interval at a time, and when they are written."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.errors import MemtxError
from memtx.memory.parts import Gate, ReflectingGate
from memtx.memory.slots import SlotMemory
from memtx.segment import Segment

# float64 sums of a few dozen terms, in another order, through some writes.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)

DIM, HEADS, COUNT = 8, 2, 3
FINE = DIM // HEADS
TEMPERATURE = 0.5


def made(seed: int = 0, **options: Any) -> SlotMemory:
    torch.manual_seed(seed)
    memory = SlotMemory(
        DIM, **({"num_slots": COUNT, "interval": 4, "heads": HEADS, "temperature": TEMPERATURE} | options)
    ).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


def run(
    memory: SlotMemory, x: Tensor, q: Tensor, starts: Tensor | None = None, carried: int = 0, state: Any = None
) -> Any:
    """Return the readout and the next state."""
    state = state if state is not None else memory.init_state(x.shape[0], like=x)
    segment = Segment.from_document_starts(torch.full((x.shape[0],), carried), x.shape[1], starts)
    view = memory.read(state, x, segment, None)  # type: ignore[arg-type]
    return memory.readout(view, q), memory.write(view, segment, None)[0]  # type: ignore[arg-type]


def unit(x: Tensor) -> Tensor:
    return x * (DIM**0.5 / x.norm(dim=-1, keepdim=True)) if x.norm() > 0 else x


def mixed(memory: SlotMemory, x: Tensor) -> Tensor:
    """Mix each token of one document with the one before it."""
    if memory.token_shift is None:
        return x
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    return (1 - memory.token_shift.mix_ratio) * x + memory.token_shift.mix_ratio * before


def written(memory: SlotMemory, slots: Tensor, x: Tensor) -> Tensor:
    """Write slots (count, DIM) from an interval's mixed inputs (tokens, DIM), a slot and a head at a time."""
    after = []
    for slot, bias in zip(slots, memory.slot_bias, strict=True):
        found = []
        for head in range(HEADS):
            own = slice(head * FINE, (head + 1) * FINE)
            q = memory.slot_query(slot)[own]
            keys = torch.cat([memory.slot_key(slot)[None], memory.key(x)])[:, own]
            values = torch.cat([memory.slot_value(slot)[None], memory.value(x)])[:, own]
            found.append(torch.softmax(keys @ q * FINE**-0.5 / TEMPERATURE, 0) @ values)
        new = unit(torch.cat(found) + bias)
        if memory.write_gate is not None:
            new = slot + memory.write_gate(torch.cat([slot, new])) * (new - slot)
        after.append(new)
    return torch.stack(after)


def by_hand(memory: SlotMemory, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Read one document: x (tokens, DIM), q (tokens, HEADS, FINE); return reads like q, and the last slots."""
    slots, outputs = torch.stack([unit(bias) for bias in memory.slot_bias]), []
    for at in range(len(x)):
        k, v = (part(slots).view(COUNT, HEADS, FINE) for part in (memory.read_key, memory.read_value))
        weights = torch.softmax(torch.einsum("hd,shd->hs", q[at], k) * FINE**-0.5, -1)
        outputs.append(torch.einsum("hs,shd->hd", weights, v))
        if (at + 1) % memory.interval == 0:
            slots = written(memory, slots, mixed(memory, x)[at + 1 - memory.interval : at + 1])
    return torch.stack(outputs), slots


@pytest.mark.parametrize("write", [Gate, None])
@given(
    seed=st.integers(0, 999),
    interval=st.integers(1, 7),
    n=st.integers(1, 30),
    begin=st.integers(1, 29),
    shift=st.booleans(),
)
def test_they_are_their_equations(write: Any, seed: int, interval: int, n: int, begin: int, shift: bool) -> None:
    memory = made(seed, write_gate=write, interval=interval, token_shift=shift)
    x, q = torch.randn(1, n, DIM, dtype=torch.float64), torch.randn(1, n, HEADS, FINE, dtype=torch.float64)
    with torch.no_grad():
        readout, state = run(memory, x, q, torch.arange(n)[None] == begin)
        ends = [(0, min(begin, n))] + ([(begin, n)] if begin < n else [])
        for low, high in ends:
            out, slots = by_hand(memory, x[0, low:high], q[0, low:high])
            close(readout.out[0, :, low:high], out.transpose(0, 1))
        close(state.slots[0], slots if high - low >= interval else torch.zeros_like(slots))


def test_nothing_is_written_before_an_interval_is_whole() -> None:
    memory = made(interval=5)
    x, q = torch.randn(1, 20, DIM, dtype=torch.float64), torch.zeros(1, 20, HEADS, FINE, dtype=torch.float64)
    state, changes, before = memory.init_state(1, like=x), [], torch.zeros(1, COUNT, DIM)
    with torch.no_grad():
        for at in range(20):
            _, state = run(memory, x[:, at : at + 1], q[:, :1], carried=at, state=state)
            if not torch.equal(state.slots, before):
                changes.append(at)
            before = state.slots
    assert changes == [4, 9, 14, 19]


def test_with_closed_gates_slots_stay_as_they_are_to_the_bit() -> None:
    memory = made()
    x, q = torch.randn(2, 21, DIM, dtype=torch.float64), torch.zeros(2, 21, HEADS, FINE, dtype=torch.float64)
    with torch.no_grad():
        _, state = run(memory, x, q)
        memory.write_gate.proj.weight.zero_()
        memory.write_gate.proj.bias.fill_(-5.0)  # 1.2 sigmoid(-5) < 0.1
        _, after = run(memory, x, q, carried=21, state=state)
    assert state.slots.abs().max() > 0.1
    assert torch.equal(after.slots, state.slots)


def test_the_log_sum_exp_is_that_of_the_slots_scores() -> None:
    """So that slots and attention stand in one softmax."""
    memory = made(interval=50)
    x, q = torch.randn(1, 6, DIM, dtype=torch.float64), torch.randn(1, 6, HEADS, FINE, dtype=torch.float64)
    readout, _ = run(memory, x, q)
    keys = memory.read_key(torch.stack([unit(bias) for bias in memory.slot_bias])).view(COUNT, HEADS, FINE)
    close(readout.lse, torch.einsum("rqhd,shd->rhqs", q, keys).mul(FINE**-0.5).logsumexp(-1))


def test_writing_has_a_price_in_training_alone() -> None:
    """The mean gate of the intervals that end, and of no other."""
    memory = made(write_penalty=0.5, write_gate=partial(Gate, stretch=0.0, bias_init=0.0))
    torch.nn.init.zeros_(memory.write_gate.proj.weight)
    torch.nn.init.zeros_(memory.write_gate.proj.bias)
    for n, price in ((3, 0.0), (4, 0.25), (13, 0.25)):
        x = torch.randn(2, n, DIM, dtype=torch.float64)
        segment = Segment.from_document_starts(torch.zeros(2, dtype=torch.int64), n)
        view = memory.read(memory.init_state(2, like=x), x, segment, None)  # type: ignore[arg-type]
        losses = memory.train().write(view, segment, None)[1]  # type: ignore[arg-type]
        assert losses["write_penalty"] == price
        assert memory.eval().write(view, segment, None)[1] == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_slots": 0}, "num_slots is 0"),
        ({"interval": 0}, "interval is 0"),
        ({"heads": 3}, r"heads \(3\)"),
        ({"write_penalty": -0.1}, "write_penalty is -0.1"),
        ({"temperature": 0}, "temperature is 0"),
        ({"write_gate": ReflectingGate}, "ReflectingGate, which goes up to 2"),
    ],
)
def test_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(MemtxError, match=says):
        SlotMemory(DIM, **options)

"""Slots against Memformer's equations, one interval at a time, and the times of their writes."""

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

# Sums of a few dozen float64 terms in another order, through several writes.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)

DIM, HEADS, NUM_SLOTS = 8, 2, 3
HEAD_DIM = DIM // HEADS
TEMPERATURE = 0.5


def build_memory(seed: int = 0, **options: Any) -> SlotMemory:
    torch.manual_seed(seed)
    memory = SlotMemory(
        DIM, **({"num_slots": NUM_SLOTS, "interval": 4, "heads": HEADS, "temperature": TEMPERATURE} | options)
    ).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


def run(
    memory: SlotMemory,
    x: Tensor,
    q: Tensor,
    document_starts: Tensor | None = None,
    past_length: int = 0,
    state: Any = None,
) -> Any:
    """Return the readout and the next state."""
    state = state if state is not None else memory.init_state(x.shape[0], like=x)
    segment = Segment.from_document_starts(torch.full((x.shape[0],), past_length), x.shape[1], document_starts)
    view = memory.read(state, x, segment, None)  # type: ignore[arg-type]
    return memory.readout(view, q), memory.write(view, segment, None)[0]  # type: ignore[arg-type]


def rms_normalize(x: Tensor) -> Tensor:
    return x * (DIM**0.5 / x.norm(dim=-1, keepdim=True)) if x.norm() > 0 else x


def shift_tokens(memory: SlotMemory, x: Tensor) -> Tensor:
    """Mix each token of a document with the previous one."""
    if memory.token_shift is None:
        return x
    previous = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    return (1 - memory.token_shift.mix_ratio) * x + memory.token_shift.mix_ratio * previous


def write_slots(memory: SlotMemory, slots: Tensor, x: Tensor) -> Tensor:
    """Write slots ``(slots, DIM)`` from an interval's shifted inputs ``(tokens, DIM)``, one slot and head at a time."""
    next_slots = []
    for slot, bias in zip(slots, memory.slot_bias, strict=True):
        heads = []
        for head in range(HEADS):
            head_slice = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            q = memory.slot_query(slot)[head_slice]
            keys = torch.cat([memory.slot_key(slot)[None], memory.key(x)])[:, head_slice]
            values = torch.cat([memory.slot_value(slot)[None], memory.value(x)])[:, head_slice]
            heads.append(torch.softmax(keys @ q * HEAD_DIM**-0.5 / TEMPERATURE, 0) @ values)
        new = rms_normalize(torch.cat(heads) + bias)
        if memory.write_gate is not None:
            new = slot + memory.write_gate(torch.cat([slot, new])) * (new - slot)
        next_slots.append(new)
    return torch.stack(next_slots)


def read_naively(memory: SlotMemory, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reads of queries ``(tokens, HEADS, HEAD_DIM)`` in a document ``(tokens, DIM)`` and the last slots."""
    slots, outputs = torch.stack([rms_normalize(bias) for bias in memory.slot_bias]), []
    for position in range(len(x)):
        k, v = (part(slots).view(NUM_SLOTS, HEADS, HEAD_DIM) for part in (memory.read_key, memory.read_value))
        weights = torch.softmax(torch.einsum("hd,shd->hs", q[position], k) * HEAD_DIM**-0.5, -1)
        outputs.append(torch.einsum("hs,shd->hd", weights, v))
        if (position + 1) % memory.interval == 0:
            slots = write_slots(memory, slots, shift_tokens(memory, x)[position + 1 - memory.interval : position + 1])
    return torch.stack(outputs), slots


@pytest.mark.parametrize("write_gate", [Gate, None])
@given(
    seed=st.integers(0, 999),
    interval=st.integers(1, 7),
    n=st.integers(1, 30),
    start=st.integers(1, 29),
    token_shift=st.booleans(),
)
def test_match_the_equations(write_gate: Any, seed: int, interval: int, n: int, start: int, token_shift: bool) -> None:
    memory = build_memory(seed, write_gate=write_gate, interval=interval, token_shift=token_shift)
    x, q = torch.randn(1, n, DIM, dtype=torch.float64), torch.randn(1, n, HEADS, HEAD_DIM, dtype=torch.float64)
    with torch.no_grad():
        readout, state = run(memory, x, q, torch.arange(n)[None] == start)
        ends = [(0, min(start, n))] + ([(start, n)] if start < n else [])
        for low, high in ends:
            out, slots = read_naively(memory, x[0, low:high], q[0, low:high])
            close(readout.out[0, :, low:high], out.transpose(0, 1))
        close(state.slots[0], slots if high - low >= interval else torch.zeros_like(slots))


def test_slots_are_written_where_intervals_end() -> None:
    memory = build_memory(interval=5)
    x, q = torch.randn(1, 20, DIM, dtype=torch.float64), torch.zeros(1, 20, HEADS, HEAD_DIM, dtype=torch.float64)
    state, changes, previous = memory.init_state(1, like=x), [], torch.zeros(1, NUM_SLOTS, DIM)
    with torch.no_grad():
        for position in range(20):
            _, state = run(memory, x[:, position : position + 1], q[:, :1], past_length=position, state=state)
            if not torch.equal(state.slots, previous):
                changes.append(position)
            previous = state.slots
    assert changes == [4, 9, 14, 19]


def test_closed_gates_leave_slots_bitwise_unchanged() -> None:
    memory = build_memory()
    x, q = torch.randn(2, 21, DIM, dtype=torch.float64), torch.zeros(2, 21, HEADS, HEAD_DIM, dtype=torch.float64)
    with torch.no_grad():
        _, state = run(memory, x, q)
        memory.write_gate.proj.weight.zero_()
        memory.write_gate.proj.bias.fill_(-5.0)  # 1.2 sigmoid(-5) < 0.1
        _, next_slots = run(memory, x, q, past_length=21, state=state)
    assert state.slots.abs().max() > 0.1
    assert torch.equal(next_slots.slots, state.slots)


def test_log_sum_exp_is_over_the_scores_of_the_slots() -> None:
    """Slots and attention can then share one softmax."""
    memory = build_memory(interval=50)
    x, q = torch.randn(1, 6, DIM, dtype=torch.float64), torch.randn(1, 6, HEADS, HEAD_DIM, dtype=torch.float64)
    readout, _ = run(memory, x, q)
    keys = memory.read_key(torch.stack([rms_normalize(bias) for bias in memory.slot_bias])).view(
        NUM_SLOTS, HEADS, HEAD_DIM
    )
    close(readout.lse, torch.einsum("bqhd,shd->bhqs", q, keys).mul(HEAD_DIM**-0.5).logsumexp(-1))


def test_write_penalty_is_the_mean_gate_in_training_only() -> None:
    """The mean is over the intervals that end in the call."""
    memory = build_memory(write_penalty=0.5, write_gate=partial(Gate, stretch=0.0, bias_init=0.0))
    torch.nn.init.zeros_(memory.write_gate.proj.weight)
    torch.nn.init.zeros_(memory.write_gate.proj.bias)
    for n, penalty in ((3, 0.0), (4, 0.25), (13, 0.25)):
        x = torch.randn(2, n, DIM, dtype=torch.float64)
        segment = Segment.from_document_starts(torch.zeros(2, dtype=torch.int64), n)
        view = memory.train().read(memory.init_state(2, like=x), x, segment, None)  # type: ignore[arg-type]
        losses = memory.write(view, segment, None)[1]  # type: ignore[arg-type]
        assert losses["write_penalty"] == penalty
        view = memory.eval().read(memory.init_state(2, like=x), x, segment, None)  # type: ignore[arg-type]
        assert memory.write(view, segment, None)[1] == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots is 0"),
        ({"interval": 0}, "interval is 0"),
        ({"heads": 3}, r"heads \(3\)"),
        ({"write_penalty": -0.1}, "write_penalty is -0.1"),
        ({"temperature": 0}, "temperature is 0"),
        ({"write_gate": ReflectingGate}, "ReflectingGate, which goes up to 2"),
    ],
)
def test_rejects_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        SlotMemory(DIM, **options)

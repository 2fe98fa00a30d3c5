"""The associative memory against its equations, token by token, and the properties of its gates."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.errors import MemtxError
from memtx.memory.associative import AssociativeMemory
from memtx.memory.parts import DPFPFeatureMap, EluFeatureMap, Gate, NormalizedFeatureMap, TokenShift
from memtx.segment import Segment

# Sums of a few dozen float64 terms in another order.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)

DIM, HEADS = 8, 2

KINDS: dict[str, dict[str, Any]] = {
    "delta": {"decay_gate": None},
    "gated": {"key_dim": 3},
    "sums": {"delta_rule": False, "decay_gate": None},
    "means": {"delta_rule": False, "feature_map": EluFeatureMap, "decay_gate": None},
    "products": {"feature_map": partial(DPFPFeatureMap, order=2), "decay_gate": None},
}


def build_memory(seed: int = 0, **options: Any) -> AssociativeMemory:
    torch.manual_seed(seed)
    memory = AssociativeMemory(DIM, **({"heads": HEADS} | options)).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


def run(
    memory: AssociativeMemory, x: Tensor, document_starts: Tensor | None = None, state: Any = None
) -> tuple[Tensor, Any]:
    """Return the reads ``(batch, length, DIM)`` and the next state."""
    past_length = torch.full((x.shape[0],), 0 if state is None else 50)
    state = state if state is not None else memory.init_state(x.shape[0], like=x)
    segment = Segment.from_document_starts(past_length, x.shape[1], document_starts)
    view = memory.read(state, x, segment, None)  # type: ignore[arg-type]
    readout = memory.readout(view, x.new_zeros(*x.shape[:2], HEADS, DIM // HEADS))
    return readout.out.transpose(1, 2).flatten(2), memory.write(view, segment, None)[0]  # type: ignore[arg-type]


def read_naively(memory: AssociativeMemory, x: Tensor) -> Tensor:
    """Read one document ``(tokens, DIM)`` by the equations, one token and head at a time."""
    outputs, previous = [], torch.zeros(DIM, dtype=torch.float64)
    width = DIM // HEADS
    matrices = [torch.zeros(memory.feature_map.feature_dim, width, dtype=torch.float64) for _ in range(HEADS)]
    weights = [torch.zeros(memory.feature_map.feature_dim, dtype=torch.float64) for _ in range(HEADS)]
    for token in x:
        shifted = token + memory.token_shift.mix_ratio * (previous - token)
        previous, reads = token, []
        strength = memory.write_gate(shifted)
        q, k, v = (part(shifted).chunk(HEADS) for part in (memory.query, memory.key, memory.value))
        for head in range(HEADS):
            address, query_address = memory.feature_map(k[head]), memory.feature_map(q[head])
            if memory.decay_gate is not None:
                decay_factor = torch.exp(-memory.log_decay_rate[head].exp() * memory.decay_gate(shifted)[head])
                matrices[head] = matrices[head] * decay_factor
                weights[head] = weights[head] * decay_factor
            new = v[head] - address @ matrices[head] if memory.delta_rule else v[head]
            matrices[head] = matrices[head] + strength[head] * torch.outer(address, new)
            weights[head] = weights[head] + strength[head] * address
            read = query_address @ matrices[head]
            if memory.feature_map.is_nonnegative and not memory.delta_rule:
                # Normalize by the weights unless nothing was written.
                total = query_address @ weights[head]
                read = read / total if total > 0 else read
            reads.append(read)
        outputs.append(torch.cat(reads))
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 999), n=st.integers(1, 40), start=st.integers(1, 39))
def test_matches_the_equations(kind: str, seed: int, n: int, start: int) -> None:
    memory = build_memory(seed, **KINDS[kind])
    x = torch.randn(1, n, DIM, dtype=torch.float64)
    document_starts = torch.arange(n)[None] == start
    with torch.no_grad():
        out, _ = run(memory, x, document_starts)
        close(out[0, :start], read_naively(memory, x[0, :start]))
        if start < n:
            close(out[0, start:], read_naively(memory, x[0, start:]))


@pytest.mark.parametrize("decay", [None, Gate])
def test_closed_gates_leave_the_memory_bitwise_unchanged(decay: Any) -> None:
    memory = build_memory(decay_gate=decay)
    x = torch.randn(2, 50, DIM, dtype=torch.float64)
    _, state = run(memory, x)
    assert state.matrix.abs().max() > 0.1
    for gate in filter(None, (memory.write_gate, memory.decay_gate)):
        torch.nn.init.zeros_(gate.proj.weight)
        torch.nn.init.constant_(gate.proj.bias, -5.0)  # 1.2 sigmoid(-5) < 0.1
    for _ in range(20):
        _, after = run(memory, x, state=state)
        assert torch.equal(after.matrix, state.matrix)


def test_normalized_reads_lie_between_the_values() -> None:
    memory = build_memory(delta_rule=False, feature_map=EluFeatureMap)
    with torch.no_grad():
        # Values are the input channels, nothing is shifted and gates are open, since unwritten content reads as zero.
        memory.write_gate.proj.weight.zero_()
        memory.write_gate.proj.bias.fill_(5.0)
        memory.value.weight.copy_(torch.eye(DIM))
        memory.token_shift.mix_ratio.zero_()
    x = torch.randn(1, 30, DIM, dtype=torch.float64)
    out, _ = run(memory, x)
    assert (out <= x.cummax(1).values + 1e-9).all()
    assert (out >= x.cummin(1).values - 1e-9).all()


def test_half_precision_models_keep_float32_matrices() -> None:
    memory = build_memory().to(torch.bfloat16)
    x = torch.randn(1, 9, DIM, dtype=torch.bfloat16)
    fresh = memory.init_state(1, like=x)
    _, state = run(memory, x, state=fresh)
    assert fresh.matrix.dtype == state.matrix.dtype == torch.float32
    assert fresh.last_input.dtype == state.last_input.dtype == torch.bfloat16


def test_write_penalty_is_the_mean_gate_in_training_only() -> None:
    memory = build_memory(write_penalty=0.5)
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    segment = Segment.from_document_starts(torch.zeros(2, dtype=torch.int64), 6)
    view = memory.read(memory.init_state(2, like=x), x, segment, None)  # type: ignore[arg-type]
    (penalty,) = memory.write(view, segment, None)[1].values()  # type: ignore[arg-type]
    shifted = x + memory.token_shift.mix_ratio * (torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) - x)
    close(penalty, 0.5 * memory.write_gate(shifted).mean())
    view = memory.eval().read(memory.init_state(2, like=x), x, segment, None)  # type: ignore[arg-type]
    assert memory.write(view, segment, None)[1] == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("feature", [NormalizedFeatureMap, EluFeatureMap, DPFPFeatureMap])
def test_features_have_unit_length(feature: Any) -> None:
    feature_map = feature(5)
    out = feature_map(torch.randn(7, 5))
    assert out.shape == (7, feature_map.feature_dim)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(7))
    assert not feature.is_nonnegative or (out >= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, r"heads \(3\)"),
        ({"heads": 0}, r"heads \(0\)"),
        ({"key_dim": 0}, "key_dim is 0"),
        ({"write_penalty": -1.0}, "write_penalty is -1"),
        ({"feature_map": partial(DPFPFeatureMap, order=0)}, "order is 0"),
        (
            {"key_dim": 4, "feature_map": partial(DPFPFeatureMap, order=8)},
            "order is 8 for keys of width 4. Give 1 to 7",
        ),
        ({"write_gate": partial(Gate, stretch=-0.1)}, "stretch is -0.1"),
    ],
)
def test_rejects_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        AssociativeMemory(DIM, **options)


@pytest.mark.parametrize("order", [1, 7])
def test_products_reach_as_far_as_there_are_channels(order: int) -> None:
    assert DPFPFeatureMap(4, order)(torch.ones(4)).shape == (8 * order,)


def test_token_shift_starts_from_the_token_to_the_previous_one() -> None:
    """The first channel keeps the token, the last takes the previous one, those between mix evenly spaced shares."""
    shift = TokenShift(5).double()
    x, last_input = torch.randn(1, 4, 5).double(), torch.randn(1, 5).double()
    document_starts = torch.tensor([[False, False, True, False]])
    segment = Segment.from_document_starts(torch.tensor([3]), 4, document_starts)
    previous = torch.stack([last_input, x[:, 0], torch.zeros(1, 5).double(), x[:, 2]], dim=1)
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double()
    torch.testing.assert_close(shift(x, last_input, segment), x + shares * (previous - x), rtol=0, atol=1e-12)
    assert torch.equal(TokenShift.last_input(x), x[:, -1])

"""The associative memory against its equations, token by token, and what its gates promise."""

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
from memtx.memory.parts import DPFPFeatureMap, EluFeatureMap, Gate, NormalizedFeatureMap
from memtx.segment import Segment

# float64 sums of a few dozen terms, in another order.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)

DIM, HEADS = 8, 2

KINDS: dict[str, dict[str, Any]] = {
    "delta": {"decay_gate": None},
    "gated": {"key_dim": 3},
    "sums": {"delta_rule": False, "decay_gate": None},
    "means": {"delta_rule": False, "feature_map": EluFeatureMap, "decay_gate": None},
    "products": {"feature_map": partial(DPFPFeatureMap, order=2), "decay_gate": None},
}


def made(seed: int = 0, **options: Any) -> AssociativeMemory:
    torch.manual_seed(seed)
    memory = AssociativeMemory(DIM, **({"heads": HEADS} | options)).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


def run(memory: AssociativeMemory, x: Tensor, starts: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
    """Return reads (rows, segment, DIM) and the next state."""
    carried = torch.full((x.shape[0],), 0 if state is None else 50)
    state = state if state is not None else memory.init_state(x.shape[0], like=x)
    segment = Segment.from_document_starts(carried, x.shape[1], starts)
    view = memory.read(state, x, segment, None)  # type: ignore[arg-type]
    readout = memory.readout(view, x.new_zeros(*x.shape[:2], HEADS, DIM // HEADS))
    return readout.out.transpose(1, 2).flatten(2), memory.write(view, segment, None)[0]  # type: ignore[arg-type]


def by_hand(memory: AssociativeMemory, x: Tensor) -> Tensor:
    """Read one document (tokens, DIM) by the equations, a token and a head at a time."""
    outputs, before = [], torch.zeros(DIM, dtype=torch.float64)
    width = DIM // HEADS
    matrices = [torch.zeros(memory.feature_map.feature_dim, width, dtype=torch.float64) for _ in range(HEADS)]
    weights = [torch.zeros(memory.feature_map.feature_dim, dtype=torch.float64) for _ in range(HEADS)]
    for token in x:
        seen = token + memory.token_shift.mix_ratio * (before - token)
        before, found = token, []
        strength = memory.write_gate(seen)
        q, k, v = (part(seen).chunk(HEADS) for part in (memory.query, memory.key, memory.value))
        for head in range(HEADS):
            address, asked = memory.feature_map(k[head]), memory.feature_map(q[head])
            if memory.decay_gate is not None:
                kept = torch.exp(-memory.log_decay_rate[head].exp() * memory.decay_gate(seen)[head])
                matrices[head] = matrices[head] * kept
                weights[head] = weights[head] * kept
            new = v[head] - address @ matrices[head] if memory.delta_rule else v[head]
            matrices[head] = matrices[head] + strength[head] * torch.outer(address, new)
            weights[head] = weights[head] + strength[head] * address
            read = asked @ matrices[head]
            if memory.feature_map.is_nonnegative and not memory.delta_rule:
                # Divided by the weights, unless nothing was written with any.
                total = asked @ weights[head]
                read = read / total if total > 0 else read
            found.append(read)
        outputs.append(torch.cat(found))
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 999), n=st.integers(1, 40), begin=st.integers(1, 39))
def test_it_is_its_equations(kind: str, seed: int, n: int, begin: int) -> None:
    memory = made(seed, **KINDS[kind])
    x = torch.randn(1, n, DIM, dtype=torch.float64)
    starts = torch.arange(n)[None] == begin
    with torch.no_grad():
        out, _ = run(memory, x, starts)
        close(out[0, :begin], by_hand(memory, x[0, :begin]))
        if begin < n:
            close(out[0, begin:], by_hand(memory, x[0, begin:]))


@pytest.mark.parametrize("decay", [None, Gate])
def test_with_closed_gates_the_memory_stays_as_it_is_to_the_bit(decay: Any) -> None:
    memory = made(decay_gate=decay)
    x = torch.randn(2, 50, DIM, dtype=torch.float64)
    _, state = run(memory, x)
    assert state.matrix.abs().max() > 0.1
    for gate in filter(None, (memory.write_gate, memory.decay_gate)):
        torch.nn.init.zeros_(gate.proj.weight)
        torch.nn.init.constant_(gate.proj.bias, -5.0)  # 1.2 sigmoid(-5) < 0.1
    for _ in range(20):
        _, after = run(memory, x, state=state)
        assert torch.equal(after.matrix, state.matrix)


def test_a_mean_lies_between_the_values() -> None:
    memory = made(delta_rule=False, feature_map=EluFeatureMap)
    with torch.no_grad():
        # Values are the inputs' own channels; nothing shifted; gates open, for what is never written reads as zero.
        memory.write_gate.proj.weight.zero_()
        memory.write_gate.proj.bias.fill_(5.0)
        memory.value.weight.copy_(torch.eye(DIM))
        memory.token_shift.mix_ratio.zero_()
    x = torch.randn(1, 30, DIM, dtype=torch.float64)
    out, _ = run(memory, x)
    assert (out <= x.cummax(1).values + 1e-9).all()
    assert (out >= x.cummin(1).values - 1e-9).all()


def test_matrices_are_kept_in_float32_by_a_half_precision_model() -> None:
    memory = made().to(torch.bfloat16)
    x = torch.randn(1, 9, DIM, dtype=torch.bfloat16)
    fresh = memory.init_state(1, like=x)
    _, state = run(memory, x, state=fresh)
    assert fresh.matrix.dtype == state.matrix.dtype == torch.float32
    assert fresh.last_input.dtype == state.last_input.dtype == torch.bfloat16


def test_writing_has_a_price_in_training_alone() -> None:
    memory = made(write_penalty=0.5)
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    segment = Segment.from_document_starts(torch.zeros(2, dtype=torch.int64), 6)
    view = memory.read(memory.init_state(2, like=x), x, segment, None)  # type: ignore[arg-type]
    (price,) = memory.write(view, segment, None)[1].values()  # type: ignore[arg-type]
    shifted = x + memory.token_shift.mix_ratio * (torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) - x)
    close(price, 0.5 * memory.write_gate(shifted).mean())
    assert memory.eval().write(view, segment, None)[1] == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("feature", [NormalizedFeatureMap, EluFeatureMap, DPFPFeatureMap])
def test_features_have_length_one(feature: Any) -> None:
    made_of = feature(5)
    out = made_of(torch.randn(7, 5))
    assert out.shape == (7, made_of.feature_dim)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(7))
    assert not feature.is_nonnegative or (out >= 0).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heads": 3}, r"heads \(3\)"),
        ({"heads": 0}, r"heads \(0\)"),
        ({"key_dim": 0}, "key_dim is 0"),
        ({"write_penalty": -1.0}, "write_penalty is -1"),
        ({"feature_map": partial(DPFPFeatureMap, order=0)}, "order is 0"),
        ({"write_gate": partial(Gate, stretch=-0.1)}, "stretch is -0.1"),
    ],
)
def test_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(MemtxError, match=says):
        AssociativeMemory(DIM, **options)

"""The delta rule by chunks is the delta rule step by step: outputs, matrix and every gradient, documents and all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.ops.delta_rule import chunk_gated_delta_rule, naive_recurrent_gated_delta_rule

# float64: sums of some dozens of terms of order one, in another order; solving a system adds a digit.
EXACT: Any = {"atol": 1e-10, "rtol": 1e-9}


@dataclass(frozen=True)
class Problem:
    tensors: dict[str, Tensor]
    starts: Tensor
    erase: bool
    chunk: int

    def solve(self, how: Any, **options: Any) -> tuple[Tensor, Tensor]:
        names = ("q", "k", "v", "strength", "log_decay", "matrix")
        found: tuple[Tensor, Tensor] = how(
            *(self.tensors.get(name) for name in names), self.starts, delta_rule=self.erase, **options
        )
        return found


def made(seed: int, rows: int, length: int, density: float, decay: float | None) -> tuple[dict[str, Tensor], Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(rows, 2, *shape, dtype=torch.float64, generator=draw)

    q, k, v, matrix = randn(length, 3), randn(length, 3), randn(length, 4), randn(3, 4)
    k = k / k.norm(dim=-1, keepdim=True)
    # Strengths of exactly 0 and 2 among them, as stretched gates give.
    strength = torch.rand(rows, 2, length, dtype=torch.float64, generator=draw) * 2.8 - 0.4
    tensors = {"q": q, "k": k, "v": v, "strength": strength.clamp(0, 2), "matrix": matrix}
    if decay is not None:
        tensors["log_decay"] = -decay * torch.rand(rows, 2, length, dtype=torch.float64, generator=draw)
    return tensors, torch.rand(rows, length, generator=draw) < density


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    tensors, starts = made(
        draw(st.integers(0, 2**16)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from([0.0, 0.05, 0.3])),
        draw(st.sampled_from([None, 0.1, 50.0])),
    )
    return Problem(tensors, starts, draw(st.booleans()), draw(st.integers(1, 45)))


@given(problems())
def test_chunks_compute_what_steps_compute(problem: Problem) -> None:
    out, matrix = problem.solve(naive_recurrent_gated_delta_rule)
    found, last = problem.solve(chunk_gated_delta_rule, chunk_size=problem.chunk)
    torch.testing.assert_close(found, out, **EXACT)
    torch.testing.assert_close(last, matrix, **EXACT)


@given(problems())
def test_every_gradient_is_that_of_the_steps(problem: Problem) -> None:
    found = []
    leaves = {name: one.clone().requires_grad_() for name, one in problem.tensors.items()}
    own = Problem(leaves, problem.starts, problem.erase, problem.chunk)
    for how, options in (
        (naive_recurrent_gated_delta_rule, {}),
        (chunk_gated_delta_rule, {"chunk_size": problem.chunk}),
    ):
        out, matrix = own.solve(how, **options)
        # Weighed unequally, or signs would hide.
        loss = (out * out.detach().cos()).sum() + (matrix.sin() * matrix).sum()
        found.append(torch.autograd.grad(loss, list(leaves.values())))
    for name, one, other in zip(leaves, *found, strict=True):
        torch.testing.assert_close(other, one, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@given(problems(), st.lists(st.integers(0, 40), max_size=4))
def test_cutting_does_not_matter(problem: Problem, cuts: list[int]) -> None:
    length = problem.starts.shape[1]
    whole, last = problem.solve(chunk_gated_delta_rule)
    matrix, outputs, begin = problem.tensors["matrix"], [], 0
    for stop in sorted({*(cut for cut in cuts if 0 < cut < length), length}):
        tensors = {name: one[:, :, begin:stop] for name, one in problem.tensors.items()}
        part = Problem(tensors | {"matrix": matrix}, problem.starts[:, begin:stop], problem.erase, problem.chunk)
        out, matrix = part.solve(chunk_gated_delta_rule, chunk_size=problem.chunk)
        outputs.append(out)
        begin = stop
    torch.testing.assert_close(torch.cat(outputs, 2), whole, **EXACT)
    torch.testing.assert_close(matrix, last, **EXACT)


@given(problems())
def test_packed_documents_are_as_if_alone(problem: Problem) -> None:
    whole, last = problem.solve(chunk_gated_delta_rule, chunk_size=problem.chunk)
    for row in range(problem.starts.shape[0]):
        begins = sorted({0, *problem.starts[row].nonzero().flatten().tolist()})
        for begin, stop in zip(begins, [*begins[1:], problem.starts.shape[1]], strict=True):
            fresh = bool(problem.starts[row, begin])
            own = {name: one[row : row + 1, :, begin:stop] for name, one in problem.tensors.items()}
            matrix = problem.tensors["matrix"][row : row + 1]
            own["matrix"] = torch.zeros_like(matrix) if fresh else matrix
            alone = Problem(own, torch.zeros(1, stop - begin, dtype=torch.bool), problem.erase, 64)
            out, end = alone.solve(naive_recurrent_gated_delta_rule)
            torch.testing.assert_close(whole[row : row + 1, :, begin:stop], out, **EXACT)
        torch.testing.assert_close(last[row : row + 1], end, **EXACT)


def test_a_key_holds_its_newest_value() -> None:
    """Delta rule: written at full strength, a key is read as what was last put there; linear attention adds up."""
    tensors, starts = made(0, 1, 2, 0.0, None)
    key = tensors["k"][:, :, :1].expand(-1, -1, 2, -1)
    tensors |= {"q": key, "k": key, "strength": torch.ones(1, 2, 2).double()}
    first, second = tensors["v"].unbind(2)
    tensors["matrix"] = torch.zeros_like(tensors["matrix"])
    out, _ = Problem(tensors, starts, True, 64).solve(chunk_gated_delta_rule)
    torch.testing.assert_close(out[:, :, 1], second, **EXACT)
    out, _ = Problem(tensors, starts, False, 64).solve(chunk_gated_delta_rule)
    torch.testing.assert_close(out[:, :, 1], first + second, **EXACT)


@pytest.mark.parametrize("erase", [True, False])
def test_float32_stays_near_over_thousands_of_tokens(erase: bool) -> None:
    tensors, starts = made(1, 1, 3000, 0.001, 0.01)
    exact, _ = Problem(tensors, starts, erase, 64).solve(naive_recurrent_gated_delta_rule)
    rough, _ = Problem({name: one.float() for name, one in tensors.items()}, starts, erase, 64).solve(
        chunk_gated_delta_rule
    )
    # Each number is rounded to 6e-8 of its size some thousand times, with signs that differ.
    assert (rough - exact).abs().max() < 1e-5 * max(1.0, float(exact.abs().max()))


def test_autocast_does_not_round_it() -> None:
    tensors, starts = made(2, 1, 50, 0.05, 0.1)
    problem = Problem({name: one.float() for name, one in tensors.items()}, starts, True, 16)
    plain = problem.solve(chunk_gated_delta_rule)
    with torch.autocast("cpu", torch.bfloat16):
        cast = problem.solve(chunk_gated_delta_rule)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


def test_writes_of_strength_two_exchange_what_places_hold() -> None:
    """The matrix follows 2,000 exchanges of five elements, and reads who is where after each."""
    draw = torch.Generator().manual_seed(0)
    count, length = 5, 2000
    place = torch.eye(count, dtype=torch.float64)
    pairs = torch.stack([torch.randperm(count, generator=draw)[:2] for _ in range(length)])
    k = (place[pairs[:, 0]] - place[pairs[:, 1]]) / 2**0.5
    q = place[torch.randint(count, (length,), generator=draw)]
    who, expected = torch.arange(count), []
    for (one, other), asked in zip(pairs.tolist(), q.argmax(-1).tolist(), strict=True):
        who[[one, other]] = who[[other, one]]
        expected.append(int(who[asked]))
    starts = torch.zeros(1, length, dtype=torch.bool)
    strength = torch.full((1, 1, length), 2.0, dtype=torch.float64)
    out, _ = chunk_gated_delta_rule(
        q[None, None],
        k[None, None],
        torch.zeros(1, 1, length, count).double(),
        strength,
        None,
        place[None, None],
        starts,
    )
    assert out[0, 0].argmax(-1).tolist() == expected
    # Each is of length 1 but for rounding, which does not grow: an exchange keeps lengths.
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(1, 1, length).double(), **EXACT)

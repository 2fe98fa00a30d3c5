"""The chunked delta rule equals the recurrent one: outputs, state and every gradient, with documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.ops.delta_rule import chunk_gated_delta_rule, naive_recurrent_gated_delta_rule

# float64: sums of dozens of terms of order one in another order; solving a system costs another digit.
EXACT: Any = {"atol": 1e-10, "rtol": 1e-9}


@dataclass(frozen=True)
class Problem:
    tensors: dict[str, Tensor]
    document_starts: Tensor
    delta_rule: bool
    chunk_size: int

    def solve(self, function: Any, **options: Any) -> tuple[Tensor, Tensor]:
        names = ("q", "k", "v", "beta", "log_decay", "state")
        output: tuple[Tensor, Tensor] = function(
            *(self.tensors.get(name) for name in names), self.document_starts, delta_rule=self.delta_rule, **options
        )
        return output


def random_inputs(
    seed: int, batch_size: int, length: int, start_prob: float, max_decay: float | None, by_channel: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch_size, 2, *shape, dtype=torch.float64, generator=generator)

    q, k, v, state = randn(length, 3), randn(length, 3), randn(length, 4), randn(3, 4)
    k = k / k.norm(dim=-1, keepdim=True)
    # Includes strengths of exactly 0 and 2, as stretched gates produce.
    beta = torch.rand(batch_size, 2, length, dtype=torch.float64, generator=generator) * 2.8 - 0.4
    tensors = {"q": q, "k": k, "v": v, "beta": beta.clamp(0, 2), "state": state}
    if max_decay is not None:
        channels = (3,) if by_channel else ()
        decay = torch.rand(batch_size, 2, length, *channels, dtype=torch.float64, generator=generator)
        tensors["log_decay"] = -max_decay * decay
    return tensors, torch.rand(batch_size, length, generator=generator) < start_prob


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    tensors, document_starts = random_inputs(
        draw(st.integers(0, 2**16)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from([0.0, 0.05, 0.3])),
        draw(st.sampled_from([None, 0.1, 50.0])),
        draw(st.booleans()),
    )
    return Problem(tensors, document_starts, draw(st.booleans()), draw(st.integers(1, 45)))


@given(problems())
def test_chunked_outputs_and_state_equal_the_recurrent_ones(problem: Problem) -> None:
    expected, expected_state = problem.solve(naive_recurrent_gated_delta_rule)
    out, state = problem.solve(chunk_gated_delta_rule, chunk_size=problem.chunk_size)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(state, expected_state, **EXACT)


@given(problems())
def test_every_gradient_equals_the_recurrent_one(problem: Problem) -> None:
    grads = []
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in problem.tensors.items()}
    leaf_problem = Problem(leaves, problem.document_starts, problem.delta_rule, problem.chunk_size)
    for function, options in (
        (naive_recurrent_gated_delta_rule, {}),
        (chunk_gated_delta_rule, {"chunk_size": problem.chunk_size}),
    ):
        out, state = leaf_problem.solve(function, **options)
        # Unequal weights, so that sign errors do not cancel.
        loss = (out * out.detach().cos()).sum() + (state.sin() * state).sum()
        grads.append(torch.autograd.grad(loss, list(leaves.values())))
    for name, expected, grad in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(grad, expected, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@given(problems(), st.lists(st.integers(0, 40), max_size=4))
def test_result_does_not_depend_on_the_segmentation(problem: Problem, splits: list[int]) -> None:
    length = problem.document_starts.shape[1]
    expected, expected_state = problem.solve(chunk_gated_delta_rule)
    state, outputs, start = problem.tensors["state"], [], 0
    for stop in sorted({*(split for split in splits if 0 < split < length), length}):
        tensors = {name: tensor[:, :, start:stop] for name, tensor in problem.tensors.items()}
        segment = Problem(
            tensors | {"state": state}, problem.document_starts[:, start:stop], problem.delta_rule, problem.chunk_size
        )
        out, state = segment.solve(chunk_gated_delta_rule, chunk_size=problem.chunk_size)
        outputs.append(out)
        start = stop
    torch.testing.assert_close(torch.cat(outputs, 2), expected, **EXACT)
    torch.testing.assert_close(state, expected_state, **EXACT)


@given(problems())
def test_packed_documents_equal_separate_ones(problem: Problem) -> None:
    out, state = problem.solve(chunk_gated_delta_rule, chunk_size=problem.chunk_size)
    for index in range(problem.document_starts.shape[0]):
        bounds = sorted({0, *problem.document_starts[index].nonzero().flatten().tolist()})
        for start, stop in zip(bounds, [*bounds[1:], problem.document_starts.shape[1]], strict=True):
            is_new = bool(problem.document_starts[index, start])
            tensors = {name: tensor[index : index + 1, :, start:stop] for name, tensor in problem.tensors.items()}
            past_state = problem.tensors["state"][index : index + 1]
            tensors["state"] = torch.zeros_like(past_state) if is_new else past_state
            document = Problem(tensors, torch.zeros(1, stop - start, dtype=torch.bool), problem.delta_rule, 64)
            expected, expected_state = document.solve(naive_recurrent_gated_delta_rule)
            torch.testing.assert_close(out[index : index + 1, :, start:stop], expected, **EXACT)
        torch.testing.assert_close(state[index : index + 1], expected_state, **EXACT)


def test_delta_rule_overwrites_and_linear_attention_adds() -> None:
    """With strength 1, a key returns its newest value; linear attention returns the sum."""
    tensors, document_starts = random_inputs(0, 1, 2, 0.0, None)
    key = tensors["k"][:, :, :1].expand(-1, -1, 2, -1)
    tensors |= {"q": key, "k": key, "beta": torch.ones(1, 2, 2).double()}
    first, second = tensors["v"].unbind(2)
    tensors["state"] = torch.zeros_like(tensors["state"])
    out, _ = Problem(tensors, document_starts, True, 64).solve(chunk_gated_delta_rule)
    torch.testing.assert_close(out[:, :, 1], second, **EXACT)
    out, _ = Problem(tensors, document_starts, False, 64).solve(chunk_gated_delta_rule)
    torch.testing.assert_close(out[:, :, 1], first + second, **EXACT)


@pytest.mark.parametrize("delta_rule", [True, False])
def test_float32_stays_close_over_thousands_of_tokens(delta_rule: bool) -> None:
    tensors, document_starts = random_inputs(1, 1, 3000, 0.001, 0.01)
    expected, _ = Problem(tensors, document_starts, delta_rule, 64).solve(naive_recurrent_gated_delta_rule)
    single = {name: tensor.float() for name, tensor in tensors.items()}
    out, _ = Problem(single, document_starts, delta_rule, 64).solve(chunk_gated_delta_rule)
    # Each number is rounded to 6e-8 of its size a few thousand times, with varying signs.
    assert (out - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


def test_autocast_does_not_apply() -> None:
    tensors, document_starts = random_inputs(2, 1, 50, 0.05, 0.1)
    problem = Problem({name: tensor.float() for name, tensor in tensors.items()}, document_starts, True, 16)
    expected, expected_state = problem.solve(chunk_gated_delta_rule)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = problem.solve(chunk_gated_delta_rule)
    assert torch.equal(out, expected)
    assert torch.equal(state, expected_state)


def test_writes_of_strength_two_track_swaps() -> None:
    """The state tracks 2,000 swaps of five elements; one element's slot is read after each."""
    generator = torch.Generator().manual_seed(0)
    count, length = 5, 2000
    slots = torch.eye(count, dtype=torch.float64)
    pairs = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(length)])
    k = (slots[pairs[:, 0]] - slots[pairs[:, 1]]) / 2**0.5
    q = slots[torch.randint(count, (length,), generator=generator)]
    permutation, expected = torch.arange(count), []
    for (first, second), query in zip(pairs.tolist(), q.argmax(-1).tolist(), strict=True):
        permutation[[first, second]] = permutation[[second, first]]
        expected.append(int(permutation[query]))
    document_starts = torch.zeros(1, length, dtype=torch.bool)
    beta = torch.full((1, 1, length), 2.0, dtype=torch.float64)
    v = torch.zeros(1, 1, length, count).double()
    out, _ = chunk_gated_delta_rule(q[None, None], k[None, None], v, beta, None, slots[None, None], document_starts)
    assert out[0, 0].argmax(-1).tolist() == expected
    # Norms are 1 up to rounding, which does not grow: a swap preserves norms.
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(1, 1, length).double(), **EXACT)

"""Titans against the paper's equations, one token at a time with gradients by autograd, and their guards."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.layers.attention import MemoryAttention
from memtx.layers.positions.base import NoPositions
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.titans import PersistentMemory, TitansContextMemory, TitansMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.segment import Segment

# Sums of a few dozen float64 terms in another order, through as many steps as there are tokens.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-9)

DIM, HEADS = 6, 2
WIDTH = DIM // HEADS


def perturb(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


class PaperMemory:
    """One stream's memory as in section 3.1, with the chunk's gradients at its first weights (section 3.2)."""

    def __init__(self, memory: TitansMemory) -> None:
        self.memory, self.position = memory, 0
        self.last = torch.zeros(DIM, dtype=torch.float64)
        self.weights = [[matrix[head].detach() for matrix in memory.network] for head in range(HEADS)]
        self.momentum = [[torch.zeros_like(matrix) for matrix in weights] for weights in self.weights]
        self.start = self.weights

    @staticmethod
    def network(weights: Any, x: Tensor) -> Tensor:
        for matrix in weights[:-1]:
            x = F.silu(x @ matrix)
        return x @ weights[-1]

    def query(self, x: Tensor, head: int) -> Tensor:
        return F.normalize(F.silu(self.memory.query(x)).view(HEADS, WIDTH)[head], dim=0)

    def learn(self, x: Tensor) -> Tensor:
        """Learn a token ``(DIM,)`` and return the read at the new weights."""
        memory, shifted = self.memory, x
        if memory.token_shift is not None:
            shifted = x + memory.token_shift.mix_ratio * (self.last - x)
        if self.position % memory.interval == 0:
            self.start = [list(weights) for weights in self.weights]
        k, v = (F.silu(projection(shifted)).view(HEADS, WIDTH) for projection in (memory.key, memory.value))
        theta = memory.max_step * memory.step_gate(shifted)
        eta, alpha = torch.sigmoid(memory.momentum_gate(shifted)), memory.forget_gate(shifted)
        reads = []
        for head in range(HEADS):
            start = [matrix.detach().requires_grad_() for matrix in self.start[head]]
            with torch.enable_grad():
                expected = self.network(start, F.normalize(k[head].detach(), dim=0))
                gradient = torch.autograd.grad((expected - v[head].detach()).square().sum(), start)
            norm = sum(part.square().sum() for part in gradient) ** 0.5
            gradient = [part * min(1.0, memory.max_gradient_norm / norm) for part in gradient]
            self.momentum[head] = [
                eta[head] * s - theta[head] * part for s, part in zip(self.momentum[head], gradient, strict=True)
            ]
            self.weights[head] = [
                (1 - alpha[head]) * matrix + s
                for matrix, s in zip(self.weights[head], self.momentum[head], strict=True)
            ]
            reads.append(self.network(self.weights[head], self.query(shifted, head)))
        self.position, self.last = self.position + 1, x
        return torch.cat(reads)

    def retrieve(self, x: Tensor) -> Tensor:
        """Return what the weights of the interval's start read for a token ``(DIM,)``."""
        start = self.weights if self.position % self.memory.interval == 0 else self.start
        return torch.cat([self.network(start[head], self.query(x, head)) for head in range(HEADS)])

    def gate(self, reads: Tensor) -> Tensor:
        normalized = reads / (reads.square().mean() + torch.finfo(reads.dtype).eps) ** 0.5
        return torch.sigmoid(normalized * self.memory.read_norm.weight)


@given(
    seed=st.integers(0, 999),
    depth=st.integers(1, 3),
    interval=st.integers(1, 6),
    n=st.integers(1, 20),
    start=st.integers(1, 19),
    max_norm=st.sampled_from([0.3, 100.0]),
    token_shift=st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_gate_matches_the_equations(
    seed: int, depth: int, interval: int, n: int, start: int, max_norm: float, token_shift: bool
) -> None:
    torch.manual_seed(seed)
    memory = TitansMemory(
        DIM, HEADS, depth, interval=interval, max_gradient_norm=max_norm, max_step=0.5, token_shift=token_shift
    ).double()
    perturb(memory)
    x, attended = torch.randn(1, n, DIM, dtype=torch.float64), torch.randn(1, n, DIM, dtype=torch.float64)
    segment = Segment.from_document_starts(torch.zeros(1, dtype=torch.int64), n, torch.arange(n)[None] == start)
    with torch.no_grad():
        view = memory.read(memory.init_state(1, like=x), x, segment, None)  # type: ignore[arg-type]
        readout = memory.readout(view, x.view(1, n, HEADS, WIDTH))
        # As the layer mixes them.
        by_head = attended.view(1, n, HEADS, WIDTH).transpose(1, 2)
        outputs = (by_head + readout.gate * (readout.out - by_head)).transpose(1, 2).flatten(2)
        for position in range(n):
            if position in (0, start):
                paper = PaperMemory(memory)
            close(outputs[0, position], attended[0, position] * paper.gate(paper.learn(x[0, position])))
        close(torch.stack([weights[-1] for weights in paper.weights]), view.next_state.weights[-1][0])


@given(seed=st.integers(0, 99), interval=st.integers(1, 5), n=st.integers(1, 14), window=st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_context_matches_the_equations(seed: int, interval: int, n: int, window: int) -> None:
    """The layer, whose calls end where intervals do, against attention over [reads | window] token by token."""
    torch.manual_seed(seed)
    memory = TitansContextMemory(DIM, HEADS, interval=interval, max_step=0.5).double()
    exact, persistent = RecurrentMemory(DIM, window), PersistentMemory(DIM, 2)
    layer = MemoryAttention(DIM, HEADS, HEADS, exact, NoPositions(HEADS, WIDTH), extra_memories=[persistent, memory])
    perturb(layer.double())
    x, expected = torch.randn(1, n, DIM, dtype=torch.float64), []
    with torch.no_grad():
        paper, retrieved = PaperMemory(memory), []
        for position in range(n):
            retrieved = retrieved if position % interval else []
            retrieved.append(paper.retrieve(x[0, position]))
            # [p || h || S], equation 22, with a sliding window in place of the segment S.
            context = torch.stack([*persistent.tokens, *retrieved, *x[0, max(0, position - window + 1) : position + 1]])
            q, (k, v) = layer.query(x[0, position]), layer.key_value(context).chunk(2, dim=-1)
            heads = []
            for head in range(HEADS):
                part = slice(head * WIDTH, (head + 1) * WIDTH)
                heads.append(torch.softmax(k[:, part] @ q[part] * WIDTH**-0.5, 0) @ v[:, part])
            y = layer.out(torch.cat(heads))
            expected.append(y * paper.gate(paper.learn(y)))
        state, outputs, position = tuple(m.init_state(1, like=x) for m in layer.memories), [], 0
        while position < n:
            stop = min(n, (position // interval + 1) * interval)
            segment = Segment.from_document_starts(torch.tensor([position]), stop - position)
            out, state, _ = layer(x[:, position:stop], state, segment)
            outputs, position = [*outputs, out], stop
    close(torch.cat(outputs, dim=1)[0], torch.stack(expected))


def test_a_pair_written_is_read_and_closed_gates_change_nothing() -> None:
    torch.manual_seed(0)
    memory = TitansMemory(
        DIM, HEADS, depth=1, interval=1, max_step=0.5, max_gradient_norm=1e3, token_shift=False
    ).double()
    with torch.no_grad():
        for gate, bias in (
            (memory.step_gate.proj, 9.0),
            (memory.forget_gate.proj, -40.0),
            (memory.momentum_gate, -40.0),
        ):
            gate.weight.zero_()
            gate.bias.fill_(bias)
        x = torch.randn(1, 1, DIM, dtype=torch.float64)
        segment = Segment.from_document_starts(torch.zeros(1, dtype=torch.int64), 1)
        memory.query.weight.copy_(memory.key.weight)
        view = memory.read(memory.init_state(1, like=x), x, segment, None)  # type: ignore[arg-type]
        # W - 0.5 * 2 k (k W - v) of a unit key reads v.
        close(view.context, F.silu(memory.value(x)))
        memory.step_gate.proj.bias.fill_(-9.0)
        later = Segment.from_document_starts(torch.ones(1, dtype=torch.int64), 1)
        closed = memory.read(view.next_state, x, later, None).next_state  # type: ignore[arg-type]
    close(closed.weights[0], view.next_state.weights[0])


@pytest.mark.parametrize("depth", [1, 2])
def test_equal_tokens_with_full_steps_stay_bounded(depth: int) -> None:
    """Without the bound of gradients, the steps of an interval overshoot and the weights overflow."""
    torch.manual_seed(0)
    norms = {}
    for max_norm in (1.0, 1e15):
        memory = TitansMemory(DIM, HEADS, depth, interval=16, max_gradient_norm=max_norm)
        for gate, bias in ((memory.step_gate.proj, 9.0), (memory.forget_gate.proj, -1.0), (memory.momentum_gate, 2.0)):
            nn.init.zeros_(gate.weight)
            nn.init.constant_(gate.bias, bias)
        x = torch.randn(1, 1, DIM).expand(1, 400, DIM).contiguous()
        segment = Segment.from_document_starts(torch.zeros(1, dtype=torch.int64), 400)
        with torch.no_grad():
            weights = memory.read(memory.init_state(1, like=x), x, segment, None).next_state.weights  # type: ignore[arg-type]
        norms[max_norm] = max(float(matrix.abs().max()) for matrix in weights)
    assert norms[1.0] < 100
    assert not norms[1e15] < 1e6


def test_every_parameter_learns() -> None:
    for memory in (TitansMemory, TitansContextMemory):
        torch.manual_seed(0)
        stack = [partial(RecurrentMemory, window=4), PersistentMemory, partial(memory, heads=2, interval=4)]
        model = MemoryTransformer(11, 8, 1, 2, memories=[stack])
        tokens = torch.randint(11, (2, 20))
        out = model(tokens, labels=tokens, document_starts=torch.rand(2, 20) < 0.2)
        out.loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_padding_does_not_matter_to_persistent_tokens() -> None:
    torch.manual_seed(0)
    stack = [partial(RecurrentMemory, window=4), PersistentMemory]
    model = MemoryTransformer(11, 8, 1, 2, memories=[stack]).double().eval()
    tokens = torch.randint(11, (1, 6))
    padded = model(tokens, valid_length=torch.tensor([4])).logits[:, :4]
    close(padded, model(tokens[:, :4]).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, r"heads \(4\)"),
        ({"depth": 0}, "depth is 0"),
        ({"interval": 0}, "interval is 0"),
        ({"max_step": 0.0}, "max_step is 0"),
        ({"max_gradient_norm": -1.0}, "max_gradient_norm is -1"),
    ],
)
def test_rejects_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        TitansMemory(DIM, **({"heads": HEADS} | options))


def test_a_model_given_the_memory_is_unchanged_at_first() -> None:
    torch.manual_seed(0)
    model = MemoryTransformer(11, 8, 2, 2, memories=[partial(RecurrentMemory, window=4)]).double().eval()
    tokens = torch.randint(11, (2, 12))
    for memory in (TitansMemory, TitansContextMemory):
        adapted = model.with_memory([PersistentMemory, partial(memory, heads=2, interval=4)])
        close(adapted(tokens).logits, model(tokens).logits)

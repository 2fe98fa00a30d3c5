"""RMT and ARMT against transcriptions of their papers' equations, and where they may be used."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from memtx import ARMTMemory, FeedForward, MemoryTransformer, MemtxError, RecurrentMemory, RMTMemory, TokenMemory
from memtx.layers.positions.absolute import LearnedPositions
from memtx.layers.positions.base import NoPositions

EXACT = 1e-10  # float64: sums in another order, through two layers and three segments.
TOKENS = torch.randint(0, 11, (1, 17), generator=torch.Generator().manual_seed(1))
INTERVAL, NUM_TOKENS = 5, 3


def small(memory: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    memories = [partial(memory, num_tokens=NUM_TOKENS, interval=INTERVAL)]
    model = MemoryTransformer(11, dim=8, depth=2, heads=2, memories=memories, feed_forward=FeedForward, **options)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def layer(block: Any, x: Tensor, visible: Tensor) -> Tensor:
    """Return a layer's output for a whole sequence; ``visible`` is (queries, keys)."""
    attention, normed = block.attention, block.attention_norm(x)
    q, k, v = (attention.project(normed, part, frozen=True) for part in ("query", "key", "value"))
    index = torch.arange(x.shape[1], dtype=torch.float64)[None]
    q, k = (attention.positions.apply_absolute(part, index, lambda _, make: make()) for part in (q, k))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    x = x + attention.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
    out: Tensor = x + block.feed_forward(block.feed_forward_norm(x))
    return out


def mask(length: int, num_read: int, num_write: int, bidirectional: bool) -> Tensor:
    """Return causal visibility, in both directions within the groups of memory tokens if ``bidirectional``."""
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if bidirectional:
        visible[:num_read, :num_read] = True
        visible[length - num_write :, length - num_write :] = num_write > 0
    return visible


def embed(model: Any, x: Tensor, index: Tensor) -> Tensor:
    return x if model.absolute_positions is None else x + model.absolute_positions(index)[None]


def rmt(model: Any, tokens: Tensor, bidirectional: bool) -> Tensor:
    """Return the logits by Bulatov et al. 2022, section 3.2: H' = Transformer([H_mem; H; H_mem]), H_mem = H'_write."""
    memory, logits = model.write_tokens[None], []
    for segment in tokens.split(INTERVAL, dim=1):
        # An unfinished segment has no write tokens yet, which its tokens would not see anyway.
        write = memory if segment.shape[1] == INTERVAL else memory[:, :0]
        x = torch.cat([memory, model.embedding(segment), write], dim=1)
        x = embed(model, x, torch.arange(x.shape[1]))
        visible = mask(x.shape[1], NUM_TOKENS, write.shape[1], bidirectional)
        for block in model.blocks:
            x = layer(block, x, visible)
        x = model.norm(x)
        logits.append(model.head(x[:, NUM_TOKENS : NUM_TOKENS + segment.shape[1]]))
        memory = x[:, -NUM_TOKENS:]
    return torch.cat(logits, dim=1)


def dpfp(x: Tensor, order: int) -> Tensor:
    """Schlag et al. 2021, equation 37: phi_(i nu)(k) = r_i r_(i + nu), with r = relu([k; -k])."""
    rectified = torch.cat([x, -x], dim=-1).relu()
    width = rectified.shape[-1]
    columns = [
        rectified[..., i] * rectified[..., (i - shift) % width] for shift in range(1, order + 1) for i in range(width)
    ]
    return torch.stack(columns, dim=-1)


def armt(model: Any, tokens: Tensor, bidirectional: bool) -> Tensor:
    """Return the logits of one document by Rodkin et al. 2024, section 3, memory token by memory token."""
    memories = [block.attention.memory for block in model.blocks]
    associations = [torch.zeros(2 * memory.order * memory.key_dim, 8).double() for memory in memories]
    normalizers = [torch.zeros(2 * memory.order * memory.key_dim).double() for memory in memories]
    logits = []
    for segment in tokens.split(INTERVAL, dim=1):
        write = model.write_tokens[None] if segment.shape[1] == INTERVAL else model.write_tokens[None, :0]
        x = torch.cat([model.embedding(segment), write], dim=1)
        x = embed(model, x, torch.arange(x.shape[1]))
        visible = mask(x.shape[1], 0, write.shape[1], bidirectional)
        for number, (block, memory) in enumerate(zip(model.blocks, memories, strict=True)):
            A, z = associations[number], normalizers[number]
            q = dpfp(memory.query(x[0]), memory.order)
            x = x + torch.stack([(phi @ A) / (phi @ z + memory.eps) for phi in q])[None]
            x = layer(block, x, visible)
            for m in x[0, segment.shape[1] :]:
                phi, v = dpfp(memory.key(m), memory.order), memory.value(m)
                beta = torch.sigmoid(memory.write_gate(m))
                previous = (phi @ A) / (phi @ z + memory.eps)
                gamma = (1 - (phi @ z) / (phi @ phi + memory.eps)).clamp(0, 1)
                associations[number] = associations[number] + beta * torch.outer(phi, v - previous)
                normalizers[number] = normalizers[number] + gamma * phi
        logits.append(model.head(model.norm(x[:, : segment.shape[1]])))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"positions": NoPositions, "absolute_positions": partial(LearnedPositions, num_positions=11)}]
)
def test_rmt_and_armt_match_their_papers(bidirectional: bool, options: dict[str, Any]) -> None:
    for memory, formula in ((RMTMemory, rmt), (partial(ARMTMemory, key_dim=3, order=2), armt)):
        model = small(partial(memory, bidirectional=bidirectional), **options)
        with torch.no_grad():
            assert (model(TOKENS).logits - formula(model, TOKENS, bidirectional)).abs().max() < EXACT


def test_groups_of_memory_tokens_see_both_directions_only_if_asked() -> None:
    one_way, both_ways = (small(partial(RMTMemory, bidirectional=flag))(TOKENS).logits for flag in (False, True))
    assert not torch.allclose(one_way, both_ways)


def test_armt_changes_nothing_before_it_is_trained() -> None:
    """Its values begin at 0, so that a pretrained model reads every segment as it did."""
    torch.manual_seed(0)
    memories = [partial(ARMTMemory, num_tokens=NUM_TOKENS, interval=INTERVAL)]
    model = MemoryTransformer(11, dim=8, depth=2, heads=2, memories=memories).eval()
    second, alone = model(TOKENS).logits[:, INTERVAL : 2 * INTERVAL], model(TOKENS[:, INTERVAL : 2 * INTERVAL]).logits
    torch.testing.assert_close(second, alone, rtol=0, atol=1e-6)


def test_rmt_is_added_to_a_trained_model() -> None:
    torch.manual_seed(0)
    exact = partial(RecurrentMemory, window=11, trained_length=11)
    model = MemoryTransformer(11, dim=8, depth=2, heads=2, memories=[exact], feed_forward=FeedForward).double().eval()
    memory = partial(RMTMemory, num_tokens=NUM_TOKENS, interval=INTERVAL)
    with torch.no_grad():
        adapted = model.with_memory([memory], num_sinks=0)
        assert (adapted(TOKENS).logits - rmt(adapted, TOKENS, False)).abs().max() < EXACT
    with pytest.raises(MemtxError, match="all layers") as error:
        model.with_memory([memory])
    assert "num_sinks=0" in str(error.value.hint)


@pytest.mark.parametrize("memory", [RMTMemory, partial(ARMTMemory, key_dim=3)])
def test_gradients_flow_from_last_segment_to_first(memory: Any) -> None:
    model = small(memory).train()
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda _, __, out: embedded.append(out))
    (grad,) = torch.autograd.grad(model(TOKENS).logits[:, -1].sum(), embedded)
    assert float(grad[:, 0].abs().min()) > 0
    model(TOKENS[:, :2], labels=TOKENS[:, :2]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "DDP waits for all gradients"


def test_layers_must_have_one_equal_memory() -> None:
    rmt = partial(RMTMemory, num_tokens=2, interval=4)
    other, tokens = partial(rmt, num_tokens=3), partial(TokenMemory, num_tokens=2, interval=4)
    for memories in ([rmt, RecurrentMemory], [rmt, other], [[rmt, tokens], [rmt, tokens]], [RecurrentMemory, rmt]):
        with pytest.raises(MemtxError, match="all layers"):
            MemoryTransformer(11, dim=8, depth=2, heads=2, memories=memories)
    options = ({"num_tokens": 0}, "num_tokens is 0"), ({"interval": 0}, "interval is 0"), ({"eps": 0.0}, "eps")
    for wrong, message in options:
        with pytest.raises(MemtxError, match=message):
            ARMTMemory(8, **wrong)

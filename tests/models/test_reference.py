"""The whole model compared with a plain float64 one: one position at a time, one document."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from memtx import Alibi, CompressedMemory, FeedForward, MemoryTransformer, RecurrentMemory, SwiGLU
from memtx.layers.positions.rotary import Rotary
from memtx.memory.compression import MaxPooling, MeanPooling, StridedConvolution


def entries_seen(
    h: Tensor, t: int, window: int, rate: int, length: int, compress: object
) -> tuple[Tensor, list[float]]:
    """Return the entries of layer inputs h that position t sees, oldest first, and their positions."""
    edge = rate * max(0, (t - window + 1) // rate)
    blocks = range(max(0, edge // rate - length), edge // rate)
    entries = [compress(h[None, None, b * rate : (b + 1) * rate])[0, 0] for b in blocks]  # type: ignore[operator]
    at = [b * rate + (rate - 1) / 2 for b in blocks]
    return torch.stack([*entries, *h[edge : t + 1]]), [*at, *range(edge, t + 1)]


def rotate(x: Tensor, at: Tensor, base: float = 10000.0) -> Tensor:
    """Rotate ``(entries, heads, head_dim)`` by their positions, pair by pair."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = (at * base ** (-i / half))[:, None]
        a, b = x[..., 2 * i], x[..., 2 * i + 1]
        out[..., 2 * i] = a * angle.cos() - b * angle.sin()
        out[..., 2 * i + 1] = a * angle.sin() + b * angle.cos()
    return out


def plain(model: MemoryTransformer, tokens: Tensor, window: int, rate: int, length: int) -> Tensor:
    """Return the logits of one document ``(n,)``, computed in loops."""
    x = model.embedding.weight[tokens]
    for block in model._layers():
        h, attention = block.attention_norm(x), block.attention
        compress = getattr(attention.memory, "compression", None)
        heads, kv_heads, size = attention.heads, attention.kv_heads, attention.head_dim
        outputs = []
        for t in range(len(tokens)):
            e, at = entries_seen(h, t, window, rate, length, compress)
            q = attention.query(h[t]).view(1, heads, size)
            k, v = attention.key_value(e).view(len(e), 2, kv_heads, size).unbind(1)
            key_position = torch.tensor(at, dtype=torch.float64)
            if isinstance(attention.positions, Rotary):
                q, k = rotate(q, torch.tensor([float(t)], dtype=torch.float64)), rotate(k, key_position)
            out = []
            edge, near = rate * max(0, (t - window + 1) // rate), getattr(attention.memory, "near_window", None)
            is_far = (key_position < edge) | (key_position <= t - (near or math.inf))
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                score = k[:, kv_head] @ q[0, head] / size**0.5
                if attention.entry_bias is not None:
                    score = score + attention.entry_bias[head] * is_far
                if isinstance(attention.positions, Alibi):
                    score = score - 2.0 ** (-8.0 * (head + 1) / heads) * (t - key_position)
                out.append(torch.softmax(score, 0) @ v[:, kv_head])
            outputs.append(attention.out(torch.cat(out)))
        x = x + torch.stack(outputs)
        h = block.feed_forward_norm(x)
        if isinstance(block.feed_forward, SwiGLU):
            gate, up = block.feed_forward.gate_up(h).chunk(2, -1)
            x = x + block.feed_forward.out(gate * torch.sigmoid(gate) * up)
        else:
            x = x + block.feed_forward.out(F.gelu(block.feed_forward.up(h)))
    return model.norm(x) @ model.head.weight.T


@pytest.mark.parametrize("compression", [MeanPooling, MaxPooling, StridedConvolution])
@given(data=st.data())
def test_logits_and_gradients_equal_the_plain_model(compression: type, data: st.DataObject) -> None:
    window, rate, length = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    model = MemoryTransformer(
        7, dim=8, depth=2, heads=4, kv_heads=data.draw(st.sampled_from([1, 2, 4])),
        memories=[
            partial(
                CompressedMemory, window=window, compression_rate=rate, num_entries=length, compression=compression,
                entry_bias=data.draw(st.sampled_from([None, -1.0])),
            )
        ],
        norm=data.draw(st.sampled_from([nn.RMSNorm, nn.LayerNorm])),
        feed_forward=data.draw(st.sampled_from([SwiGLU, FeedForward])),
        positions=data.draw(st.sampled_from([Rotary, Alibi])),
        tie_embeddings=data.draw(st.booleans()),
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    tokens = torch.randint(0, 7, (data.draw(st.integers(2, 24)),))
    expected_loss = F.cross_entropy(plain(model, tokens[:-1], window, rate, length), tokens[1:])
    expected_grads = torch.autograd.grad(expected_loss, list(model.parameters()), allow_unused=True)
    out = model(tokens[None, :-1], labels=tokens[None, 1:])
    grads = torch.autograd.grad(out.loss, list(model.parameters()))
    assert abs(out.loss - expected_loss) < 1e-10  # float64, sums in another order
    for expected, grad in zip(expected_grads, grads, strict=True):
        # Without compression, the plain model has no gradient and ours is zero.
        assert ((expected if expected is not None else 0.0) - grad).abs().max() < 1e-9


@given(data=st.data())
def test_a_bias_beyond_the_near_window_equals_the_plain_model(data: st.DataObject) -> None:
    window = data.draw(st.integers(2, 9))
    near_window = data.draw(st.integers(1, window - 1))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    memory = partial(RecurrentMemory, window=window, near_window=near_window, entry_bias=0.0)
    positions = data.draw(st.sampled_from([Rotary, Alibi]))
    model = MemoryTransformer(7, dim=8, depth=2, heads=2, memories=[memory], positions=positions).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    tokens = torch.randint(0, 7, (20,))
    expected_loss = F.cross_entropy(plain(model, tokens[:-1], window, 1, 0), tokens[1:])
    expected_grads = torch.autograd.grad(expected_loss, list(model.parameters()))
    grads = torch.autograd.grad(model(tokens[None, :-1], labels=tokens[None, 1:]).loss, list(model.parameters()))
    for expected, grad in zip(expected_grads, grads, strict=True):
        assert (expected - grad).abs().max() < 1e-9


def test_full_window_equals_plain_causal_transformer() -> None:
    torch.manual_seed(0)
    model = MemoryTransformer(7, dim=8, depth=2, heads=2, memories=[partial(RecurrentMemory, window=64)]).double()
    tokens = torch.randint(0, 7, (30,))
    assert (plain(model, tokens, 64, 1, 0) - model(tokens[None]).logits[0]).abs().max() < 1e-10

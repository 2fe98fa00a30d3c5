"""Memformer against a transcription of the paper's equations, and what its state promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memtx.errors import MemtxError
from memtx.models.memformer import Memformer, SlotAttention
from memtx.state import MemoryState
from memtx.training.memformer import MemformerModule
from memtx.training.tbptt import unroll


def model(**options: Any) -> Memformer:
    torch.manual_seed(0)
    memformer = Memformer(
        20, dim=8, encoder_depth=2, decoder_depth=2, heads=2, num_slots=3, segment_length=5, **options
    )
    for parameter in memformer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)  # so wide that a wrong term shows
    return memformer.double().eval()


def stream(length: int = 20) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 20, (2, length), generator=torch.Generator().manual_seed(1))
    document_starts = torch.zeros(2, length, dtype=torch.bool)
    document_starts[1, 7] = True
    return tokens, document_starts


def test_slots_are_written_by_the_equations_of_the_paper() -> None:
    """Memory slot attention, equations 6 to 10, and biased memory normalization, head by head and slot by slot."""
    torch.manual_seed(0)
    layer = SlotAttention(8, 3, heads=2, temperature=0.5).double()
    slots, x = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(1, 4, 8, dtype=torch.float64)
    is_token = torch.tensor([[True, True, True, False]])
    actual = layer(slots, x, is_token)
    for slot in range(3):
        parts = []
        for head in (slice(0, 4), slice(4, 8)):
            q = (layer.query.weight @ slots[0, slot])[head]
            own_key = (layer.key.weight @ slots[0, slot])[head]
            keys = [own_key, *((layer.key.weight @ x[0, token])[head] for token in range(3))]
            values = [slots[0, slot][head], *((layer.value.weight @ x[0, token])[head] for token in range(3))]
            scores = torch.stack([(q @ key) / 4**0.5 / 0.5 for key in keys])
            parts.append(scores.softmax(0) @ torch.stack(values))
        biased = torch.cat(parts) + layer.bias[slot]
        torch.testing.assert_close(actual[0, slot], biased / biased.norm(), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.initial_slots(), layer.bias / layer.bias.norm(dim=-1, keepdim=True))


def attend(part: Any, x: Tensor, source: Tensor, *, causal: bool = False) -> Tensor:
    """Transcribe multi-head attention of x ``(n, dim)`` to the source ``(m, dim)``."""
    q, k, v = part.query(x), part.key(source), part.value(source)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[:, head] @ k[:, head].T / 4**0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, head])
    return part.out(torch.cat(heads, dim=-1))


def run(blocks: Any, x: Tensor, source: Tensor | None, *, causal: bool) -> Tensor:
    for block in blocks:
        x = block.attention_norm(x + attend(block.attention, x, x, causal=causal))
        read = block.cross_attention.out.bias if source is None else attend(block.cross_attention, x, source)
        x = block.cross_attention_norm(x + read)
        x = block.feed_forward_norm(x + block.feed_forward(x))
    return x


def test_segments_are_predicted_from_the_encoder_and_the_slots() -> None:
    """Sections 3.1 to 3.4: the encoder reads s_t and M_(t-1), writes M_t, and the decoder predicts s_(t+1) from it."""
    memformer, (tokens, _) = model(), stream()
    actual = memformer(tokens).logits
    for row in range(2):
        slots, encoded = memformer.slot_attention.initial_slots(), None
        for start in range(0, 20, 5):
            embedded = memformer.embedding(tokens[row, start : start + 5])
            x = run(memformer.decoder, embedded + memformer.decoder_positions.weight, encoded, causal=True)
            torch.testing.assert_close(actual[row, start : start + 5], memformer.head(x), atol=1e-10, rtol=0)
            encoded = run(memformer.encoder, embedded + memformer.encoder_positions.weight, slots, causal=False)
            everything = torch.ones(1, 5, dtype=torch.bool)
            slots = memformer.slot_attention(slots[None], encoded[None], everything)[0]


def test_replayed_gradients_are_those_of_back_propagation() -> None:
    memformer, (tokens, document_starts) = model(), stream()
    gradients = []
    for replay in (False, True):
        memformer.zero_grad()
        state = memformer.init_state(2)
        arguments = (memformer, tokens, tokens.roll(-1, 1), document_starts, state)
        unroll(*arguments, segment_length=5, replay=replay).loss.backward()
        gradients.append({name: weight.grad for name, weight in memformer.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name  # the slots' too, from the third segment on
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=0)


def test_calls_may_end_where_segments_do() -> None:
    memformer, (tokens, document_starts) = model(), stream()
    expected, state, start = memformer(tokens, document_starts=document_starts), None, 0
    parts = []
    for length in (5, 10, 5):
        part = slice(start, start + length)
        out = memformer(tokens[:, part], state, document_starts=document_starts[:, part])
        state, start = out.state, start + length
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected.logits, atol=1e-12, rtol=0)
    assert state.equals(expected.state, atol=1e-12)


def test_streams_are_independent_and_the_state_is_a_value() -> None:
    memformer, (tokens, document_starts) = model(), stream()
    older = memformer(tokens[:1, :15]).state
    copy = older.map(torch.clone)
    alone = [memformer(tokens[:1], older), memformer(tokens[1:], document_starts=document_starts[1:])]
    joined = memformer(tokens, MemoryState.concat([older, memformer.init_state(1)]), document_starts=document_starts)
    for row, out in enumerate(alone):
        torch.testing.assert_close(joined.logits[row], out.logits[0], atol=1e-12, rtol=0)
        assert joined.state.select([row]).equals(out.state, atol=1e-12)
    assert older.equals(copy)
    reset = memformer(tokens[1:], older.reset(torch.tensor([True])))
    torch.testing.assert_close(reset.logits, memformer(tokens[1:]).logits, atol=1e-12, rtol=0)


def test_a_document_sees_nothing_before_its_start() -> None:
    memformer, (tokens, document_starts) = model(), stream()
    others = tokens.clone()
    others[1, :7] = (others[1, :7] + 1) % 20
    first, second = (memformer(part, document_starts=document_starts) for part in (tokens, others))
    torch.testing.assert_close(first.logits[1, 7:], second.logits[1, 7:], atol=1e-12, rtol=0)
    assert first.state.select([1]).equals(second.state.select([1]), atol=1e-12)
    assert first.state.position.tolist() == [20, 13]
    # Without a start, what is far beyond the previous segment is known by the slots alone.
    known = [memformer(part).logits[1, -1] for part in (tokens, others)]
    assert (known[0] - known[1]).abs().max() > 1e-8


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(MemtxError, match=r"data.segment_length \(9\) exceeds the model's \(5\)"):
        MemformerModule(lambda _: model(), 20, 9)
    with pytest.raises(MemtxError, match="temperature"):
        model(temperature=0.0)

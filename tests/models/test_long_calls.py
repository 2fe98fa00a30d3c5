"""Long calls without gradient are read in chunks with equal results, except with a per-segment schedule."""

from __future__ import annotations

from functools import partial

import torch

from memtx import CompressedMemory, MemoryTransformer
from memtx.models.segmented_forward import MAX_CHUNK_TOKENS, MIN_CHUNK_LENGTH

LENGTH = MAX_CHUNK_TOKENS + MIN_CHUNK_LENGTH + 7
ROUNDING = 1e-10
"""float64, sums in another order."""


def _model(compress_per_segment: bool) -> MemoryTransformer:
    torch.manual_seed(0)
    memory = partial(
        CompressedMemory, window=16, compression_rate=4, num_entries=4, compress_per_segment=compress_per_segment
    )
    return MemoryTransformer(11, dim=8, depth=2, heads=2, memories=[memory]).double().eval()


def _tokens(batch_size: int) -> torch.Tensor:
    return torch.randint(11, (batch_size, LENGTH), generator=torch.Generator().manual_seed(1))


def _longest_chunk(model: MemoryTransformer, tokens: torch.Tensor, document_starts: torch.Tensor | None) -> int:
    """Return the length of the longest chunk that a layer receives."""
    seen: list[int] = []
    hook = model.get_submodule("blocks.0.attention").register_forward_hook(
        lambda _, inputs, out: seen.append(inputs[0].shape[1])
    )
    with torch.no_grad():
        model(tokens, document_starts=document_starts)
    hook.remove()
    return max(seen)


def test_chunked_call_equals_whole_call() -> None:
    model, tokens = _model(compress_per_segment=False), _tokens(2)
    document_starts = torch.zeros_like(tokens, dtype=torch.bool)
    document_starts[0, [MAX_CHUNK_TOKENS // 2, MAX_CHUNK_TOKENS // 2 + 3]] = True
    document_starts[1, MIN_CHUNK_LENGTH + 5] = True
    expected = model(tokens, document_starts=document_starts, return_hidden_states=True)
    assert _longest_chunk(model, tokens, document_starts) == MAX_CHUNK_TOKENS // 2
    with torch.no_grad():
        parts = model(tokens, document_starts=document_starts, return_hidden_states=True)
    assert (expected.logits - parts.logits).abs().max() < ROUNDING
    pairs = zip(expected.hidden_states, parts.hidden_states, strict=True)
    assert max((whole_hidden - parts_hidden).abs().max() for whole_hidden, parts_hidden in pairs) < ROUNDING
    assert torch.equal(expected.state.position, parts.state.position)
    for (state,), (parts_state,) in zip(expected.state.layers, parts.state.layers, strict=True):
        assert (state.hidden - parts_state.hidden).abs().max() < ROUNDING
        assert (state.bank - parts_state.bank).abs().max() < ROUNDING


def test_per_segment_schedule_is_not_chunked() -> None:
    assert _longest_chunk(_model(compress_per_segment=True), _tokens(1), None) == LENGTH

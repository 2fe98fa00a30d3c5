"""The bank of the highest-scoring entries: visibility, initial behavior and the gradient of the score."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtx import CompressedMemory, MemoryTransformer, TopKMemory
from memtx.memory.compression import MeanPooling
from memtx.ops.attention.mask import create_mask
from memtx.segment import Segment

DIM = 4


def visible_blocks(scores: list[float], t: int, window: int, rate: int, length: int) -> set[int]:
    """Return the blocks that the query at position t sees: those with the highest scores, the newest among equals."""
    evicted = [b for b in range(len(scores)) if (b + 1) * rate + window - 1 <= t]
    return set(sorted(evicted, key=lambda b: (scores[b], b), reverse=True)[:length])


@given(
    window=st.integers(1, 6),
    rate=st.integers(1, 4),
    length=st.integers(0, 5),
    n=st.integers(1, 50),
    end=st.integers(0, 50),
    levels=st.integers(1, 6),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=100)
def test_a_query_sees_the_highest_scores(
    window: int, rate: int, length: int, n: int, end: int, levels: int, seed: int
) -> None:
    """Entries are identified by their positions; few levels make ties."""
    memory = TopKMemory(DIM, window, rate, length, MeanPooling).double()
    with torch.no_grad():
        memory.score.weight[0, 0] = 1.0
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(levels, (-(-n // rate),), generator=generator).double()
    x = torch.zeros(1, n, DIM, dtype=torch.float64)
    x[0, :, 0] = level.repeat_interleave(rate)[:n]
    state, visible = memory.init_state(1, like=x), []
    for part in (x[:, :end], x[:, end:]):
        if part.shape[1] == 0:
            continue
        segment = Segment.from_document_starts(torch.tensor([len(visible)]), part.shape[1])
        with torch.no_grad():
            view = memory.read(state, part, segment, None)  # type: ignore[arg-type]
            state, _ = memory.write(view, segment, None)  # type: ignore[arg-type]
        entries = view.parts[0].shape[1] + view.parts[1].shape[1]
        block = (view.entry_positions.offset[0, :entries] + len(visible) - (rate - 1) / 2) / rate
        for mask in create_mask(view.entry_positions.visibility)[0, :, :entries]:
            visible.append({round(b) for b in block[mask].tolist()})
    assert visible == [visible_blocks(level.tolist(), t, window, rate, length) for t in range(n)]


def build_model(kind: Callable[..., CompressedMemory]) -> MemoryTransformer:
    torch.manual_seed(0)
    memory = partial(kind, window=4, compression_rate=2, num_entries=3, compression=MeanPooling)
    return MemoryTransformer(11, dim=8, depth=2, heads=2, memories=[memory]).double()


def test_starts_as_a_bank_of_the_newest_entries() -> None:
    newest, scored = build_model(CompressedMemory), build_model(TopKMemory)
    missing = scored.load_state_dict(newest.state_dict(), strict=False).missing_keys
    assert all("score" in name for name in missing)
    tokens = torch.randint(11, (2, 40))
    # The additional column of each head is zero, so sums differ at most in order.
    torch.testing.assert_close(scored(tokens).logits, newest(tokens).logits, rtol=0, atol=1e-12)


def test_the_score_is_a_log_weight_with_a_gradient() -> None:
    model = build_model(TopKMemory)
    tokens = torch.randint(11, (2, 40))
    score = model.blocks[0].attention.memory.score

    def loss(bias: float) -> Tensor:
        with torch.no_grad():
            score.bias.fill_(bias)
        return model(tokens, labels=tokens).loss

    loss(0.3).backward()
    step = 1e-6
    with torch.no_grad():
        slope = (loss(0.3 + step) - loss(0.3 - step)) / (2 * step)
    # The error of a central difference is of the order of step squared plus rounding / step.
    torch.testing.assert_close(score.bias.grad[0], slope, rtol=1e-4, atol=1e-9)
    assert slope.abs() > 1e-5
    assert score.weight.grad.abs().max() > 0


def test_calls_of_any_length_equal_one_call() -> None:
    """The score adds a channel to the heads, which are 4 wide; a call may have as many tokens."""
    model = build_model(TopKMemory).eval()
    with torch.no_grad():
        for block in model.blocks:
            torch.nn.init.normal_(block.attention.memory.score.weight)
    tokens = torch.randint(11, (2, 24))
    expected = model(tokens).logits
    for length in (1, 3, 4, 5, 8):
        state, logits = model.init_state(2), []
        for part in tokens.split(length, dim=1):
            out = model(part, state)
            state = out.state
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-10)

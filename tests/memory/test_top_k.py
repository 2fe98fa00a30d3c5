"""The bank that keeps the highest: what each query sees, by hand; how the score learns; what it is at the beginning."""

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


def by_hand(scores: list[float], t: int, window: int, rate: int, length: int) -> set[int]:
    """Return the blocks that the query at position t of a document sees: the highest, of equal ones the newest."""
    whole = [b for b in range(len(scores)) if (b + 1) * rate + window - 1 <= t]
    return set(sorted(whole, key=lambda b: (scores[b], b), reverse=True)[:length])


@given(
    window=st.integers(1, 6),
    rate=st.integers(1, 4),
    length=st.integers(0, 5),
    n=st.integers(1, 50),
    cut=st.integers(0, 50),
    levels=st.integers(1, 6),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=100)
def test_a_query_sees_the_highest(
    window: int, rate: int, length: int, n: int, cut: int, levels: int, seed: int
) -> None:
    """Entries are told by their places; few levels make ties."""
    memory = TopKMemory(DIM, window, rate, length, MeanPooling).double()
    with torch.no_grad():
        memory.score.weight[0, 0] = 1.0
    draw = torch.Generator().manual_seed(seed)
    level = torch.randint(levels, (-(-n // rate),), generator=draw).double()
    x = torch.zeros(1, n, DIM, dtype=torch.float64)
    x[0, :, 0] = level.repeat_interleave(rate)[:n]
    state, seen = memory.init_state(1, like=x), []
    for part in (x[:, :cut], x[:, cut:]):
        if part.shape[1] == 0:
            continue
        segment = Segment.from_document_starts(torch.tensor([len(seen)]), part.shape[1])
        with torch.no_grad():
            view = memory.read(state, part, segment, None)  # type: ignore[arg-type]
            state, _ = memory.write(view, segment, None)  # type: ignore[arg-type]
        entries = view.parts[0].shape[1] + view.parts[1].shape[1]
        block = (view.entry_positions.offset[0, :entries] + len(seen) - (rate - 1) / 2) / rate
        for line in create_mask(view.entry_positions.visibility)[0, :, :entries]:
            seen.append({round(b) for b in block[line].tolist()})
    assert seen == [by_hand(level.tolist(), t, window, rate, length) for t in range(n)]


def _model(kind: Callable[..., CompressedMemory]) -> MemoryTransformer:
    torch.manual_seed(0)
    memory = partial(kind, window=4, compression_rate=2, num_entries=3, compression=MeanPooling)
    return MemoryTransformer(11, dim=8, depth=2, heads=2, memories=[memory]).double()


def test_it_begins_as_the_bank_of_the_newest() -> None:
    newest, scored = _model(CompressedMemory), _model(TopKMemory)
    missing = scored.load_state_dict(newest.state_dict(), strict=False).missing_keys
    assert all("score" in name for name in missing)
    tokens = torch.randint(11, (2, 40))
    # The one more column of a head is zero: sums in another order at most.
    torch.testing.assert_close(scored(tokens).logits, newest(tokens).logits, rtol=0, atol=1e-12)


def test_the_score_is_a_log_weight_and_learns() -> None:
    model = _model(TopKMemory)
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
    # A central difference of a smooth function: errors of the order of step squared and of rounding / step.
    torch.testing.assert_close(score.bias.grad[0], slope, rtol=1e-4, atol=1e-9)
    assert slope.abs() > 1e-5
    assert score.weight.grad.abs().max() > 0

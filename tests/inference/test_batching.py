"""Which segments are read together: the first always, nothing that fills a row up by too much, never too many."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.inference.batching import default_batch_tokens, padding_limit, select_batch
from memtx.inference.scoring import ScoreRequest
from memtx.state import MemoryState

STATE = MemoryState(torch.zeros(1, dtype=torch.int64), ())


def reading(width: int, *, top: int = 0, embeddings: bool = False, last: bool = False) -> ScoreRequest:
    tokens = np.zeros(width, dtype=np.int64)
    return ScoreRequest(STATE, tokens, tokens, top, embeddings, last)


readings = st.lists(
    st.builds(
        reading, st.integers(1, 40), top=st.sampled_from([0, 0, 0, 2]), embeddings=st.booleans(), last=st.booleans()
    ),
    min_size=1,
    max_size=20,
)


@given(readings, st.integers(1, 200), st.integers(0, 20), st.booleans())
def test_what_is_read_together(waiting: list[ScoreRequest], tokens: int, spared: int, padded: bool) -> None:
    places = select_batch(waiting, max_tokens=tokens, max_padding=spared, supports_padding=padded)
    taken = [waiting[place] for place in places]
    widths = [len(one.tokens) for one in taken]
    assert places[0] == 0, "who has waited longest is never passed over"
    assert places == sorted(set(places))
    assert max(widths) - min(widths) <= spared
    assert len(taken) == 1 or len(taken) * max(widths) <= tokens
    assert len(taken) == 1 or not any(one.num_logprobs for one in taken)
    assert len({one.return_hidden_states for one in taken}) == 1
    if not padded:
        assert all(len(one.tokens) == max(widths) or one.discard_state for one in taken)


def test_the_nearest_in_length_go_along_and_the_older_of_equals() -> None:
    waiting = [reading(width) for width in (20, 31, 20, 19, 20, 20)]
    assert select_batch(waiting, max_tokens=80, max_padding=16, supports_padding=True) == [0, 2, 4, 5]
    assert select_batch(waiting, max_tokens=100, max_padding=16, supports_padding=True) == [0, 2, 3, 4, 5]
    assert select_batch(waiting, max_tokens=1000, max_padding=16, supports_padding=True) == [0, 1, 2, 3, 4, 5]
    assert select_batch(waiting, max_tokens=1000, max_padding=0, supports_padding=True) == [0, 2, 4, 5]
    assert select_batch(waiting, max_tokens=1000, max_padding=16, supports_padding=False) == [0, 2, 4, 5]


def test_a_call_costs_more_on_an_accelerator() -> None:
    assert padding_limit(512, is_cpu=True) < padding_limit(512, is_cpu=False)
    assert default_batch_tokens(is_cpu=True) < default_batch_tokens(is_cpu=False)

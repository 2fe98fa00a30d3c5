"""Requests scored in one call include the oldest and respect the limits of padding and tokens."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.inference.batching import ScoreRequest, default_batch_tokens, padding_limit, select_batch
from memtx.state import MemoryState

STATE = MemoryState(torch.zeros(1, dtype=torch.int64), ())


def score_request(
    length: int, *, num_logprobs: int = 0, return_hidden_states: bool = False, discard_state: bool = False
) -> ScoreRequest:
    tokens = np.zeros(length, dtype=np.int64)
    return ScoreRequest(STATE, tokens, tokens, num_logprobs, return_hidden_states, discard_state)


score_requests = st.lists(
    st.builds(
        score_request,
        st.integers(1, 40),
        num_logprobs=st.sampled_from([0, 0, 0, 2]),
        return_hidden_states=st.booleans(),
        discard_state=st.booleans(),
    ),
    min_size=1,
    max_size=20,
)


@given(score_requests, st.integers(1, 200), st.integers(0, 20), st.booleans())
def test_selected_requests_keep_every_limit(
    requests: list[ScoreRequest], max_tokens: int, max_padding: int, supports_padding: bool
) -> None:
    indices = select_batch(requests, max_tokens=max_tokens, max_padding=max_padding, supports_padding=supports_padding)
    selected = [requests[index] for index in indices]
    lengths = [len(request.tokens) for request in selected]
    assert indices[0] == 0, "the oldest request is always selected"
    assert indices == sorted(set(indices))
    assert max(lengths) - min(lengths) <= max_padding
    assert len(selected) == 1 or len(selected) * max(lengths) <= max_tokens
    assert len(selected) == 1 or not any(request.num_logprobs for request in selected)
    assert len({request.return_hidden_states for request in selected}) == 1
    if not supports_padding:
        assert all(len(request.tokens) == max(lengths) or request.discard_state for request in selected)


def test_requests_of_similar_length_come_first_and_older_ones_among_equals() -> None:
    requests = [score_request(length) for length in (20, 31, 20, 19, 20, 20)]
    assert select_batch(requests, max_tokens=80, max_padding=16, supports_padding=True) == [0, 2, 4, 5]
    assert select_batch(requests, max_tokens=100, max_padding=16, supports_padding=True) == [0, 2, 3, 4, 5]
    assert select_batch(requests, max_tokens=1000, max_padding=16, supports_padding=True) == [0, 1, 2, 3, 4, 5]
    assert select_batch(requests, max_tokens=1000, max_padding=0, supports_padding=True) == [0, 2, 4, 5]
    assert select_batch(requests, max_tokens=1000, max_padding=16, supports_padding=False) == [0, 2, 4, 5]


def test_accelerators_get_more_padding_and_larger_batches() -> None:
    assert padding_limit(512, is_cpu=True) < padding_limit(512, is_cpu=False)
    assert default_batch_tokens(is_cpu=True) < default_batch_tokens(is_cpu=False)

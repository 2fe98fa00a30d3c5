"""XLNet: a prediction depends on the position and earlier tokens of the order, not on later ones or its own token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.errors import MemtxError
from memtx.layers.xlnet import TwoStreamAttention, bidirectional_relative_shift, bidirectional_sinusoids
from memtx.models.heads import TaskModel
from memtx.models.xlnet import XLNet


def model(depth: int = 3) -> XLNet:
    torch.manual_seed(0)
    xlnet = XLNet(40, dim=16, depth=depth, heads=2).double().eval()
    for weight in xlnet.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # far from the initial values, at which all positions would be equal
    return xlnet


@given(st.integers(1, 9))
def test_relative_shift_selects_the_distance(n: int) -> None:
    scores = torch.randn(2, n, 2 * n - 1)
    actual = bidirectional_relative_shift(scores)
    for query in range(n):
        for key in range(n):
            # Column p is distance n - 1 - p, and the distance is query - key.
            assert torch.equal(actual[:, query, key], scores[:, query, n - 1 - query + key])


def test_two_stream_attention_matches_definition() -> None:
    torch.manual_seed(0)
    layer = TwoStreamAttention(8, 2).double()
    torch.nn.init.normal_(layer.content_bias)
    torch.nn.init.normal_(layer.position_bias)
    query_stream, content = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    distances = bidirectional_sinusoids(5, content)
    seen = torch.rand(1, 5, 5) < 0.6
    seen[0, 2] = False
    actual = layer(query_stream, content, distances, seen)
    k, v = layer.key_value(content).view(1, 5, 2, 2, 4).unbind(2)
    q, r = layer.query(query_stream).view(1, 5, 2, 4), layer.distance(distances).view(9, 2, 4)
    for query in range(5):
        parts = torch.zeros(2, 4, dtype=torch.float64)
        keys = seen[0, query].nonzero().flatten().tolist()
        for head in range(2):
            if not keys:
                continue
            head_query = q[0, query, head]
            scores = torch.stack(
                [
                    ((head_query + layer.content_bias[head]) @ k[0, key, head]
                     + (head_query + layer.position_bias[head]) @ r[4 - (query - key), head]) / 2
                    for key in keys
                ]
            )  # fmt: skip
            parts[head] = scores.softmax(0) @ v[0, keys, head]
        torch.testing.assert_close(actual[0, query], layer.out(parts.flatten()), atol=1e-12, rtol=0)


def test_prediction_sees_earlier_ranks_but_not_itself() -> None:
    xlnet, n = model(), 9
    tokens = torch.randint(0, 40, (1, n))
    rank = torch.randperm(n)[None]
    before = xlnet(tokens, permutation_rank=rank).logits
    for index in range(n):
        other = tokens.clone()
        other[0, index] = (other[0, index] + 1) % 40
        changed = (xlnet(other, permutation_rank=rank).logits - before).abs().amax(-1)[0] > 1e-9
        assert torch.equal(changed, rank[0] > rank[0, index])


def test_prediction_depends_on_position() -> None:
    # The query knows its position.
    xlnet = model()
    tokens = torch.tensor([[5, 6, 7, 8]])
    logits = xlnet(tokens, permutation_rank=torch.tensor([[0, 1, 2, 3]])).logits
    other = xlnet(tokens, permutation_rank=torch.tensor([[0, 1, 3, 2]])).logits
    assert (logits[0, 3] - other[0, 3]).abs().max() > 1e-3


def test_bidirectional_xlnet_works_as_task_backbone(tmp_path: Path) -> None:
    xlnet = model()
    tokens = torch.randint(0, 40, (2, 7))
    alone = xlnet(tokens).last_hidden_state
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, 3))
    padded = xlnet(torch.nn.functional.pad(tokens, (0, 3)), mask).last_hidden_state
    torch.testing.assert_close(padded[:, :7], alone, atol=1e-12, rtol=0)
    task = TaskModel(40, 3, XLNet)
    assert task(tokens, torch.ones_like(tokens)).shape == (2, 3)
    xlnet.float().save_pretrained(tmp_path)
    assert XLNet.from_pretrained(tmp_path).fingerprint == xlnet.fingerprint


def test_logits_mask_selects_positions() -> None:
    xlnet = model()
    tokens, rank = torch.randint(0, 40, (2, 7)), torch.randperm(7).expand(2, -1)
    scored = torch.rand(2, 7) < 0.5
    expected = xlnet(tokens, permutation_rank=rank).logits
    torch.testing.assert_close(xlnet(tokens, permutation_rank=rank, logits_mask=scored).logits, expected[scored])
    with pytest.raises(MemtxError, match="rank is"):
        xlnet(tokens, permutation_rank=rank[:, :3])
    with pytest.raises(MemtxError, match=r"dim \(16\) must be even and divisible by heads \(3\)"):
        XLNet(40, dim=16, heads=3)

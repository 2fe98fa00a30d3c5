"""XLNet: a prediction depends on the position and earlier tokens of the order, not on later ones or its own token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.errors import MemtxError
from memtx.layers.xlnet import StreamInputs, TwoStreamAttention, bidirectional_relative_shift, relative_sinusoids
from memtx.models.heads import TaskModel
from memtx.models.xlnet import XLNet


def model(depth: int = 3) -> XLNet:
    torch.manual_seed(0)
    xlnet = XLNet(40, dim=16, depth=depth, heads=2).double().eval()
    for weight in xlnet.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # far from the initial values, at which all positions would be equal
    return xlnet


@given(st.integers(1, 9), st.integers(0, 4))
def test_relative_shift_selects_the_distance(n: int, memory: int) -> None:
    num_keys = memory + n
    scores = torch.randn(2, 1, n, num_keys + n)
    actual = bidirectional_relative_shift(scores, num_keys)
    for query in range(n):
        for key in range(num_keys):
            # Column p is distance num_keys - p, and the distance is that between the positions.
            assert torch.equal(actual[..., query, key], scores[..., query, num_keys - (memory + query - key)])
    positions = torch.arange(n).flip(0).expand(2, -1)
    assert torch.equal(bidirectional_relative_shift(scores.flip(2), num_keys, positions), actual.flip(2))


def test_two_stream_attention_matches_definition() -> None:
    """Sections 2.3 to 2.5 of the paper, pair by pair: content, distance and segment."""
    torch.manual_seed(0)
    layer = TwoStreamAttention(8, 2).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    query_stream, content = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    memory = torch.randn(1, 3, 8, dtype=torch.float64)
    keys = torch.cat([memory, content], dim=1)
    distances, segments = relative_sinusoids(8, 5, content), torch.tensor([0, 0, 0, 0, 0, 1, 1, 0])
    seen = torch.rand(5, 8) < 0.6
    inputs = StreamInputs(distances[None], ~seen[None], None, (segments[3:, None] != segments)[None])
    actual = layer(query_stream, layer.project(keys), inputs)
    k, v = layer.key_value(keys).view(8, 2, 2, 4).unbind(1)
    q, r = layer.query(query_stream).view(5, 2, 4), layer.distance(distances).view(13, 2, 4)
    for query in range(5):
        parts = torch.zeros(2, 4, dtype=torch.float64)
        visible = seen[query].nonzero().flatten().tolist()
        for head in range(2):
            scores = torch.stack(
                [
                    ((q[query, head] + layer.content_bias[head]) @ k[key, head]
                     + (q[query, head] + layer.position_bias[head]) @ r[8 - (3 + query - key), head]
                     + (q[query, head] + layer.segment_bias[head])
                     @ layer.segment_embedding[int(segments[3 + query] != segments[key]), head]) / 2
                    for key in visible
                ]
            )  # fmt: skip
            parts[head] = scores.softmax(0) @ v[visible, head]
        torch.testing.assert_close(actual[0, query], layer.out(parts.flatten()), atol=1e-12, rtol=0)


def order_masks(rank: Tensor) -> dict[str, Tensor]:
    """Return the arguments that predict every token from those of lower ranks."""
    return {"perm_mask": rank[:, :, None] <= rank[:, None], "target_mapping": torch.eye(rank.shape[1])[None]}


def test_prediction_sees_earlier_ranks_but_not_itself() -> None:
    xlnet, n = model(), 9
    tokens = torch.randint(0, 40, (1, n))
    rank = torch.randperm(n)[None]
    before = xlnet(tokens, **order_masks(rank)).logits
    for index in range(n):
        other = tokens.clone()
        other[0, index] = (other[0, index] + 1) % 40
        changed = (xlnet(other, **order_masks(rank)).logits - before).abs().amax(-1)[0] > 1e-9
        # The first token of the order sees nothing and so, as in the original code, takes the mean of all.
        assert torch.equal(changed, (rank[0] > rank[0, index]) | (rank[0] == 0))


def test_prediction_depends_on_position() -> None:
    # The query knows its position.
    xlnet = model()
    tokens = torch.tensor([[5, 6, 7, 8]])
    logits = xlnet(tokens, **order_masks(torch.tensor([[0, 1, 2, 3]]))).logits
    other = xlnet(tokens, **order_masks(torch.tensor([[0, 1, 3, 2]]))).logits
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


def test_target_mapping_selects_positions() -> None:
    xlnet = model()
    tokens, rank = torch.randint(0, 40, (2, 7)), torch.randperm(7).expand(2, -1)
    targets = torch.eye(7)[torch.tensor([[1, 4, 0], [6, 2, 3]])]
    masks = {**order_masks(rank), "target_mapping": torch.eye(7).expand(2, -1, -1)}
    expected = targets.double() @ xlnet(tokens, **masks).logits
    actual = xlnet(tokens, **{**masks, "target_mapping": targets}).logits
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    with pytest.raises(MemtxError, match=r"dim \(16\) must be even and divisible by heads \(3\)"):
        XLNet(40, dim=16, heads=3)

"""Transformer-XL compared with a plain float64 one, and the properties of every recurrent model."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import memtx
from memtx import MemtxError
from memtx.models.transformer_xl import TransformerXL

TOKENS = torch.randint(0, 30, (3, 26), generator=torch.Generator().manual_seed(0))


def small(**options: Any) -> TransformerXL:
    """Return a model in float64 with weights large enough that a wrong term shows."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "dim": 8,
        "depth": 2,
        "heads": 2,
        "memory_length": 6,
        "cutoffs": [10, 20],
        "div_value": 2,
    }
    model = TransformerXL(30, **{**settings, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def plain(model: TransformerXL, tokens: Tensor, memory: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return log-probabilities of a segment ``(n,)`` and the layers' inputs; memory: ``(length, dim)`` per layer."""
    settings = model.config["init_args"]
    clusters, n = model.embedding.clusters, len(tokens)
    tables = [table.weight for table in model.embedding.tables]

    def cluster_table(tables: Any, cluster: int) -> Tensor:
        low, high = clusters.bounds[cluster]
        return tables[0][low:high] if clusters.has_single_table else tables[cluster]

    def cluster_projection(cluster: int) -> Tensor | None:
        projections = model.embedding.projections
        return projections[0 if clusters.has_single_table else cluster] if len(projections) else None

    x = torch.zeros(n, model.dim, dtype=torch.float64)
    for t, token in enumerate(tokens.tolist()):
        cluster = next(i for i, (low, high) in enumerate(clusters.bounds) if low <= token < high)
        table, projection = cluster_table(tables, cluster), cluster_projection(cluster)
        vector = table[token - clusters.bounds[cluster][0]]
        x[t] = (vector if projection is None else projection @ vector) * math.sqrt(model.dim)
    inputs = []
    for block, cache in zip(model._layers(), memory, strict=True):
        inputs.append(x)
        part = block.attention
        m, width = len(cache), part.head_dim
        read = torch.cat([cache, x])
        read = block.attention_norm(read) if block.pre_norm else read
        q, (k, v) = part.query(read), part.key_value(read).chunk(2, -1)
        u = part.content_bias if part.content_bias is not None else model.content_bias
        w = part.position_bias if part.position_bias is not None else model.position_bias
        out = torch.zeros(n, part.heads * width, dtype=torch.float64)
        for i in range(n):
            first = i + 1 if settings["same_length"] else 0
            for head in range(part.heads):
                at = slice(head * width, (head + 1) * width)
                scores = []
                for j in range(first, m + i + 1):
                    distance = m + i - j
                    if settings["clamp_length"] > 0:
                        distance = min(distance, settings["clamp_length"])
                    angle = [distance / 10000 ** (2 * f / model.dim) for f in range(model.dim // 2)]
                    waves = [math.sin(a) for a in angle] + [math.cos(a) for a in angle]
                    code = torch.tensor(waves, dtype=torch.float64)
                    r = part.distance(code)[at]
                    scores.append(((q[m + i, at] + u[head]) @ k[j, at] + (q[m + i, at] + w[head]) @ r) / width**0.5)
                out[i, at] = torch.softmax(torch.stack(scores), 0) @ v[first : m + i + 1, at]
        forward = lambda y, part=block.feed_forward: part.out(torch.relu(part.up(y)))  # noqa: E731
        if block.pre_norm:
            x = x + part.out(out)
            x = x + forward(block.feed_forward_norm(x))
        else:
            x = block.attention_norm(x + part.out(out))
            x = block.feed_forward_norm(x + forward(x))
    softmax = model.head
    ties = settings["tie_projections"] or [cluster > 0 for cluster in range(len(clusters.bounds))]

    def scores_of(cluster: int) -> Tensor:
        low, high = clusters.bounds[cluster]
        table = cluster_table(tables if settings["tie_embeddings"] else softmax.tables, cluster)
        bias = softmax.biases[0][low:high] if clusters.has_single_table else softmax.biases[cluster]
        if cluster == 0 and softmax.cluster_weight is not None:
            table, bias = torch.cat([table, softmax.cluster_weight]), torch.cat([bias, softmax.cluster_bias])
        projection = cluster_projection(cluster)
        if projection is not None and not ties[cluster]:
            projection = softmax.projections[cluster]
        return (x if projection is None else x @ projection) @ table.T + bias

    head = torch.softmax(scores_of(0), -1)
    short = clusters.bounds[0][1]
    parts = [head[:, :short]]
    for cluster in range(1, len(clusters.bounds)):
        parts.append(head[:, short + cluster - 1, None] * torch.softmax(scores_of(cluster), -1))
    return torch.cat(parts, -1).log(), inputs


OPTIONS: list[dict[str, Any]] = [
    {},
    {"same_length": True, "clamp_length": 4},
    {"pre_norm": True, "share_biases": True},
    {"cutoffs": [], "div_value": 1, "tie_embeddings": False},
    {"div_value": 1, "embed_dim": 6, "tie_projections": [True, False, True]},
    {"head_dim": 3, "tie_embeddings": False, "tie_projections": [False, False, False]},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_segment_matches_plain_transformer_xl(options: dict[str, Any]) -> None:
    model = small(**options)
    state, memory = None, [torch.zeros(6, 8, dtype=torch.float64)] * 2
    for part in (TOKENS[:1, :5], TOKENS[:1, 5:6], TOKENS[:1, 6:16]):
        out = model(part, state)
        expected, inputs = plain(model, part[0], memory)
        assert torch.allclose(out.logits[0], expected, rtol=0, atol=1e-10)  # float64
        memory = [torch.cat([old, new])[-6:] for old, new in zip(memory, inputs, strict=True)]
        state = out.state
        for (layer,), cache in zip(state.layers, memory, strict=True):
            assert torch.allclose(layer.hidden[0], cache, rtol=0, atol=1e-11)
    labels = TOKENS[:1, 7:17].clone()
    labels[0, 3] = -100
    scored = model(TOKENS[:1, 6:16], labels=labels)
    truth, _ = plain(model, TOKENS[0, 6:16], [torch.zeros(6, 8, dtype=torch.float64)] * 2)
    expected_nll = F.nll_loss(truth, labels[0], reduction="none")
    assert torch.allclose(scored.nll[0], expected_nll, rtol=0, atol=1e-10)
    grads = torch.autograd.grad(scored.loss, list(model.parameters()), allow_unused=True)
    expected_grads = torch.autograd.grad(expected_nll.sum() / 9, list(model.parameters()), allow_unused=True)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        grad, expected_grad = (torch.zeros(1, dtype=torch.float64) if g is None else g for g in (grad, expected_grad))
        assert torch.allclose(grad, expected_grad, rtol=0, atol=1e-9)


@given(cuts=st.lists(st.integers(1, 25), max_size=4))
def test_same_length_is_invariant_to_segmentation(cuts: list[int]) -> None:
    model = small(same_length=True)
    document_starts = torch.zeros(3, 26, dtype=torch.bool)
    document_starts[1, 9], document_starts[2, 0], document_starts[2, 20] = True, True, True
    expected = model(TOKENS, document_starts=document_starts)
    state, logits = None, []
    bounds = sorted({0, 26, *cuts})
    for low, high in itertools.pairwise(bounds):
        out = model(TOKENS[:, low:high], state, document_starts=document_starts[:, low:high])
        state = out.state
        logits.append(out.logits)
    assert state is not None
    assert torch.allclose(torch.cat(logits, 1), expected.logits, rtol=0, atol=1e-10)
    assert state.equals(expected.state, 1e-10)


def test_streams_and_documents_are_independent_and_state_is_unchanged() -> None:
    model = small(same_length=True)
    before = model(TOKENS).state
    copy = before.map(torch.clone)
    out = model(TOKENS[:, :9], before)
    assert before.equals(copy)
    for row in range(3):
        alone = model(TOKENS[row : row + 1, :9], before.select([row]))
        assert torch.allclose(alone.logits[0], out.logits[row], rtol=0, atol=1e-12)
    document_starts = torch.zeros(3, 26, dtype=torch.bool)
    document_starts[0, 11] = True
    packed = model(TOKENS, before, document_starts=document_starts)
    assert torch.allclose(packed.logits[0, 11:], model(TOKENS[:1, 11:]).logits[0], rtol=0, atol=1e-10)
    assert torch.allclose(packed.logits[0, :11], model(TOKENS[:1, :11], before.select([0])).logits[0], atol=1e-10)
    fresh = model(TOKENS[:, :4], before.reset(torch.ones(3, dtype=torch.bool)))
    assert torch.equal(fresh.logits, model(TOKENS[:, :4]).logits)


@pytest.mark.parametrize("same_length", [False, True])
def test_padding_changes_nothing(same_length: bool) -> None:
    model = small(same_length=same_length)
    assert model.supports_padding
    state, lengths = model(TOKENS[:, 9:]).state, [4, 0, 9]
    out = model(TOKENS[:, :9], state, valid_length=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        expected_state = state.select([row])
        if length:
            alone = model(TOKENS[row : row + 1, :length], expected_state)
            assert torch.allclose(out.logits[row, :length], alone.logits[0], rtol=0, atol=1e-12)
            expected_state = alone.state
        assert out.state.select([row]).equals(expected_state, 1e-12)


@pytest.mark.parametrize("options", OPTIONS[:3])
def test_recomputed_layers_give_equal_gradients(options: dict[str, Any]) -> None:
    # The distance embeddings have a dropout of their own, which all layers share.
    model = small(**options, dropout=0.3, attention_dropout=0.2).train()
    grads = []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(2)
        loss = model(TOKENS, labels=TOKENS.roll(-1, 1), document_starts=TOKENS == 3).loss
        grads.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for grad, expected in zip(*grads, strict=True):
        assert (grad is None) == (expected is None)
        assert grad is None or torch.equal(grad, expected)


def test_no_other_memory_can_be_added() -> None:
    for change in (TransformerXL.with_memory, lambda model: model.without_memory(4)):
        with pytest.raises(MemtxError, match="Transformer-XL cannot read RecurrentMemory"):
            change(small(same_length=True))


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    model = small(**OPTIONS[4]).float()
    model.save_pretrained(tmp_path)
    again = memtx.from_pretrained(tmp_path)
    assert isinstance(again, TransformerXL)
    assert again.fingerprint == model.fingerprint
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoffs": [20, 10]}, "cutoffs is"),
        ({"cutoffs": [30]}, "cutoffs is"),
        ({"div_value": 5}, "vanish"),
        ({"dim": 7, "heads": 7}, "dim is 7"),
        ({"heads": 3}, r"dim \(8\) must be divisible by heads \(3\)"),
        ({"memory_length": 0, "same_length": True}, "memory_length is 0"),
        ({"tie_projections": [True]}, "tie_projections has 1"),
        ({"depth": 0}, "depth is 0"),
    ],
)
def test_invalid_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        small(**options)


def test_invalid_calls_are_refused() -> None:
    model = small()
    with pytest.raises(MemtxError, match="tokens is"):
        model(TOKENS[0])
    with pytest.raises(MemtxError, match="batch size 3, the state 2"):
        model(TOKENS, model.init_state(2))
    with pytest.raises(MemtxError, match="labels is"):
        model(TOKENS, labels=TOKENS[:, 1:])
    with pytest.raises(MemtxError, match="without a softmax"):
        small(add_lm_head=False)(TOKENS, labels=TOKENS)
    assert small(add_lm_head=False)(TOKENS).logits is None
    assert small(memory_length=0)(TOKENS).logits.shape == (3, 26, 30)

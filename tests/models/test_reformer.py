"""Reformer against a plain float64 one, its gradients without kept states, and its memory by depth."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memtx
from memtx import MemtxError
from memtx.layers.positions.absolute import AxialPositionEmbeddings
from memtx.layers.reformer import LocalAttention, LSHAttention, ReformerAttention
from memtx.models.reformer import Reformer
from memtx.ops.lsh import choose_bucket_factors, sample_rotations


def small(attentions: list[Any], **options: Any) -> Reformer:
    """A model in float64 with weights wide enough that a wrong term shows."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {"positions": partial(AxialPositionEmbeddings, shape=[8, 8], axis_dims=[3, 5])}
    model = Reformer(20, 8, 2, attentions, 12, **{**settings, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def softmaxed(scores: list[Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.stack(scores)
    return torch.softmax(total, 0) @ values, total.logsumexp(0)


def plain_attention(part: ReformerAttention, x: Tensor, present: Tensor) -> Tensor:
    """One row (n, dim), one query at a time."""
    n, width, chunk = len(x), part.head_dim, part.chunk_length
    out = torch.zeros(n, part.heads * width, dtype=x.dtype)
    for head in range(part.heads):
        at = slice(head * width, (head + 1) * width)
        v = part.value(x)[:, at]
        if isinstance(part, LSHAttention):
            q = part.query_key(x)[:, at]
            k = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() / width**0.5
        else:
            assert isinstance(part, LocalAttention)
            q, k = part.query(x)[:, at], part.key(x)[:, at] / width**0.5
        order, rounds = list(range(n)), 1
        if isinstance(part, LSHAttention) and n > chunk:
            rounds = part.num_hashes
            factors = part.bucket_factors or choose_bucket_factors(n, chunk, part.max_length)
            directions = sample_rotations(part.heads, width, rounds, factors, part.seed, x)[head]
            order = []
            for one in range(rounds):
                buckets = []
                for t in range(n):
                    turned, bucket, worth, used = q[t] @ directions[:, one], 0, 1, 0
                    for factor in factors:
                        piece = turned[used : used + factor // 2]
                        bucket += worth * int(torch.cat([piece, -piece]).argmax())
                        used, worth = used + factor // 2, worth * factor
                    buckets.append(bucket if present[t] else worth)
                order += sorted(range(n), key=lambda t, buckets=buckets: (buckets[t], t))
        chunks = [order] if n <= chunk else [order[i : i + chunk] for i in range(0, len(order), chunk)]
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(n)]
        for number, queries in enumerate(chunks):
            keys = []
            for step in range(-part.num_chunks_before, part.num_chunks_after + 1) if len(chunks) > 1 else [0]:
                keys += chunks[(number + step) % len(chunks)] if abs(step) < len(chunks) else chunks[number]
            for t in queries:
                scores = []
                for j in keys:
                    score = q[t] @ k[j]
                    if not present[j] or (part.causal and j > t):
                        score = torch.full_like(score, -1e9)
                    if isinstance(part, LSHAttention) and j == t:
                        score = torch.full_like(score, -1e5)
                    scores.append(score)
                found[t].append(softmaxed(scores, v[keys]))
        for t, made in enumerate(found):
            shares = torch.softmax(torch.stack([lse for _, lse in made]), 0)
            out[t, at] = sum(share * one for share, (one, _) in zip(shares, made, strict=True))
    return part.out(out)


def plain(model: Reformer, tokens: Tensor, present: Tensor) -> Tensor:
    """Logits of one row whose chunks are whole."""
    weights = model.positions.weights
    place = torch.arange(len(tokens))
    x1 = model.embedding.weight[tokens] + torch.cat([weights[0][place // 8, 0], weights[1][0, place % 8]], -1)
    x2 = x1
    for block in model._layers():
        x1 = x1 + plain_attention(block.attention, block.attention_norm(x2), present)
        x2 = x2 + block.down(block.activation(block.up(block.feed_forward_norm(x1))))
    return model.head(model.norm(torch.cat([x1, x2], -1)))


@given(data=st.data())
@settings(max_examples=8)
def test_logits_and_gradients_are_the_articles(data: st.DataObject) -> None:
    causal = data.draw(st.booleans())
    chunk = data.draw(st.sampled_from([2, 4]))

    def shape() -> dict[str, int]:
        return {
            "chunk_length": chunk,
            "num_chunks_before": data.draw(st.integers(0, 3)),
            "num_chunks_after": 0 if causal else data.draw(st.integers(0, 2)),
        }

    buckets = data.draw(st.sampled_from([None, 4, (2, 4)]))
    hashing = {"num_hashes": data.draw(st.integers(1, 3)), "num_buckets": buckets, "seed": 5, "max_length": 64}
    attentions = [
        partial(LocalAttention, **shape(), head_dim=3),
        partial(LSHAttention, **shape(), **hashing),
    ]
    model = small(attentions, causal=causal, feed_forward_chunk_size=data.draw(st.sampled_from([0, 3])))
    length = data.draw(st.integers(1, 12))
    whole = length if length <= chunk else -(-length // chunk) * chunk
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    tokens = torch.randint(1, 20, (2, length))
    present = torch.rand(2, length) < data.draw(st.sampled_from([0.6, 1.0]))
    out = model(tokens, present.long())
    padded = torch.nn.functional.pad(tokens, (0, whole - length))
    there = torch.nn.functional.pad(present, (0, whole - length))
    wanted = torch.stack([plain(model, padded[row], there[row])[:length] for row in range(2)])
    # float64, but a query that sees nothing has scores of -1e9, of which it keeps seven digits behind the point.
    assert torch.allclose(out.logits, wanted, rtol=0, atol=1e-5)
    upstream = torch.randn_like(wanted)
    parameters = list(model.parameters())
    own = torch.autograd.grad((out.logits * upstream).sum(), parameters, allow_unused=True)
    truth = torch.autograd.grad((wanted * upstream).sum(), parameters, allow_unused=True)
    for one, other in zip(own, truth, strict=True):
        # A place that sees itself alone takes no part in its scores.
        one, other = (torch.zeros(1, dtype=torch.float64) if g is None else g for g in (one, other))
        assert torch.allclose(one, other, rtol=0, atol=1e-4)


LAYERS = [partial(LocalAttention, chunk_length=4), partial(LSHAttention, chunk_length=4, num_hashes=2)]
TOKENS = torch.randint(1, 20, (2, 32), generator=torch.Generator().manual_seed(0))


def test_hidden_states_do_not_change_the_rest() -> None:
    model = small(
        [partial(LocalAttention, chunk_length=4), partial(LSHAttention, chunk_length=4, num_hashes=2, seed=3)]
    )
    kept = model(TOKENS, output_hidden_states=True)
    assert [tuple(h.shape) for h in kept.hidden_states] == [(2, 32, 8)] * 3
    assert model(TOKENS).hidden_states is None
    assert torch.allclose(model(TOKENS).logits, kept.logits, rtol=0, atol=1e-12)
    assert kept.last_hidden_state.shape == (2, 32, 16)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, kept.logits, rtol=0, atol=1e-12)


def test_what_is_dropped_forward_is_dropped_backward() -> None:
    attentions = [
        partial(LocalAttention, chunk_length=4, dropout=0.3),
        partial(LSHAttention, chunk_length=4, dropout=0.3, seed=1),
    ]
    model = small(attentions, dropout=0.3).train()

    def loss() -> Tensor:
        torch.manual_seed(7)
        return model(TOKENS).logits.square().sum()

    parameters = list(model.parameters())
    value = loss()
    state = torch.get_rng_state()
    grads = torch.autograd.grad(value, parameters)
    assert torch.equal(torch.get_rng_state(), state)  # the way back leaves the generator alone
    torch.manual_seed(2)
    # The same places fall into the same buckets under so small a step.
    direction = [torch.randn_like(p) * 1e-7 for p in parameters]

    def moved(sign: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign)
        found = float(loss().detach())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=sign)
        return found

    slope = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    assert slope == pytest.approx((moved(1.0) - moved(-1.0)) / 2, rel=1e-4)  # a central difference of a step of 1e-7


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made under it that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_the_memory_of_a_step_does_not_grow_with_depth() -> None:
    def peak(depth: int, keep: bool = False) -> int:
        model = Reformer(20, 16, 2, LAYERS * (depth // 2), 32).train()
        tokens = torch.randint(1, 20, (1, 512))
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        live = Live()
        with live:
            model(tokens, output_hidden_states=keep).logits.square().mean().backward()
        # Gradients are of the weights' size, and are held once by the layers and once by the sum.
        return live.most - 2 * weights

    few, many = peak(4), peak(16)
    assert many < 1.1 * few
    # The measure sees what is kept where hidden states are asked for, and layers run as they do elsewhere.
    assert peak(16, keep=True) > 2 * few


def test_ever_new_directions_without_a_seed() -> None:
    model = small([partial(LSHAttention, chunk_length=4, num_buckets=8)])
    with torch.no_grad():
        assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    seeded = small([partial(LSHAttention, chunk_length=4, num_buckets=8, seed=1)])
    with torch.no_grad():
        assert torch.equal(seeded(TOKENS).logits, seeded(TOKENS).logits)


def test_kept_on_disk_and_read_back(tmp_path: Path) -> None:
    model = small([partial(LocalAttention, chunk_length=4), partial(LSHAttention, chunk_length=4, seed=1)]).float()
    model.save_pretrained(tmp_path)
    again = memtx.from_pretrained(tmp_path)
    assert isinstance(again, Reformer)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LocalAttention(8, 3), r"dim \(8\) must be divisible by heads \(3\)"),
        (lambda: LocalAttention(8, 2, chunk_length=0), "chunk_length is 0"),
        (lambda: LocalAttention(8, 2, causal=True, num_chunks_after=1), "after is 1"),
        (lambda: LSHAttention(8, 2, num_hashes=0), "num_hashes is 0"),
        (lambda: LSHAttention(8, 2, num_buckets=3), "num_buckets is 3"),
        (lambda: AxialPositionEmbeddings(8, [4, 4], [4, 5]), "dim is 8"),
        (lambda: small([]), "layers is 0"),
        (lambda: small(LAYERS, feed_forward_chunk_size=-1), "feed_forward_chunk_size is -1"),
        (lambda: small(LAYERS)(torch.ones(1, 65, dtype=torch.int64)), "needs 68 positions, the model has 64"),
        (lambda: small(LAYERS)(TOKENS[0]), "input_ids is"),
        (lambda: small(LAYERS)(TOKENS, TOKENS[:, 1:]), "attention_mask is"),
    ],
)
def test_what_cannot_be_is_named(make: Any, said: str) -> None:
    with pytest.raises(MemtxError, match=said):
        make()

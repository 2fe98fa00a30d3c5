"""Reformer compared with a plain float64 one, its reversible gradients, and its memory use by depth."""

from __future__ import annotations

import math
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
from memtx.ops.lsh import choose_bucket_factors, hash_vectors, sample_rotations


def small(attentions: list[Any], **options: Any) -> Reformer:
    """Return a model in float64 with weights large enough that a wrong term shows."""
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
    """Return the attention of one text ``(n, dim)``, one query at a time."""
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
            for hash_index in range(rounds):
                buckets = []
                for t in range(n):
                    turned, bucket, scale, used = q[t] @ directions[:, hash_index], 0, 1, 0
                    for factor in factors:
                        piece = turned[used : used + factor // 2]
                        bucket += scale * int(torch.cat([piece, -piece]).argmax())
                        used, scale = used + factor // 2, scale * factor
                    buckets.append(bucket if present[t] else scale)
                order += sorted(range(n), key=lambda t, buckets=buckets: (buckets[t], t))
        chunks = [order] if n <= chunk else [order[i : i + chunk] for i in range(0, len(order), chunk)]
        results: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(n)]
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
                results[t].append(softmaxed(scores, v[keys]))
        for t, chunk_results in enumerate(results):
            shares = torch.softmax(torch.stack([lse for _, lse in chunk_results]), 0)
            out[t, at] = sum(share * result for share, (result, _) in zip(shares, chunk_results, strict=True))
    return part.out(out)


def plain(model: Reformer, tokens: Tensor, present: Tensor) -> Tensor:
    """Return the logits of one text of whole chunks."""
    weights = model.positions.weights
    position = torch.arange(len(tokens))
    x1 = model.embedding.weight[tokens] + torch.cat([weights[0][position // 8, 0], weights[1][0, position % 8]], -1)
    x2 = x1
    for block in model._layers():
        x1 = x1 + plain_attention(block.attention, block.attention_norm(x2), present)
        x2 = x2 + block.down(block.activation(block.up(block.feed_forward_norm(x1))))
    return model.head(model.norm(torch.cat([x1, x2], -1)))


@given(data=st.data())
@settings(max_examples=8)
def test_logits_and_gradients_match_plain_reformer(data: st.DataObject) -> None:
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
    attentions = [partial(LocalAttention, **shape(), head_dim=3), partial(LSHAttention, **shape(), **hashing)]
    model = small(attentions, causal=causal, feed_forward_chunk_size=data.draw(st.sampled_from([0, 3])))
    length = data.draw(st.integers(1, 12))
    padded_length = length if length <= chunk else -(-length // chunk) * chunk
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    tokens = torch.randint(1, 20, (2, length))
    present = torch.rand(2, length) < data.draw(st.sampled_from([0.6, 1.0]))
    out = model(tokens, present.long())
    padded = torch.nn.functional.pad(tokens, (0, padded_length - length))
    padded_mask = torch.nn.functional.pad(present, (0, padded_length - length))
    expected = torch.stack([plain(model, padded[stream], padded_mask[stream])[:length] for stream in range(2)])
    # float64, but a query without visible keys has scores of -1e9, with seven decimals left.
    assert torch.allclose(out.logits, expected, rtol=0, atol=1e-5)
    upstream = torch.randn_like(expected)
    parameters = list(model.parameters())
    grads = torch.autograd.grad((out.logits * upstream).sum(), parameters, allow_unused=True)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), parameters, allow_unused=True)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        # A query that sees only itself has no gradient through its scores.
        grad, expected_grad = (torch.zeros(1, dtype=torch.float64) if g is None else g for g in (grad, expected_grad))
        assert torch.allclose(grad, expected_grad, rtol=0, atol=1e-4)  # seven decimals, summed over 24 tokens


LAYERS = [partial(LocalAttention, chunk_length=4), partial(LSHAttention, chunk_length=4, num_hashes=2)]
TOKENS = torch.randint(1, 20, (2, 32), generator=torch.Generator().manual_seed(0))


def test_requesting_hidden_states_changes_nothing_else() -> None:
    model = small(
        [partial(LocalAttention, chunk_length=4), partial(LSHAttention, chunk_length=4, num_hashes=2, seed=3)]
    )
    out = model(TOKENS, output_hidden_states=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 32, 8)] * 3
    assert model(TOKENS).hidden_states is None
    assert torch.allclose(model(TOKENS).logits, out.logits, rtol=0, atol=1e-12)
    assert out.last_hidden_state.shape == (2, 32, 16)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, out.logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_buckets", [200, 300, 30_000, (256, 512)])
def test_buckets_fit_into_their_integers(num_buckets: Any) -> None:
    """They are those of the hash function, for any number of buckets, and padding has one of its own after them."""
    torch.manual_seed(0)
    layer = LSHAttention(4, 2, chunk_length=4, num_buckets=num_buckets, num_hashes=2, seed=1)
    x, present = torch.randn(1, 400, 4), torch.ones(1, 400, dtype=torch.bool)
    present[0, -3:] = False
    buckets = layer(x, present, None)[1].long()
    factors = (num_buckets,) if isinstance(num_buckets, int) else num_buckets
    vectors = layer.query_key(x).view(1, 400, 2, 2).transpose(1, 2)
    rotations = sample_rotations(2, 2, 2, factors, 1, vectors)
    expected = hash_vectors(vectors, rotations, factors)
    assert torch.equal(buckets[..., :-3], expected[..., :-3])
    assert (buckets[..., -3:] == math.prod(factors)).all()


@pytest.mark.parametrize("kind", [LocalAttention, LSHAttention])
def test_attention_has_no_biases(kind: Any) -> None:
    """As in the published models; zeros then stay zeros."""
    assert not kind(8, 2)(torch.zeros(1, 6, 8), None, None)[0].any()
    assert not [name for name, _ in kind(8, 2).named_parameters() if "bias" in name]


def test_dropout_is_equal_in_forward_and_backward() -> None:
    attentions = [
        partial(LocalAttention, chunk_length=4, dropout=0.3),
        partial(LSHAttention, chunk_length=4, dropout=0.3, seed=1),
    ]
    model = small(attentions, dropout=0.3).train()

    def loss() -> Tensor:
        torch.manual_seed(7)
        return model(TOKENS).logits.square().sum()

    parameters = list(model.parameters())
    first_loss = loss()
    state = torch.get_rng_state()
    grads = torch.autograd.grad(first_loss, parameters)
    assert torch.equal(torch.get_rng_state(), state)  # the backward pass does not change the generator
    torch.manual_seed(2)
    # A central difference, whose steps are too small to change a hash bucket.
    direction = [torch.randn_like(parameter) * 1e-7 for parameter in parameters]

    def loss_after_step(sign: float) -> float:
        with torch.no_grad():
            for parameter, change in zip(parameters, direction, strict=True):
                parameter.add_(change, alpha=sign)
        moved_loss = float(loss().detach())
        with torch.no_grad():
            for parameter, change in zip(parameters, direction, strict=True):
                parameter.sub_(change, alpha=sign)
        return moved_loss

    slope = sum(float((grad * change).sum()) for grad, change in zip(grads, direction, strict=True))
    # The loss has sixteen digits, and its differences lose ten of them.
    assert slope == pytest.approx((loss_after_step(1.0) - loss_after_step(-1.0)) / 2, rel=1e-4)


class Live(TorchDispatchMode):
    """Counts the bytes of live storages created within it."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.tracked: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.tracked:
                    self.tracked.add(storage._cdata)
                    self.current += storage.nbytes()
                    self.peak = max(self.peak, self.current)
                    weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        return out

    def release(self, key: int, size: int) -> None:
        self.tracked.discard(key)
        self.current -= size


def test_the_memory_of_a_step_does_not_grow_with_depth() -> None:
    def measure_peak(depth: int, keep: bool = False) -> int:
        model = Reformer(20, 16, 2, LAYERS * (depth // 2), 32).train()
        tokens = torch.randint(1, 20, (1, 512))
        weights = sum(weight.nbytes for weight in model.parameters())
        live = Live()
        with live:
            model(tokens, output_hidden_states=keep).logits.square().mean().backward()
        # Gradients have the weights' size and exist twice: in the layers and in the sum.
        return live.peak - 2 * weights

    few, many = measure_peak(4), measure_peak(16)
    assert many < 1.1 * few
    # With hidden states requested, the same measure sees the stored activations.
    assert measure_peak(16, keep=True) > 2 * few


def test_rotations_are_random_without_a_seed() -> None:
    model = small([partial(LSHAttention, chunk_length=4, num_buckets=8)])
    with torch.no_grad():
        assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    seeded = small([partial(LSHAttention, chunk_length=4, num_buckets=8, seed=1)])
    with torch.no_grad():
        assert torch.equal(seeded(TOKENS).logits, seeded(TOKENS).logits)


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    model = small([partial(LocalAttention, chunk_length=4), partial(LSHAttention, chunk_length=4, seed=1)]).float()
    model.save_pretrained(tmp_path)
    again = memtx.from_pretrained(tmp_path)
    assert isinstance(again, Reformer)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalAttention(8, 3), r"dim \(8\) must be divisible by heads \(3\)"),
        (lambda: LocalAttention(8, 2, chunk_length=0), "chunk_length is 0"),
        (lambda: LocalAttention(8, 2, causal=True, num_chunks_after=1), "after is 1"),
        (lambda: LocalAttention(8, 2, num_chunks_before=-1), "num_chunks_before is -1"),
        (lambda: LocalAttention(8, 2, causal=False, num_chunks_after=-1), "num_chunks_after is -1"),
        (lambda: LSHAttention(8, 2, num_hashes=0), "num_hashes is 0"),
        (lambda: LSHAttention(8, 2, num_buckets=3), "num_buckets is 3"),
        (lambda: AxialPositionEmbeddings(8, [4, 4], [4, 5]), "dim is 8"),
        (lambda: AxialPositionEmbeddings(8, [4, 4, 4], [4, 4]), "shape is"),
        (lambda: AxialPositionEmbeddings(8, [4, 0], [4, 4]), r"shape is \[4, 0\]"),
        (lambda: AxialPositionEmbeddings(8, [4, 4], [8, 0]), r"axis_dims is \[8, 0\]"),
        (lambda: small([]), "layers is 0"),
        (lambda: small(LAYERS, feed_forward_chunk_size=-1), "feed_forward_chunk_size is -1"),
        (lambda: small(LAYERS)(torch.ones(1, 65, dtype=torch.int64)), "needs 68 positions, the model has 64"),
        (lambda: small(LAYERS)(TOKENS[0]), "input_ids is"),
        (lambda: small(LAYERS)(TOKENS, TOKENS[:, 1:]), "attention_mask is"),
    ],
)
def test_invalid_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        make()

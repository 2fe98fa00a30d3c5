"""Dropout at every documented site: at a rate next to 1, in training mode, what is dropped is gone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtx import CompressedMemory, Encoder, MemoryTransformer, RecurrentMemory
from memtx.layers.bigbird import BigBirdAttention
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.encoder_attention import EncoderInputs, FullAttention
from memtx.layers.feed_forward import FeedForward, SwiGLU
from memtx.layers.longformer import LongformerAttention
from memtx.layers.reformer import LocalAttention, LSHAttention
from memtx.layers.xlnet import StreamInputs
from memtx.models.heads import SequenceClassificationHead, TokenClassificationHead
from memtx.models.reformer import Reformer
from memtx.models.transformer_xl import TransformerXL
from memtx.models.xlnet import XLNet

ALL = 1 - 1e-12
"""Drops everything: of a million numbers one would remain in a million runs."""

TOKENS = torch.randint(0, 11, (2, 24), generator=torch.Generator().manual_seed(0))


def randomize(module: Any) -> Any:
    """Return the module in float64 and eval mode with random weights, biases and norms included."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def model(kind: str, **options: Any) -> Any:
    sizes: dict[str, Any] = {"dim": 8, "heads": 2}
    memory = partial(CompressedMemory, window=6, compression_rate=2, num_entries=4)
    makers: dict[str, Callable[..., nn.Module]] = {
        "memory_transformer": partial(MemoryTransformer, depth=2, memories=[memory], feed_forward=FeedForward),
        "transformer_xl": partial(TransformerXL, depth=2, memory_length=6),
        "transformer_xl_pre_norm": partial(TransformerXL, depth=2, memory_length=6, pre_norm=True),
        "xlnet": partial(XLNet, depth=2),
        "encoder": partial(Encoder, depth=2),
        "reformer": partial(Reformer, attentions=[partial(LocalAttention, chunk_length=8)]),
    }
    return randomize(makers[kind](11, **sizes, **options))


def outputs(network: Any) -> Tensor:
    """Return the last hidden states."""
    if isinstance(network, MemoryTransformer):
        return network(TOKENS, return_hidden_states=True).hidden_states[-1]
    return network(TOKENS).last_hidden_state


POST_NORM = ("transformer_xl", "xlnet", "encoder")


@pytest.mark.parametrize(
    "kind", ["memory_transformer", "transformer_xl", "transformer_xl_pre_norm", "xlnet", "encoder"]
)
@pytest.mark.parametrize("part", ["attention", "feed_forward"])
def test_both_residual_branches_are_dropped(kind: str, part: str) -> None:
    """The layers then pass on their input, or its norms."""
    network = model(kind, dropout=ALL)
    expected = network.embedding(TOKENS)
    for block in network.blocks:
        block.dropout.train()
        # The other branch is silent, so that only this one can show.
        silent = {"attention": block.feed_forward, "feed_forward": block.attention}[part].out
        for parameter in silent.parameters():
            nn.init.zeros_(parameter)
        if kind in POST_NORM:
            expected = block.feed_forward_norm(block.attention_norm(expected))
    assert torch.equal(outputs(network), expected)
    network.eval()
    assert not torch.allclose(outputs(network), expected)


def test_reformer_drops_both_branches_and_the_inner_states() -> None:
    network = model("reformer", dropout=ALL)
    (block,) = network.blocks
    x = torch.randn(2, 24, 8, dtype=torch.float64)
    block.dropout.train()
    assert not block.attend(x, None, None)[0].any()
    assert not block.feed_forward(x).any()
    block.eval()
    expected = 2 * block.feed_forward(x)
    assert block.attend(x, None, None)[0].all()
    block.dropout.p = 0.5
    block.dropout.train()
    dropped = block.feed_forward(x)
    # Outputs that remain would be doubled exactly if no inner state were dropped.
    assert not torch.isclose(dropped, expected)[dropped != 0].any()


@pytest.mark.parametrize("kind", ["memory_transformer", "transformer_xl", "xlnet"])
def test_embeddings_are_dropped(kind: str) -> None:
    """The outputs are then the same for all tokens."""
    network = model(kind, dropout=ALL)
    network.dropout.train()
    hidden = outputs(network)
    assert torch.allclose(hidden, hidden.roll(1, 0), rtol=0, atol=1e-12)
    network.eval()
    hidden = outputs(network)
    assert not torch.allclose(hidden, hidden.roll(1, 0))


def test_xlnet_drops_the_embedding_of_masks() -> None:
    network = model("xlnet", dropout=ALL)
    targets = torch.eye(24).expand(2, -1, -1)
    network.dropout.train()
    before = network(TOKENS, target_mapping=targets).logits
    nn.init.normal_(network.mask_embedding)
    assert torch.equal(network(TOKENS, target_mapping=targets).logits, before)


@pytest.mark.parametrize("kind", ["transformer_xl", "xlnet"])
def test_distance_embeddings_are_dropped(kind: str) -> None:
    """The order of the tokens before the last one then makes no difference to its output in the first layer."""
    network = model(kind, dropout=ALL)
    del network.blocks[1:]
    network.depth = 1
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    shuffled = x[:, [3, 1, 4, 0, 2, 5]]

    def last_output(x: Tensor) -> Tensor:
        network.embedding.forward = lambda _: x
        if kind == "transformer_xl":
            return network(TOKENS[:1, :6], return_hidden_states=True).hidden_states[-1][:, -1]
        return network(TOKENS[:1, :6]).last_hidden_state[:, -1]

    assert not torch.allclose(last_output(x), last_output(shuffled))
    # The embeddings stay: only two-dimensional inputs, those of distances, are dropped.
    drop = nn.Dropout(ALL)
    network.dropout.forward = lambda y: drop(y) if y.dim() == 2 else y
    assert torch.allclose(last_output(x), last_output(shuffled), rtol=0, atol=1e-12)


def test_published_models_drop_their_outputs() -> None:
    network = model("xlnet", dropout=ALL)
    network.output_dropout.train()
    assert not outputs(network).any()
    network = model("transformer_xl", dropout=ALL)
    network.norm.train()
    logits = network(TOKENS).logits
    assert torch.equal(logits, logits[:1, :1].expand_as(logits))
    network = model("reformer", dropout=ALL)
    network.dropout.train()
    assert not outputs(network).any()


def test_reformer_drops_token_and_position_embeddings() -> None:
    network = model("reformer", dropout=ALL)
    assert network(TOKENS, output_hidden_states=True).hidden_states[0].any()
    network.dropout.train()
    assert not network(TOKENS, output_hidden_states=True).hidden_states[0].any()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("memory_transformer", {}), ("memory_transformer", {"gated_memory": True}), ("transformer_xl", {})],
)
def test_attention_weights_of_decoders_are_dropped(kind: str, options: dict[str, Any]) -> None:
    """A token's output is then a function of the token alone."""
    network = model(kind, attention_dropout=ALL, **options)
    others = TOKENS.clone()
    others[:, :-1] = (others[:, :-1] + 1) % 11
    assert not torch.allclose(network(TOKENS).logits[:, -1], network(others).logits[:, -1])
    network.train()
    assert torch.allclose(network(TOKENS).logits[:, -1], network(others).logits[:, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        FullAttention,
        partial(LongformerAttention, window=4),
        partial(LongformerAttention, window=4, dilation=2),
        partial(LongformerAttention, window=4, num_random_tokens=2),
        partial(BigBirdAttention, block_size=2, num_random_blocks=1),
        partial(BigBirdAttention, block_size=8),
    ],
)
@pytest.mark.parametrize("has_global_tokens", [False, True])
def test_attention_weights_of_encoders_are_dropped(make: Any, has_global_tokens: bool) -> None:
    """Attention then returns the bias of its output projection."""
    layer = randomize(make(8, 2, 1, dropout=ALL))
    x = torch.randn(2, 24, 8, dtype=torch.float64)
    marks = torch.zeros(2, 24, dtype=torch.int64)
    marks[:, [0, 5]] = int(has_global_tokens and layer.supports_global_attention)
    inputs = EncoderInputs.from_masks(TOKENS, global_attention_mask=marks)
    assert not torch.isclose(layer(x, inputs), layer.out.bias).all(-1).any()
    layer.train()
    assert torch.equal(layer(x, inputs), layer.out.bias.expand(2, 24, -1))


@pytest.mark.parametrize("make", [LocalAttention, partial(LSHAttention, seed=1)])
@pytest.mark.parametrize("chunk_length", [4, 64])
def test_attention_weights_of_reformers_are_dropped(make: Any, chunk_length: int) -> None:
    layer = randomize(make(8, 2, chunk_length=chunk_length, dropout=ALL))
    x = torch.randn(2, 24, 8, dtype=torch.float64)
    assert layer(x, None, None)[0].any()
    layer.train()
    assert not layer(x, None, None)[0].any()


def test_attention_weights_of_two_streams_are_dropped() -> None:
    network = model("xlnet", dropout=ALL)
    attention = network.blocks[0].attention
    x = torch.randn(2, 24, 8, dtype=torch.float64)
    arguments = x, attention.project(x), StreamInputs(torch.randn(1, 48, 8, dtype=torch.float64))
    assert attention(*arguments).any()
    attention.train()
    assert not attention(*arguments).any()


@pytest.mark.parametrize("make", [FeedForward, partial(SwiGLU, bias=True)])
def test_inner_states_are_dropped(make: Any) -> None:
    layer = randomize(make(8, dropout=ALL))
    x = torch.randn(3, 8, dtype=torch.float64)
    assert not torch.isclose(layer(x), layer.out.bias).all(-1).any()
    layer.train()
    assert torch.equal(layer(x), layer.out.bias.expand(3, -1))


@pytest.mark.parametrize("kind", ["transformer_xl", "xlnet"])
def test_inner_states_of_published_models_are_dropped(kind: str) -> None:
    layer = model(kind, dropout=ALL).blocks[1].feed_forward.train()
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(layer(x), layer.out.bias.expand(3, -1))


@pytest.mark.parametrize("before_norm", [False, True])
def test_text_embeddings_are_dropped(before_norm: bool) -> None:
    layer = randomize(TextEmbeddings(11, 8, dropout=ALL, dropout_before_norm=before_norm))
    assert layer(TOKENS).any()
    layer.train()
    expected = layer.norm.bias if before_norm else torch.zeros(8, dtype=torch.float64)
    assert torch.equal(layer(TOKENS), expected.expand(2, 24, -1))


@pytest.mark.parametrize("make", [SequenceClassificationHead, TokenClassificationHead])
def test_inputs_of_task_heads_are_dropped(make: Any) -> None:
    head = randomize(make(8, 3, dropout=ALL))
    inputs = (torch.randn(2, 5, 8, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool))
    expected = head.out.bias.expand_as(head(*inputs))
    assert not torch.isclose(head(*inputs), expected).all(-1).any()
    head.train()
    assert torch.equal(head(*inputs), expected)


@pytest.mark.parametrize("same_length", [True, False])
def test_nothing_is_dropped_at_rate_zero(same_length: bool) -> None:
    memory = partial(RecurrentMemory, window=5, same_length=same_length)
    network = randomize(MemoryTransformer(11, dim=8, depth=2, heads=2, memories=[memory]))
    expected = network(TOKENS).logits
    network.train()
    assert torch.equal(network(TOKENS).logits, expected)

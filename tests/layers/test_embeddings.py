"""Input embeddings of encoders against their sum, token by token, and the texts they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.layers.embeddings import TextEmbeddings

PAD = 1


@given(st.booleans(), st.booleans(), st.sampled_from([0, 2]), st.booleans(), st.integers(0, 999))
def test_it_is_the_normalized_sum_of_token_position_and_type(
    roberta_positions: bool, rescale: bool, num_types: int, give_types: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = TextEmbeddings(
        9, 4, 12, type_vocab_size=num_types, pad_token_id=PAD, roberta_positions=roberta_positions,
        rescale_embeddings=rescale, eps=1e-3,
    ).double()  # fmt: skip
    with torch.no_grad():
        for weight in layer.parameters():
            torch.nn.init.normal_(weight)
    tokens, types = torch.randint(0, 9, (2, 7)), torch.randint(0, 2, (2, 7))
    actual = layer(tokens, types if give_types and num_types else None)
    for stream in range(2):
        # RoBERTa counts tokens from PAD + 1 on; padding does not count and is at PAD.
        count = 0
        for index, token in enumerate(tokens[stream].tolist()):
            position = index
            if roberta_positions:
                count += token != PAD
                position = PAD + count if token != PAD else PAD
            x = (
                layer.word_embeddings.weight[token] * (2.0 if rescale else 1.0)
                + layer.position_embeddings.weight[position]
            )
            if num_types:
                x = x + layer.token_type_embeddings.weight[types[stream, index] if give_types else 0]
            expected = F.layer_norm(x, (4,), layer.norm.weight, layer.norm.bias, eps=1e-3)
            torch.testing.assert_close(actual[stream, index], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("roberta_positions", "max_length"), [(False, 12), (True, 10)])
def test_a_text_may_have_as_many_tokens_as_positions(roberta_positions: bool, max_length: int) -> None:
    layer = TextEmbeddings(9, 4, 12, pad_token_id=PAD, roberta_positions=roberta_positions)
    assert layer(torch.full((1, max_length), 2)).shape == (1, max_length, 4)
    with pytest.raises(MemtxError, match=f"A text of {max_length + 1} tokens needs 13 positions, the model has 12"):
        layer(torch.full((1, max_length + 1), 2))


def test_padding_is_not_trained() -> None:
    layer = TextEmbeddings(9, 4, pad_token_id=PAD)
    layer(torch.tensor([[PAD, 2, PAD]])).square().sum().backward()
    gradient = layer.word_embeddings.weight.grad
    assert gradient is not None
    assert not gradient[PAD].any()
    assert gradient[2].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_token_id": 9}, "pad_token_id is 9, but the vocabulary has 9 tokens. Give 0 to 8"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"roberta_positions": True}, "Give pad_token_id"),
    ],
)
def test_invalid_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        TextEmbeddings(9, 4, **options)
    assert TextEmbeddings(9, 4, pad_token_id=8).pad_token_id == 8
    with pytest.raises(MemtxError, match="no token types"):
        TextEmbeddings(9, 4)(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))

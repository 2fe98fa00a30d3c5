"""XLNet's objective: spans in their contexts, orders in which nothing leaks, and segments with memory and two texts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.data.batch import Batch
from memtx.data.hf_tokenizers import WordPieceTokenizer
from memtx.errors import MemtxError
from memtx.models.xlnet import XLNet
from memtx.training.permutation_lm import PermutedModule, sample_permutation, sample_spans


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spans(selected: Tensor) -> list[int]:
    """Return the lengths of the runs of selected tokens."""
    return [len(run) for row in selected.int().tolist() for run in "".join(map(str, row)).split("0") if run]


def test_spans_have_the_published_lengths_and_share() -> None:
    everywhere = torch.ones(40, 3000, dtype=torch.bool)
    selected = sample_spans(everywhere, generator=seeded())
    # 40 x 3,000 tokens, of which one in six is predicted: more than five standard deviations.
    assert float(selected.float().mean()) == pytest.approx(1 / 6, abs=0.005)
    lengths = spans(selected)
    # 1 / L over 1 + 1/2 + ... + 1/5; two spans touch now and then, which makes them longer.
    assert lengths.count(1) / len(lengths) == pytest.approx(0.438, abs=0.05)
    assert lengths.count(5) / len(lengths) == pytest.approx(0.088, abs=0.03)  # five standard deviations
    assert torch.equal(selected, sample_spans(everywhere, generator=seeded()))


def test_spans_begin_at_starts() -> None:
    document_starts = torch.zeros(20, 300, dtype=torch.bool)
    document_starts[:, ::4] = True
    selected = sample_spans(document_starts, generator=seeded())
    first = selected & ~torch.nn.functional.pad(selected, (1, 0))[:, :-1]
    assert first.any()
    assert not (first & ~document_starts).any()


@given(st.integers(1, 40), st.integers(1, 30), st.integers(2, 8), st.integers(1, 6))
def test_the_number_of_targets_is_exact(length: int, num_targets: int, ratio: int, max_span: int) -> None:
    is_start = torch.rand(3, length, generator=seeded(length)) < 0.5
    selected = sample_spans(is_start, context_ratio=ratio, max_span=max_span, num_targets=num_targets)
    assert selected.sum(1).tolist() == [min(num_targets, length)] * 3


def published_mask(is_target: list[bool], is_special: list[bool], index: list[int]) -> Tensor:
    """Transcribe ``_local_perm`` of the original data_utils.py for one part and a given order."""
    n = len(index)
    ordered = [target or special for target, special in zip(is_target, is_special, strict=True)]
    rev_index = [index[i] if ordered[i] else -1 for i in range(n)]
    self_rev_index = [rev_index[i] if is_target[i] else rev_index[i] + 1 for i in range(n)]
    return torch.tensor([[self_rev_index[i] <= rev_index[j] and ordered[j] for j in range(n)] for i in range(n)])


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_the_mask_is_the_published_one(first: int, second: int, seed: int) -> None:
    kinds = torch.randint(0, 4, (2, first + second), generator=seeded(seed))
    is_target, is_special = kinds == 1, kinds == 2
    mask = sample_permutation(is_target, is_special, [first, second], seeded(seed))
    rank = torch.rand(mask.shape[:2], generator=seeded(seed)).argsort(1).argsort(1)
    for row in range(2):
        for part in (slice(0, first), slice(first, None)):
            inputs = (tensor[row, part].tolist() for tensor in (is_target, is_special, rank))
            assert torch.equal(mask[row, part, part], published_mask(*inputs))
    assert mask[:, :first, first:].all()
    assert not mask[:, first:, :first].any()


@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 1000))
def test_no_prediction_knows_its_token(first: int, second: int, seed: int) -> None:
    kinds = torch.randint(0, 3, (1, first + second), generator=seeded(seed))
    kinds[0, 0] = 0  # a token that is not predicted, which every prediction sees
    torch.manual_seed(seed)
    model = XLNet(30, dim=8, depth=3, heads=2, memory_length=3, reuse_length=first).double().eval()
    tokens = torch.randint(0, 30, kinds.shape)
    masks = {"perm_mask": sample_permutation(kinds == 1, kinds == 2, [first, second]),
             "target_mapping": torch.eye(kinds.shape[1])[None]}  # fmt: skip
    state = model(tokens).state
    before = model(tokens, state=state, **masks).logits
    for index in (kinds[0] == 1).nonzero().flatten().tolist():
        other = tokens.clone()
        other[0, index] = (other[0, index] + 1) % 30
        torch.testing.assert_close(
            model(other, state=state, **masks).logits[0, index], before[0, index], atol=0, rtol=0
        )


class Calls:
    """A module of 12 new tokens a call, and the arguments and outputs of its model."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        model = XLNet(30, dim=16, depth=2, heads=2, memory_length=15, reuse_length=12).double()
        module = PermutedModule(lambda _: model, 30, 12, **options)
        tokenizer = WordPieceTokenizer(300)
        tokenizer.train(["some words " * 20])
        module.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=0, world_size=1, datamodule=SimpleNamespace(tokenizer=tokenizer), overfit_batches=0
        )
        self.tokenizer, self.module, self.calls = tokenizer, module, list[tuple[Any, dict[str, Any], Any]]()
        model.register_forward_hook(
            lambda _, inputs, options, output: self.calls.append((inputs, options, output)), with_kwargs=True
        )

    def read(self, tokens: Tensor, document_starts: Tensor | None = None) -> tuple[Any, dict[str, Any], Any]:
        """Read a batch in training and return the newest call."""
        self.module.predict_tokens("train", batch(tokens, document_starts), 0, seeded())
        return self.calls[-1]


def batch(tokens: Tensor, document_starts: Tensor | None = None) -> Batch:
    zeros = torch.zeros(len(tokens), dtype=torch.int64)
    return Batch(
        tokens,
        tokens,
        torch.zeros_like(tokens, dtype=torch.bool) if document_starts is None else document_starts,
        zeros,
        zeros,
    )


def test_every_token_is_read_twice_and_the_first_half_is_carried() -> None:
    """The original's input pipeline moves by reuse_len, and its memory keeps the first reuse_len of a call."""
    calls, (first, second, third) = Calls(num_targets=4), torch.randint(10, 30, (3, 2, 12))
    (inputs, is_token, segments), options, _ = calls.read(first)
    assert torch.equal(inputs[:, 12:], first)
    assert not is_token[:, :12].any()
    assert is_token[:, 12:].all()
    assert not segments.any()
    assert options["target_mapping"].shape == (2, 2, 24)  # half of the targets, as the other half of the call is empty
    (inputs, is_token, _), options, out = calls.read(second)
    assert torch.equal(inputs, torch.cat([first, second], dim=1))
    assert is_token.all()
    assert options["state"].position.tolist() == [0, 0]
    assert options["target_mapping"].sum((1, 2)).tolist() == [4, 4]
    # The embedding of the first half, since the first layer's inputs are carried.
    hidden = out.state.layers[0][0].hidden
    torch.testing.assert_close(hidden[:, -12:], calls.module.model.embedding(first), atol=0, rtol=0)
    (inputs, _, _), options, _ = calls.read(third)
    assert torch.equal(inputs, torch.cat([second, third], dim=1))
    assert options["state"].position.tolist() == [12, 12]
    assert torch.equal(options["state"].layers[0][0].hidden, hidden)


def test_a_document_ends_the_memory() -> None:
    calls, tokens = Calls(), torch.randint(10, 30, (2, 12))
    document_starts = torch.zeros(2, 12, dtype=torch.bool)
    document_starts[1, 5] = True
    for begins in (None, None, document_starts, None):
        calls.read(tokens, begins)
    _, options, out = calls.calls[-1]
    assert options["document_starts"][:, :12].equal(document_starts)
    assert out.state.position.tolist() == [36, 7]


def test_two_texts_have_segments_of_their_own() -> None:
    calls, tokens = Calls(add_special_tokens=True), torch.arange(6, 30).view(2, 12)
    (inputs, _, segments), _, _ = calls.read(tokens)
    sep, cls = calls.tokenizer.sep_token_id, calls.tokenizer.cls_token_id
    for row in range(2):
        ids, types = inputs[row, 12:].tolist(), segments[row, 12:].tolist()
        end = ids.index(sep)
        assert ids[:end] == tokens[row, :end].tolist()
        assert ids[-2:] == [sep, cls]
        assert types == [0] * (end + 1) + [1] * (10 - end) + [2]
        second = slice(end, 9)
        assert ids[end + 1 : -2] in (tokens[row, second].tolist(), tokens[1 - row, second].tolist())
    targets = calls.calls[-1][1]["target_mapping"].float() @ inputs.float()[..., None]
    assert not torch.isin(targets, torch.tensor([sep, cls])).any()


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(MemtxError, match=r"reuse_length is 4, data.segment_length 12"):
        PermutedModule(lambda size: XLNet(size, dim=8, heads=2, reuse_length=4), 30, 12)
    with pytest.raises(MemtxError, match="memory_length is null"):
        PermutedModule(lambda size: XLNet(size, dim=8, heads=2, memory_length=None), 30, 12)
    with pytest.raises(MemtxError, match="context_ratio"):
        sample_spans(torch.ones(1, 4, dtype=torch.bool), context_ratio=1)

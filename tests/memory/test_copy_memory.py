"""The copy memory beside the equations of its papers, in every way of reading a stream."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from memtx import CompressedMemory, CopyMemory, MemoryState, MemoryTransformer, MemtxError
from memtx.inference.decoder import Decoder

VOCAB_SIZE = 13


def build_model(num_entries: int = 6, **options: int | None) -> MemoryTransformer:
    """Return a small model in float64 whose gate depends on the text."""
    memory = partial(CopyMemory, num_entries=num_entries, **{"key_dim": 4, "train_entries": None, **options})
    stack = partial(CompressedMemory, window=5, compression_rate=2, num_entries=3)
    model = MemoryTransformer(VOCAB_SIZE, 8, 2, 2, memories=[stack], output_memory=memory).double().eval()
    assert model.output_memory is not None
    torch.nn.init.normal_(model.output_memory.gate.weight)
    torch.nn.init.constant_(model.output_memory.match_weight, 0.5)
    return model


def streams(seed: int, length: int = 24) -> tuple[Tensor, Tensor]:
    """Return tokens and document starts of two streams."""
    generator = torch.Generator().manual_seed(seed)
    document_starts = torch.rand(2, length, generator=generator) < 0.1
    return torch.randint(VOCAB_SIZE, (2, length), generator=generator), document_starts


def published_prediction(model: MemoryTransformer, tokens: Tensor, document_starts: Tensor) -> Tensor:
    """Return the mixed prediction position by position, from the model without its output memory."""
    memory = model.output_memory
    assert memory is not None
    # The norm's output: the logits of a head that is the identity.
    model.output_memory, head, model.head = None, model.head, torch.nn.Identity()
    hidden = model(tokens, document_starts=document_starts).logits
    model.output_memory, model.head = memory, head
    probs = head(hidden).softmax(-1)
    keys, scale = F.normalize(memory.key(hidden), dim=-1), memory.log_scale.exp()
    for stream in range(tokens.shape[0]):
        first = 0
        for t in range(tokens.shape[1]):
            first = t if document_starts[stream, t] else first
            # Position i and the token after it, both in this document, i among the newest.
            past = [i for i in range(first, t) if i > t - memory.num_entries]
            if not past:
                continue
            scores = torch.stack([scale * (keys[stream, t] @ keys[stream, i]) for i in past])
            match = memory.match_weight * (scores.max() - scale / 2)
            gate, weights = torch.sigmoid(memory.gate(hidden[stream, t])[0] + match), scores.softmax(0)
            copied = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
            for i, weight in zip(past, weights, strict=True):
                copied[tokens[stream, i + 1]] += weight
            probs[stream, t] = (1 - gate) * probs[stream, t] + gate * copied
    return probs


@given(seed=st.integers(0, 999), num_entries=st.integers(2, 30))
@torch.no_grad()
def test_prediction_equals_the_published_equations(seed: int, num_entries: int) -> None:
    torch.manual_seed(seed)
    model, (tokens, document_starts) = build_model(num_entries), streams(seed)
    logits = model(tokens, document_starts=document_starts).logits
    assert (logits.exp() - published_prediction(model, tokens, document_starts)).abs().max() < 1e-12


@given(seed=st.integers(0, 999), cut=st.integers(0, 24))
def test_loss_and_gradients_equal_those_of_the_prediction(seed: int, cut: int) -> None:
    torch.manual_seed(seed)
    model, (tokens, document_starts) = build_model().train(), streams(seed)
    labels = torch.where(torch.rand(tokens.shape) < 0.2, -100, tokens.roll(-1, 1))
    # Two segments, so that gradients also reach keys through the state.
    bounds = [(start, stop) for start, stop in ((0, cut), (cut, 24)) if stop > start]

    def read(with_labels: bool) -> tuple[Tensor, dict[str, Tensor]]:
        total, state = torch.zeros((), dtype=torch.float64), None
        for part in (slice(*bound) for bound in bounds):
            options = {"labels": labels[:, part]} if with_labels else {}
            out = model(tokens[:, part], state, document_starts=document_starts[:, part], **options)
            state = out.state
            if with_labels:
                total = total + out.language_loss * (labels[:, part] != -100).sum()
            else:
                total = total + F.cross_entropy(out.logits.flatten(0, 1), labels[:, part].flatten(), reduction="sum")
        model.zero_grad()
        total.backward()
        return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    (loss, grads), (expected, expected_grads) = read(True), read(False)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).abs().max() < 1e-10, name


@given(seed=st.integers(0, 999), start=st.integers(0, 20))
@torch.no_grad()
def test_decoding_in_place_equals_reading(seed: int, start: int) -> None:
    torch.manual_seed(seed)
    model, (tokens, _) = build_model(), streams(seed)
    expected = model(tokens)
    state = model(tokens[:, :start]).state if start else model.init_state(2)
    decoder = Decoder(model, state)
    logits = torch.stack([decoder.step(token) for token in tokens[:, start:].unbind(1)], dim=1)
    assert (logits - expected.logits[:, start:]).abs().max() < 1e-12
    assert decoder.state.equals(expected.state, atol=1e-12)


@torch.no_grad()
def test_state_of_training_is_read_as_far_as_it_goes() -> None:
    model, (tokens, _) = build_model(10, train_entries=4), streams(0)
    expected = model.train()(tokens[:, :12]).state
    assert expected.layers[-1][0].tokens.shape[1] == 4
    model.eval()
    out = model(tokens[:, 12:], expected)
    assert out.state.layers[-1][0].tokens.shape[1] == 10
    # Only the four newest positions of the past are there to be copied.
    # A query sees one position less than there are entries.
    full = build_model(5)
    full.load_state_dict(model.state_dict())
    first = full(tokens[:, 12:13], full(tokens[:, :12]).state)
    assert (out.logits[:, :1] - first.logits).abs().max() < 1e-12
    decoder = Decoder(model, expected)
    logits = torch.stack([decoder.step(token) for token in tokens[:, 12:].unbind(1)], dim=1)
    assert (logits - out.logits).abs().max() < 1e-12


@torch.no_grad()
def test_state_has_a_byte_a_number_and_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokens = build_model(100, key_dim=32), torch.randint(VOCAB_SIZE, (2, 50))
    exact = model(tokens).logits
    out = model.float()(tokens)
    # A byte a number moves a score by a hundredth of the scale at most.
    assert (out.logits.double() - exact).abs().max() < 0.1
    state = out.state
    copy_state = state.layers[-1][0]
    assert copy_state.keys.nbytes + copy_state.tokens.nbytes == 2 * 100 * (32 + 4)
    state.save(tmp_path / "state", model.fingerprint)
    assert state.equals(MemoryState.load(tmp_path / "state", like=model.init_state(1), fingerprint=model.fingerprint))


@torch.no_grad()
def test_untrained_cache_predicts_what_followed() -> None:
    """With hidden states as keys and no training, a repeated text becomes predictable (Grave et al. 2017)."""
    torch.manual_seed(0)
    model = build_model(64, key_dim=None)
    text = torch.randint(VOCAB_SIZE, (1, 30))
    nll = model(text.repeat(1, 2), labels=text.repeat(1, 2).roll(-1, 1)).nll
    assert nll[:, 35:-1].mean() < nll[:, :29].mean() - 0.01


@pytest.mark.parametrize(("option", "value"), [("num_entries", 1), ("train_entries", 1), ("key_dim", 0)])
def test_bad_number_raises(option: str, value: int) -> None:
    with pytest.raises(MemtxError, match=f"{option} is {value}"):
        CopyMemory(8, **{option: value})


def test_compiled_step_has_one_graph() -> None:
    model, (tokens, _) = build_model().float().train(), streams(0)
    state, labels = model(tokens).state, tokens.roll(-1, 1)
    explanation = torch._dynamo.explain(model)(tokens, state, labels=labels)
    assert explanation.graph_break_count == 0, explanation.break_reasons

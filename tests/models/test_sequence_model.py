"""Models of vectors: results do not depend on segmentation, episodes are independent, heads may be a caller's own."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from memtx import CompressedMemory, CopyMemory, GaussianMixtureHead, MemoryTransformer, SequenceModel, TransformerXL
from memtx.errors import MemtxError
from memtx.training.tbptt import unroll

EXACT = 1e-10
"""float64: sums in another order, about ten thousand operations deep."""

BACKBONE = partial(
    MemoryTransformer, dim=8, depth=2, heads=2,
    memories=[partial(CompressedMemory, window=3, compression_rate=2, num_entries=2)],
)  # fmt: skip


def make_model(**options: object) -> SequenceModel:
    torch.manual_seed(0)
    model = SequenceModel(3, 2, **({"backbone": BACKBONE, "head": GaussianMixtureHead} | options))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double()


def make_inputs(batch_size: int = 3, length: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    labels = torch.randn(batch_size, length, 2, dtype=torch.float64)
    labels[0, 3, 1] = labels[1, 2] = torch.nan
    document_starts = torch.rand(batch_size, length) < 0.2
    return torch.randn(batch_size, length, 3, dtype=torch.float64), labels, document_starts


BACKBONES = {
    "memory": BACKBONE,
    "transformer-xl": partial(TransformerXL, dim=8, depth=2, heads=2, memory_length=4, same_length=True),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_segmentation_changes_nothing(name: str) -> None:
    model, (inputs, labels, document_starts) = make_model(backbone=BACKBONES[name]).eval(), make_inputs()
    full = model(inputs, document_starts=document_starts, labels=labels)
    state, outputs = None, []
    for start, stop in itertools.pairwise([0, 1, 2, 7, 12, 17]):
        part = slice(start, stop)
        out = model(inputs[:, part], state, document_starts=document_starts[:, part], labels=labels[:, part])
        state = out.state
        outputs.append(out)
    assert (full.logits - torch.cat([out.logits for out in outputs], dim=1)).abs().max() < EXACT
    assert (full.nll - torch.cat([out.nll for out in outputs], dim=1)).abs().max() < EXACT
    assert state is not None
    assert full.state.equals(state, atol=EXACT)


def test_an_episode_is_read_as_if_alone() -> None:
    model, (inputs, _, _) = make_model().eval(), make_inputs()
    document_starts = torch.zeros(3, 17, dtype=torch.bool)
    document_starts[1, 6] = True
    output = model(inputs, document_starts=document_starts)
    alone = model(inputs[1:2, 6:])
    assert (output.logits[1:2, 6:] - alone.logits).abs().max() < EXACT
    assert output.state.select([1]).equals(alone.state, atol=EXACT)


def test_unrolled_loss_weighs_every_scored_step_alike() -> None:
    model, (inputs, labels, document_starts) = make_model(), make_inputs()
    model.eval()  # no auxiliary losses
    settings = {"segment_length": 5}
    output = unroll(model, inputs, labels, document_starts, model.init_state(3), **settings)
    nll = model(inputs, document_starts=document_starts, labels=labels).nll
    assert int(output.num_scored) == 3 * 17 - 1
    assert abs(float(output.loss.detach() - nll.sum() / (3 * 17 - 1))) < EXACT
    gradient = torch.autograd.grad(output.loss, list(model.parameters()))
    replayed = unroll(model, inputs, labels, document_starts, model.init_state(3), replay=True, **settings)
    for value, other in zip(gradient, torch.autograd.grad(replayed.loss, list(model.parameters())), strict=True):
        assert torch.allclose(value, other, rtol=0, atol=EXACT)


def test_every_parameter_is_trained_and_saved(tmp_path: Path) -> None:
    model, (inputs, labels, _) = make_model(), make_inputs()
    output = model(inputs, labels=labels)
    output.loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.save_pretrained(tmp_path)
    loaded = SequenceModel.from_pretrained(tmp_path)
    assert loaded.fingerprint == model.fingerprint
    assert torch.equal(loaded(inputs).logits, model.eval()(inputs).logits)


def test_padding_of_streams() -> None:
    model, (inputs, _, _) = make_model().eval(), make_inputs()
    assert model.supports_padding
    valid_length = torch.tensor([17, 4, 0])
    padded = model(inputs, valid_length=valid_length)
    alone = model(inputs[1:2, :4])
    assert (padded.logits[1:2, :4] - alone.logits).abs().max() < EXACT
    assert padded.state.select([1]).equals(alone.state, atol=EXACT)
    assert padded.state.select([2]).equals(model.init_state(1))


class TwoHeads(nn.Module):
    """A head of the caller: logits of actions and a value."""

    def __init__(self, dim: int, output_dim: int) -> None:
        super().__init__()
        self.policy, self.value = nn.Linear(dim, output_dim), nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(x), self.value(x)


def test_a_head_of_the_caller() -> None:
    model, (inputs, labels, _) = make_model(head=TwoHeads), make_inputs()
    policy, value = model(inputs).logits
    assert (policy.shape, value.shape) == ((3, 17, 2), (3, 17, 1))
    with pytest.raises(MemtxError, match=r"the head, TwoHeads, has no nll\(prediction, labels\)"):
        model(inputs, labels=labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": torch.zeros(1, 4, 2)}, r"inputs is torch.float32 \(1, 4, 2\), expected .*length, 3"),
        ({"inputs": torch.zeros(1, 4, 3, dtype=torch.int64)}, "expected floating-point"),
        (
            {"inputs": torch.zeros(1, 4, 3), "labels": torch.zeros(1, 3, 2)},
            r"labels is \(1, 3, 2\), expected \(1, 4, 2\)",
        ),
        ({"inputs": torch.zeros(1, 4, 3), "labels": torch.zeros(1, 4, 1)}, "labels is"),
        (
            {"inputs": torch.zeros(1, 4, 3), "document_starts": torch.zeros(1, 3, dtype=torch.bool)},
            "document_starts is",
        ),
    ],
)
def test_a_wrong_input_is_refused(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        make_model()(**arguments)


def test_a_copy_memory_is_refused() -> None:
    with pytest.raises(MemtxError, match="copies token ids"):
        SequenceModel(1, 1, backbone=partial(BACKBONE, output_memory=CopyMemory))

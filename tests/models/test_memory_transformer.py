"""MemoryTransformer's outputs, options, training, saving and errors."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.nn import functional as F

import memtx
from memtx import Alibi, CompressedMemory, FeedForward, MemoryTransformer, MemtxError, NoMemory, RecurrentMemory
from memtx.errors import CheckpointError
from memtx.layers.feed_forward import SwiGLU
from memtx.memory.associative import AssociativeMemory
from memtx.memory.compression import AttentionPooling, AttentionReconstruction, AutoEncoding
from memtx.memory.memory_tokens import TokenMemory
from tests.memory_zoo import COMPRESSIONS


def small(**options: Any) -> MemoryTransformer:
    torch.manual_seed(0)
    options.setdefault("memories", [partial(CompressedMemory, window=6, compression_rate=3, num_entries=4)])
    return MemoryTransformer(**{"vocab_size": 11, "dim": 8, "depth": 2, "heads": 2, **options})


TOKENS = torch.randint(0, 11, (3, 40), generator=torch.Generator().manual_seed(1))


def test_outputs_have_the_documented_shapes_and_losses() -> None:
    model = small()
    out = model(TOKENS, return_hidden_states=True)
    assert out.logits.shape == (3, 40, 11)
    assert [tuple(h.shape) for h in out.hidden_states] == [(3, 40, 8)] * 3
    assert (out.loss, out.nll, out.aux_losses) == (None, None, {})
    labels = TOKENS.roll(-1, 1)
    labels[:, -1] = -100
    scored = model(TOKENS, labels=labels)
    assert scored.logits is None
    expected = F.cross_entropy(out.logits.transpose(1, 2), labels, reduction="none")
    assert torch.allclose(scored.nll, expected, atol=1e-5)  # float32
    assert torch.allclose(scored.loss, expected[:, :-1].mean(), atol=1e-5)
    assert (scored.nll[:, -1] == 0).all()


def test_all_labels_ignored_gives_zero_loss() -> None:
    out = small()(TOKENS, labels=torch.full_like(TOKENS, -100))
    assert out.loss == 0.0
    out.loss.backward()


@pytest.mark.parametrize("name", sorted(COMPRESSIONS.keys() - {"mean", "max", "most_used"}))
def test_learned_compression_learns_from_language_loss_with_one_segment(name: str) -> None:
    memory = partial(CompressedMemory, window=4, compression_rate=3, num_entries=4, compression=COMPRESSIONS[name])
    model = small(memories=[memory])
    state = model(TOKENS[:, :8]).state.detach()
    # One step first: a layer initialized to zero passes no gradient on.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for part in (slice(8, 20), slice(20, 39)):
        model.zero_grad()
        out = model(TOKENS[:, part], state, labels=TOKENS[:, part.start + 1 : part.stop + 1])
        out.loss.backward()
        state = out.state.detach()
        grads = {key: weight.grad for key, weight in model.named_parameters() if "compression" in key}
        optimizer.step()
    assert grads
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values()), grads.keys()


@pytest.mark.parametrize("reconstruction", [AutoEncoding, AttentionReconstruction])
@pytest.mark.parametrize("name", sorted(COMPRESSIONS.keys() - {"mean", "max", "most_used"}))
def test_only_the_compression_learns_from_reconstruction(name: str, reconstruction: type) -> None:
    memory = partial(
        CompressedMemory,
        window=4,
        compression_rate=3,
        num_entries=4,
        compression=COMPRESSIONS[name],
        reconstruction=reconstruction,
    )
    model = small(memories=[memory])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    out = model(TOKENS[:, :-1], labels=TOKENS[:, 1:])
    (loss,) = out.aux_losses.values()
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    for (parameter, _), gradient in zip(model.named_parameters(), grads, strict=True):
        has_own_loss = ".compression." in parameter or ".reconstruction." in parameter
        if has_own_loss:
            assert gradient is not None, parameter
            assert gradient.abs().max() > 0, parameter
        else:
            assert gradient is None or gradient.abs().max() == 0, parameter
    # The language loss still reaches everything: nothing was detached in place.
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for parameter, tensor in model.named_parameters():
        assert tensor.requires_grad, parameter
        assert tensor.grad is not None, parameter
    again = model(TOKENS[:, :-1], labels=TOKENS[:, 1:])
    again.loss.backward()
    assert all(tensor.grad.abs().max() > 0 for name, tensor in model.named_parameters() if "key_value" in name)


def test_loss_is_the_language_loss_plus_all_auxiliary_losses() -> None:
    write_penalty = partial(AssociativeMemory, heads=2, decay_gate=None, write_penalty=0.5)
    exact = partial(CompressedMemory, window=4, compression_rate=3, num_entries=4, reconstruction=AutoEncoding)
    model = small(memories=[[exact, write_penalty]]).double()
    labels = TOKENS[:, 1:]
    out = model(TOKENS[:, :-1], labels=labels)
    assert len(out.aux_losses) == 2
    assert all(loss > 0 for loss in out.aux_losses.values())
    torch.testing.assert_close(out.language_loss, out.nll.mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(out.loss, out.language_loss + sum(out.aux_losses.values()), rtol=0, atol=1e-12)
    # It is also the value that gradients come from.
    weights = [weight for name, weight in model.named_parameters() if "reconstruction" in name]
    expected = torch.autograd.grad(sum(out.aux_losses.values()), weights, retain_graph=True)
    for grad, expected_grad in zip(torch.autograd.grad(out.loss, weights), expected, strict=True):
        assert expected_grad.abs().max() > 0
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_losses_of_one_name_are_added_within_a_layer_and_averaged_over_layers() -> None:
    def make_memory(penalty: float) -> Any:
        return partial(AssociativeMemory, heads=2, decay_gate=None, write_penalty=penalty)

    model = small(memories=[[partial(RecurrentMemory, window=4), make_memory(0.5), make_memory(0.3)]]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    penalties = [memory for block in model.blocks for memory in block.attention.extra_memories]

    def loss(*active: int) -> Tensor:
        for index, memory in enumerate(penalties):
            memory.write_penalty = 0.5 * (index in active)
        return model(TOKENS[:, :-1], labels=TOKENS[:, 1:]).aux_losses.get("write_penalty", torch.zeros(()))

    expected = loss(0, 1) + loss(2, 3)
    for index in range(4):
        assert loss(index) > 0
    # A layer without the loss is left out of the mean.
    torch.testing.assert_close(loss(0, 1, 2, 3), expected / 2, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss(0, 1), loss(0) + loss(1), rtol=0, atol=1e-12)


def test_reconstruction_runs_in_training_only() -> None:
    model = small(
        memories=[partial(CompressedMemory, window=4, compression_rate=3, num_entries=4, reconstruction=AutoEncoding)]
    )
    assert model.eval()(TOKENS[:, :-1], labels=TOKENS[:, 1:]).aux_losses == {}


def test_every_parameter_has_a_gradient_without_compressed_blocks() -> None:
    memory = partial(CompressedMemory, window=50, compression_rate=3, num_entries=4, reconstruction=AutoEncoding)
    model = small(memories=[memory])
    model(TOKENS[:, :2], labels=TOKENS[:, 1:3]).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    "options",
    [
        {"norm": nn.LayerNorm, "feed_forward": FeedForward, "positions": Alibi, "bias": True},
        {"tie_embeddings": False, "kv_heads": 1, "dropout": 0.1, "attention_dropout": 0.1},
        {"memories": [NoMemory]},
        {"memories": [partial(RecurrentMemory, window=5, same_length=False), NoMemory]},
        {
            "memories": [
                partial(CompressedMemory, window=4, compression_rate=2, num_entries=3, compress_per_segment=True)
            ]
        },
        {"memories": [partial(CompressedMemory, compression=partial(AttentionPooling, heads=2))]},
    ],
)
def test_save_and_load_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    model = small(**options).eval()
    model.save_pretrained(tmp_path / "model")
    for loaded in (memtx.from_pretrained(tmp_path / "model"), MemoryTransformer.from_pretrained(tmp_path / "model")):
        assert isinstance(loaded, MemoryTransformer)
        assert loaded.config == model.config
        assert loaded.fingerprint == model.fingerprint
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_half_precision_round_trip(tmp_path: Path) -> None:
    model = small().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert MemoryTransformer.from_pretrained(tmp_path).embedding.weight.dtype == torch.bfloat16


def test_the_fingerprint_tells_models_apart() -> None:
    first, second = small(), small()
    assert first.fingerprint == second.fingerprint
    with torch.no_grad():
        second.norm.weight[0] += 1e-3
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint != small(positions=Alibi).fingerprint


def _changed(folder: Path, change: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["init_args"].update(dimm=8), "dimm"),
        (lambda c: c["init_args"].update(depth=3), "lacks"),
        (lambda c: c["init_args"].update(depth=1), "unknown"),
        (lambda c: c["init_args"].update(dim=16), "shape"),
        (lambda c: c.update(class_path="os.system"), "os.system"),
        (lambda c: c.update(class_path="memtx.Missing"), "Missing"),
        (lambda c: c.update(version=99), "99"),
        (lambda c: c.clear(), "does not describe"),
    ],
)
def test_mismatched_folder_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    small().save_pretrained(tmp_path)
    _changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        memtx.from_pretrained(tmp_path)


def test_damaged_or_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        memtx.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        memtx.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a valid"):
        memtx.from_pretrained(tmp_path)
    (tmp_path / "some.ckpt").write_bytes(b"PK not a checkpoint")
    with pytest.raises(CheckpointError, match="not a valid checkpoint"):
        memtx.from_pretrained(tmp_path / "some.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="was not written by memtx"):
        memtx.from_pretrained(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 9}, r"dim \(9\) must be divisible by heads \(\d\)"),
        ({"heads": 0}, "heads is 0"),
        ({"kv_heads": 3, "heads": 4}, r"heads \(4\) must be divisible by kv_heads \(3\)"),
        ({"memories": [NoMemory] * 3}, "3 memories for 2 layers"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0"),
        ({"memories": [partial(CompressedMemory, window=0)]}, "window is 0"),
        ({"dim": 6, "heads": 2}, "even width"),
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
    with pytest.raises(MemtxError, match=r"starts is torch\.int64"):
        model(TOKENS, document_starts=TOKENS)
    with pytest.raises(MemtxError, match="batch_size is 0"):
        model.init_state(0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_bias", [None, False, True])
def test_projections_have_the_biases_asked_for(bias: bool, out_bias: bool | None) -> None:
    model = small(bias=bias, out_bias=out_bias)
    projections = model.blocks[1].attention.named_children()
    biased = {name for name, layer in projections if getattr(layer, "bias", None) is not None}
    expected = {"query", "key_value"} if bias else set()
    assert biased == (expected | {"out"} if (bias if out_bias is None else out_bias) else expected)


@pytest.mark.parametrize("feed_forward", [FeedForward, SwiGLU])
def test_weights_start_by_the_rule_of_gpt2(feed_forward: Any) -> None:
    """Normal with 0.02, residual projections with 0.02 / sqrt(2 depth); biases are zero, norms 1."""
    memories = [[partial(RecurrentMemory, window=6), partial(TokenMemory, num_tokens=64, interval=6)]]
    model = small(
        dim=64, depth=3, memories=memories, feed_forward=feed_forward, bias=True, tie_embeddings=False, vocab_size=64
    )
    residual = ("attention.out.weight", "feed_forward.out.weight")
    checked = 0
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            assert not weight.any(), name
        elif weight.dim() == 2 and "extra_memories" not in name:
            checked += 1
            expected = 0.02 / 6**0.5 if name.endswith(residual) else 0.02
            # Five standard errors of the deviation of at least 4,096 numbers.
            assert float(weight.detach().std()) == pytest.approx(expected, rel=0.056), name
    assert checked == 3 * 5 + 3


def test_bf16_autocast_stays_near_float32_and_keeps_the_state_as_it_was() -> None:
    model = small(dim=32).eval()
    exact = model(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(TOKENS)
    assert rough.state.layers[0][0].hidden.dtype == torch.float32
    # bf16 has 8 bits of precision: a hundredth of the logits.
    assert (exact.logits - rough.logits).abs().max() < 0.02 * max(1.0, exact.logits.abs().max())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_equal_gradients_and_stores_less(dropout: float) -> None:
    torch.manual_seed(0)
    memory = partial(
        CompressedMemory, window=8, compression_rate=2, num_entries=4, reconstruction=AttentionReconstruction
    )
    model = MemoryTransformer(11, dim=16, depth=4, heads=2, memories=[memory], dropout=dropout)
    tokens, labels = torch.randint(0, 11, (2, 2, 20)).unbind()
    document_starts = torch.rand(2, 20) < 0.1

    def run(activation_checkpointing: bool) -> tuple[list[Tensor], int]:
        model.activation_checkpointing, saved_bytes = activation_checkpointing, {}
        torch.manual_seed(1)
        state = model(tokens).state.detach()

        def count(x: Tensor) -> Tensor:
            saved_bytes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = model(tokens, state, document_starts=document_starts, labels=labels).loss
        assert loss is not None
        return list(torch.autograd.grad(loss, list(model.parameters()))), sum(saved_bytes.values())

    (plain, all_kept), (again, some_kept) = run(False), run(True)
    # The same operations on the same numbers, including dropout masks.
    assert all(torch.equal(grad, expected) for grad, expected in zip(again, plain, strict=True))
    # The inputs and states of the layers and the loss remain.
    assert some_kept < all_kept / 3


def test_compiles_once_at_any_memory_fill() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = small()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    state = model.init_state(3)
    for start in range(0, 40, 10):
        segment = TOKENS[:, start : start + 10]
        out = compiled(segment, state, document_starts=segment == 3, labels=segment)
        expected = model(segment, state, document_starts=segment == 3, labels=segment)
        assert torch.allclose(out.loss, expected.loss, atol=1e-5)  # float32, sums in another order
        out.loss.backward()
        state = out.state.detach()
    assert counter.frame_count == 1

"""LoRA equals a model with weights W + (alpha / rank) B A, and the base stays frozen."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import memtx
from memtx.checkpoint import pretrained
from memtx.errors import CheckpointError, MemtxError
from memtx.inference.decoder import Decoder
from memtx.memory.compressed import CompressedMemory
from memtx.memory.compression import AttentionReconstruction, MostUsed, StridedConvolution
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.transformer_xl import TransformerXL
from memtx.training.distillation import SelfDistillation
from memtx.training.language import LanguageModule
from memtx.training.lora import LoRA
from tests.hf.test_parity import folders
from tests.memory_zoo import KINDS
from tests.training.small import SEGMENT, adam, data, trainer

pytest.importorskip("peft", reason="the extra 'retrofit' is not installed")

EXACT = 1e-10  # float64, sums in another order
TOKENS = torch.randint(0, 40, (2, 30), generator=torch.Generator().manual_seed(1))
RANK, ALPHA = 3, 5.0
RECONSTRUCTED = partial(
    CompressedMemory,
    window=5,
    compression_rate=2,
    num_entries=4,
    compression=MostUsed,
    reconstruction=AttentionReconstruction,
)
LEARNED = partial(RECONSTRUCTED, compression=StridedConvolution)
STACKS: dict[str, Callable[[], Any]] = {
    **{kind: lambda kind=kind: KINDS[kind](5, 2, 4) for kind in KINDS},  # type: ignore[misc]
    "reconstructed": lambda: RECONSTRUCTED,
    "reconstructed-learned": lambda: LEARNED,
}


def base(memories: Any, **options: Any) -> MemoryTransformer:
    torch.manual_seed(0)
    settings = {"dim": 16, "depth": 2, "heads": 4, "bias": True, **options}
    model = MemoryTransformer(40, memories=[memories], **settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)  # so that attention is far from even
    return model


def learned(model: MemoryTransformer, *targets: str, **options: Any) -> dict[str, torch.nn.Parameter]:
    """Adapt a model with large weights in the adapters, as after training."""
    adapters = LoRA(RANK, ALPHA, target_modules=targets or ("attention.*", "feed_forward.*"), **options)(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in adapters.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return adapters


def by_hand(plain: MemoryTransformer, adapters: dict[str, torch.nn.Parameter]) -> MemoryTransformer:
    """Return the model with W + (alpha / rank) B A in the place of every adapted W."""
    merged = copy.deepcopy(plain)
    parameters = dict(merged.named_parameters())
    with torch.no_grad():
        for name, down in adapters.items():
            layer, is_down, _ = name.partition(".lora_A.")
            if is_down:
                up = adapters[name.replace(".lora_A.", ".lora_B.")]
                parameters[f"{layer}.weight"] += ALPHA / RANK * up @ down
    return merged


def logits(model: MemoryTransformer, *lengths: int) -> Tensor:
    state, parts = None, []
    with torch.no_grad():
        for part in TOKENS.split(list(lengths) or [TOKENS.shape[1]], dim=1):
            out = model(part, state)
            state = out.state
            parts.append(out.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", STACKS)
def test_every_use_of_a_weight_sees_its_adapter(kind: str) -> None:
    plain = base(STACKS[kind](), heads=2, kv_heads=1)
    adapted = copy.deepcopy(plain)
    before = logits(plain)
    LoRA(RANK)(untouched := copy.deepcopy(plain))
    torch.testing.assert_close(logits(untouched), before, rtol=0, atol=EXACT)
    adapters = learned(adapted)
    expected = by_hand(plain, adapters)
    expected_logits = logits(expected)
    assert (expected_logits - before).abs().max() > 0.1
    torch.testing.assert_close(logits(adapted), expected_logits, rtol=0, atol=EXACT)
    torch.testing.assert_close(logits(adapted, 7, 1, 13, 9), expected_logits, rtol=0, atol=EXACT)
    with torch.no_grad():
        decoder = Decoder(adapted, adapted(TOKENS[:, :20]).state)
        steps = torch.stack([decoder.step(TOKENS[:, at]) for at in range(20, 30)], dim=1)
    torch.testing.assert_close(steps, expected_logits[:, 20:], rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", STACKS)
def test_adapters_get_the_gradient_of_the_merged_weight(kind: str) -> None:
    """By the chain rule, from a model of merged weights; what is frozen in it is frozen in them."""
    plain = base(STACKS[kind](), heads=2, kv_heads=1)
    adapted = copy.deepcopy(plain)
    adapters = learned(adapted)
    expected = by_hand(plain, adapters)
    for model in (adapted, expected):
        model.train()(TOKENS, labels=TOKENS).loss.backward()
    grads = {name: parameter.grad for name, parameter in expected.named_parameters()}
    for name, down in adapters.items():
        layer, is_down, _ = name.partition(".lora_A.")
        if not is_down:
            continue
        up = adapters[name.replace(".lora_A.", ".lora_B.")]
        grad = grads[f"{layer}.weight"]
        assert grad is not None
        torch.testing.assert_close(down.grad, ALPHA / RANK * up.T @ grad, rtol=0, atol=EXACT)
        torch.testing.assert_close(up.grad, ALPHA / RANK * grad @ down.T, rtol=0, atol=EXACT)
    for name, parameter in adapted.named_parameters():
        if name not in adapters:
            torch.testing.assert_close(parameter.grad, grads[name.replace(".base_layer.", ".")], rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_hugging_face_models_are_adapted_and_saved(parity: Path, kind: str, tmp_path: Path) -> None:
    for folder in folders(parity, kind):
        memory = partial(CompressedMemory, window=8, compression_rate=2, num_entries=6)
        plain = memtx.from_pretrained(folder).double().with_memory([memory], window=8, num_sinks=2)
        with torch.no_grad():
            for name, parameter in plain.memory_parameters().items():
                if name.endswith(".gate"):
                    parameter.fill_(0.7)
        adapted = copy.deepcopy(plain)
        adapters = learned(adapted)
        expected = logits(by_hand(plain, adapters))
        assert (logits(plain) - expected).abs().max() > 0.1
        torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=EXACT)
        torch.testing.assert_close(logits(adapted, 1, 16, 3, 10), expected, rtol=0, atol=EXACT)
        memtx.hf.save(adapted, tmp_path / folder.name)
        saved, original = (
            load_file(model_folder / "model.safetensors") for model_folder in (tmp_path / folder.name, folder)
        )
        assert saved.keys() == original.keys()
        for name, tensor in original.items():
            assert torch.equal(saved[name], tensor) == (tensor.dim() < 2 or ("attn" not in name and "mlp" not in name))
        again = memtx.from_pretrained(tmp_path / folder.name).double().without_memory(64)
        # Rounded to the folder's float32.
        torch.testing.assert_close(logits(again), logits(adapted.without_memory(64)), rtol=1e-4, atol=1e-4)


def retrofitted(vocab_size: int) -> MemoryTransformer:
    torch.manual_seed(0)
    model = MemoryTransformer(vocab_size, dim=16, depth=2, heads=2, memories=[partial(RecurrentMemory, window=6)])
    return model.with_memory([partial(CompressedMemory, window=6, compression_rate=2, num_entries=8)], num_sinks=2)


def trained(at: Path, lora: LoRA, **options: Any) -> LanguageModule:
    language_module = LanguageModule(
        retrofitted, segment_length=SEGMENT, optimizer=adam, freeze_base=True, lora=lora, **options
    )
    run = trainer(at, max_steps=4, limit_val_batches=0)
    run.fit(language_module, data(at))
    run.save_checkpoint(at / "run.ckpt")
    return language_module


@pytest.mark.parametrize(
    "options",
    [{}, {"replay": True, "activation_checkpointing": True, "distillation": SelfDistillation()}],
    ids=["plain", "all"],
)
def test_only_memories_and_adapters_are_trained(tmp_path: Path, options: dict[str, Any]) -> None:
    before = {name: tensor.clone() for name, tensor in retrofitted(257).state_dict().items()}
    language_module = trained(tmp_path, LoRA(rank=2, dropout=0.1), **options)
    memory = language_module.model.memory_parameters()
    assert memory
    num_adapters = 0
    for name, parameter in language_module.model.named_parameters():
        if name in memory:
            assert not torch.equal(parameter, before[name]), name
        elif ".lora_" in name:
            num_adapters += 1
            assert parameter.count_nonzero() > parameter.numel() // 2, name
        else:
            assert not parameter.requires_grad
            assert parameter.grad is None
            assert torch.equal(parameter, before[name.replace(".base_layer.", ".")]), name
    assert num_adapters == 2 * 2 * 2  # A and B of two linear layers in two blocks


def test_a_model_without_memory_trains_adapters_alone(tmp_path: Path) -> None:
    language_module = LanguageModule(
        lambda size: retrofitted(size).without_memory(6), segment_length=SEGMENT, freeze_base=True, lora=LoRA()
    )
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(language_module, data(tmp_path))
    trainable = {name for name, parameter in language_module.model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)


def test_a_checkpoint_loads_merged_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language_module = trained(tmp_path, LoRA(rank=2, alpha=8, target_modules=["attention.*"]))
    monkeypatch.setitem(sys.modules, "peft", None)
    loaded = MemoryTransformer.from_pretrained(tmp_path / "run.ckpt")
    assert loaded.state_dict().keys() == retrofitted(257).state_dict().keys()
    language_module.model.eval()
    # float32, sums in another order
    torch.testing.assert_close(logits(loaded), logits(language_module.model), rtol=1e-5, atol=1e-5)
    assert (logits(loaded) - logits(retrofitted(257).eval())).abs().max() > 1e-3
    language_module.model.save_pretrained(tmp_path / "saved")
    again = MemoryTransformer.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(loaded))
    # So a session continues in any of them.
    assert language_module.model.fingerprint == loaded.fingerprint == again.fingerprint


def test_a_run_resumes_only_with_equal_adapters(tmp_path: Path) -> None:
    trained(tmp_path, LoRA(rank=2, alpha=8))
    content = pretrained.read_checkpoint(tmp_path / "run.ckpt")
    for other in (
        None,
        LoRA(rank=2, alpha=9),
        LoRA(rank=3, alpha=8),
        LoRA(rank=2, alpha=8, target_modules=["attention.*"]),
    ):
        language_module = LanguageModule(retrofitted, segment_length=SEGMENT, freeze_base=True, lora=other)
        with pytest.raises(CheckpointError, match="'rank': 2, 'alpha': 8"):
            language_module.on_load_checkpoint(content)
    LanguageModule(retrofitted, segment_length=SEGMENT, freeze_base=True, lora=LoRA(2, 8)).on_load_checkpoint(content)


def test_adapters_of_half_precision_weights_are_float32() -> None:
    model = base(partial(RecurrentMemory, window=8)).bfloat16()
    before = logits(model)
    adapters = LoRA()(model)
    assert {adapter.dtype for adapter in adapters.values()} == {torch.float32}
    # A few roundings of bfloat16: sums in another order.
    torch.testing.assert_close(logits(model), before, rtol=2**-6, atol=2**-6)


def test_invalid_options_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"target_modules": []}, "target_modules is empty"),
    ):
        with pytest.raises(MemtxError, match=message):
            LoRA(**options)  # type: ignore[arg-type]
    model = retrofitted(11)
    names = "attention.query, attention.key_value, attention.out, feed_forward.gate_up, feed_forward.out"
    with pytest.raises(MemtxError, match=rf"'attention.qury'.* Did you mean 'attention.query'\? Choose from {names}\."):
        LoRA(target_modules=["attention.out", "attention.qury"])(model)
    assert model.adapter_config is None
    LoRA()(model)
    with pytest.raises(MemtxError, match="adapted by LoRA already"):
        LoRA()(model)
    with pytest.raises(MemtxError, match=r"freeze_base is false\. Set freeze_base"):
        LanguageModule(retrofitted, lora=LoRA())
    with pytest.raises(MemtxError, match="nothing to train: the TransformerXL has no memory with parameters"):
        LanguageModule(partial(TransformerXL, dim=16, depth=1, heads=2), freeze_base=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MemtxError, match=r"LoRA needs peft\. Install it: pip install 'memtx\[retrofit\]'"):
        LoRA()

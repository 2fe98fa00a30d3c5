"""Memory added to a trained model changes nothing within the window, and nothing beyond it before training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import memtx
from memtx.errors import MemtxError
from memtx.inference.decoder import Decoder
from memtx.layers.positions.base import Alibi
from memtx.memory.associative import AssociativeMemory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.compression import MeanPooling
from memtx.memory.memory_tokens import TokenMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.retrieval import RetrievalMemory
from memtx.memory.sinks import SinkMemory
from memtx.memory.slots import SlotMemory
from memtx.models.add_memory import Retrofit
from memtx.models.memory_transformer import MemoryTransformer
from tests.hf import plain
from tests.hf.folders import write

EXACT = 1e-10  # float64, sums in another order
WINDOW = 8
TOKENS = torch.randint(0, 40, (2, 50), generator=torch.Generator().manual_seed(1))
KINDS: dict[str, list[Any]] = {
    "none": [],
    "compressed": [partial(CompressedMemory, window=WINDOW, compression_rate=3, num_entries=4)],
    "mean": [partial(CompressedMemory, window=WINDOW, compression_rate=2, num_entries=6, compression=MeanPooling)],
    "associative": [partial(AssociativeMemory, heads=2)],
    "shared": [partial(AssociativeMemory, heads=2, mix_gate=True)],
    "retrieval": [partial(RetrievalMemory, heads=2, exclude_recent=WINDOW, capacity=20, top_k=3)],
    "slots": [partial(SlotMemory, heads=2, interval=5, num_slots=3)],
    "tokens": [partial(TokenMemory, num_tokens=2, interval=5)],
    "several": [
        partial(AssociativeMemory, heads=2),
        partial(CompressedMemory, window=WINDOW, compression_rate=2, num_entries=5),
        partial(SlotMemory, heads=2, interval=5, num_slots=3),
    ],
}


def model_type(config: dict[str, Any]) -> str:
    return str(config["model_type"])


def base(**options: Any) -> MemoryTransformer:
    torch.manual_seed(0)
    arguments = {"dim": 16, "depth": 3, "heads": 4, "memories": [partial(RecurrentMemory, window=64)], **options}
    model = MemoryTransformer(40, **arguments).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)  # so that attention is far from uniform
    return model


def logits(model: MemoryTransformer, tokens: torch.Tensor = TOKENS, *lengths: int) -> torch.Tensor:
    state, parts = None, []
    with torch.no_grad():
        for part in tokens.split(list(lengths) or [tokens.shape[1]], dim=1):
            out = model(part, state)
            state = out.state
            parts.append(out.logits)
    return torch.cat(parts, dim=1)


def opened(model: MemoryTransformer) -> MemoryTransformer:
    """Open all gates, as training could."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention.gate"):
                parameter.fill_(0.7)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"positions": Alibi, "kv_heads": 2}], ids=["rotary", "alibi"])
def test_closed_gates_change_nothing_but_the_window(kind: str, options: dict[str, Any]) -> None:
    model = base(**options)
    adapted = model.with_memory(KINDS[kind], window=WINDOW, num_sinks=0)
    torch.testing.assert_close(logits(adapted)[:, :WINDOW], logits(model)[:, :WINDOW], rtol=0, atol=EXACT)
    alone = model.with_memory(window=WINDOW, num_sinks=0)
    if not any(memory.func is CompressedMemory for memory in KINDS[kind]):  # which may see one more block exactly
        torch.testing.assert_close(logits(adapted), logits(alone), rtol=0, atol=EXACT)
    # Only the gates hide the memory.
    if KINDS[kind]:
        assert (logits(opened(adapted)) - logits(alone)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_segmentation_invariance(kind: str) -> None:
    adapted = opened(base().with_memory(KINDS[kind], window=WINDOW, num_sinks=2))
    expected = logits(adapted)
    torch.testing.assert_close(logits(adapted, TOKENS, 3, 1, 20, 26), expected, rtol=0, atol=EXACT)
    with torch.no_grad():
        decoder = Decoder(adapted, adapted(TOKENS[:, :30]).state)
        steps = torch.stack([decoder.step(TOKENS[:, index]) for index in range(30, 50)], dim=1)
    torch.testing.assert_close(steps, expected[:, 30:], rtol=0, atol=EXACT)


def test_gate_of_one_equals_a_joint_softmax() -> None:
    memory = partial(CompressedMemory, window=WINDOW, compression_rate=2, num_entries=6, compression=MeanPooling)
    adapted = base().with_memory([memory], num_sinks=0)
    with torch.no_grad():
        for block in adapted.blocks:
            block.attention.gate.fill_(30.0)  # whose tanh is 1 in float64
    joined = base().with_memory([memory], num_sinks=0, gated_memory=False)
    torch.testing.assert_close(logits(adapted), logits(joined), rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind]])
def test_gates_learn_first_and_memories_once_gates_open(kind: str) -> None:
    adapted = base().with_memory(KINDS[kind], window=WINDOW, num_sinks=1).train()
    memory = adapted.memory_parameters()
    adapted(TOKENS, labels=TOKENS).loss.backward()
    gates = [parameter for name, parameter in memory.items() if name.endswith(".attention.gate")]
    assert len(gates) == 3
    assert all(gate.grad.isfinite().all() and (gate.grad != 0).any(-1).all() for gate in gates)
    opened(adapted)(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in memory.values())


def test_weights_are_shared_and_only_chosen_layers_change() -> None:
    model = base()
    adapted = model.with_memory([partial(AssociativeMemory, heads=2)], window=WINDOW, num_sinks=4, layers=[-1])
    assert [len(block.attention.extra_memories) for block in adapted.blocks] == [1, 1, 2]
    assert [block.attention.gate is not None for block in adapted.blocks] == [False, False, True]
    assert all(".2." in name for name in adapted.memory_parameters())
    parameters = dict(adapted.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameters[name] is parameter
    assert len(list(parameters)) == len(list(model.parameters())) + len(adapted.memory_parameters())
    # The original is unchanged.
    assert len(model.blocks[2].attention.extra_memories) == 0
    assert model.blocks[0].attention.memory.window == 64


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    adapted = opened(base().with_memory(KINDS["several"], window=WINDOW, layers=[0, 2]))
    adapted.save_pretrained(tmp_path)
    loaded = MemoryTransformer.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))
    assert loaded.fingerprint == adapted.fingerprint


def test_narrower_layer_window_is_kept() -> None:
    model = base(memories=[partial(RecurrentMemory, window=window) for window in (64, 5, 64)])
    adapted = model.with_memory(window=WINDOW, num_sinks=4)
    assert [block.attention.memory.window for block in adapted.blocks] == [8, 5, 8]
    assert [block.attention.extra_memories[0].exclude_recent for block in adapted.blocks] == [8, 5, 8]


def num_sinks(model: MemoryTransformer) -> list[int]:
    memories = [[*block.attention.extra_memories] for block in model.blocks]
    return [sum(memory.num_sinks for memory in layer if isinstance(memory, SinkMemory)) for layer in memories]


def test_sinks_are_added_where_full_attention_was_trained() -> None:
    model = base(memories=[partial(RecurrentMemory, window=64, trained_length=length) for length in (64, None, 99)])
    adapted = model.with_memory()
    assert num_sinks(adapted) == [4, 0, 4]
    assert num_sinks(adapted.with_memory(window=WINDOW)) == [4, 0, 4]
    assert num_sinks(model.with_memory(num_sinks=2)) == [2, 2, 2]
    # Sinks stay in a layer whose window a compressed memory has replaced, which does not know the trained length.
    again = model.with_memory(KINDS["compressed"]).with_memory(KINDS["mean"])
    assert num_sinks(again) == [4, 0, 4]
    torch.testing.assert_close(logits(base().with_memory()), logits(base()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["none", "associative", "retrieval", "slots"])
@pytest.mark.parametrize("layout", [plain.LLAMA, plain.MISTRAL, plain.QWEN2, plain.QWEN3, plain.GPT2], ids=model_type)
def test_every_layout_computes_what_it_computed(tmp_path: Path, layout: dict[str, Any], kind: str) -> None:
    is_gpt2 = layout["model_type"] == "gpt2"
    # Heads as wide as the model together, as memories with heads need.
    layout = layout | {"num_attention_heads": 12 // layout.get("head_dim", 12), "num_key_value_heads": 1, "n_head": 2}
    folder = write(tmp_path, layout, plain.gpt2(layout) if is_gpt2 else plain.llama(layout))
    tokens = TOKENS[:1].repeat(1, 2)[:, :64]  # all trained positions, far beyond the sliding windows
    if is_gpt2:
        expected = plain.gpt2_logits(layout, plain.gpt2(layout), tokens[0])
    else:
        pairs = layout["head_dim"] // 2
        inv_freq = torch.tensor([100.0 ** (-pair / pairs) for pair in range(pairs)], dtype=torch.float64)
        expected = plain.llama_logits(layout, plain.llama(layout), tokens[0], inv_freq)
    model = MemoryTransformer.from_pretrained(folder).double()
    for adapted in (model.with_memory(KINDS[kind]), Retrofit(str(folder), KINDS[kind])(40).double().eval()):
        for lengths in ((), (5, 40, 19)):
            actual = logits(adapted, tokens, *lengths)[0]
            torch.testing.assert_close(actual, expected, rtol=0, atol=EXACT)
    with torch.no_grad():
        decoder = Decoder(model.with_memory(KINDS[kind]), model.with_memory(KINDS[kind]).init_state(1))
        steps = torch.cat([decoder.step(tokens[:, index]) for index in range(64)])
    torch.testing.assert_close(steps, expected, rtol=0, atol=EXACT)


def test_a_memory_with_a_wider_window_than_its_layer_is_refused() -> None:
    model = base(memories=[partial(RecurrentMemory, window=window) for window in (64, 5, 64)])
    with pytest.raises(MemtxError, match="CompressedMemory has a window of 8, but layer 1 sees 5"):
        model.with_memory(KINDS["compressed"])
    model.with_memory(KINDS["compressed"], layers=[0, 2])


def test_retrofit_adds_memory_to_an_hf_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, plain.QWEN3, plain.llama(plain.QWEN3))
    memory = partial(CompressedMemory, window=WINDOW, compression_rate=2, num_entries=6)
    adapted = Retrofit(str(folder), [memory])(40).eval()
    assert adapted.blocks[0].attention.extra_memories[0].exclude_recent == WINDOW + 1
    tokens = TOKENS[:, :WINDOW]
    assert (logits(adapted, tokens) - logits(memtx.from_pretrained(folder), tokens)).abs().max() < 1e-5
    memtx.hf.save(adapted, tmp_path / "back")
    assert torch.equal(logits(memtx.from_pretrained(tmp_path / "back")), logits(memtx.from_pretrained(folder)))
    with pytest.raises(MemtxError, match="41 ids"):
        Retrofit(str(folder))(41)


def test_invalid_arguments_are_refused() -> None:
    model = base()
    with pytest.raises(MemtxError, match="layers names 3"):
        model.with_memory(layers=[3])
    with pytest.raises(MemtxError, match="num_sinks is -1"):
        model.with_memory(num_sinks=-1)
    with pytest.raises(MemtxError, match="Two memories"):
        model.with_memory([CompressedMemory, CompressedMemory])
    with pytest.raises(MemtxError, match="go through all layers"):
        model.with_memory([partial(TokenMemory, num_tokens=2, interval=5)], layers=[0])
    with pytest.raises(MemtxError, match="16 wide"):
        base(head_dim=6).with_memory([partial(AssociativeMemory, heads=2)])

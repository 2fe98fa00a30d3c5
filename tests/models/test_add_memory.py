"""Memory added to a trained model: nothing changes within the window, nor beyond it before the memory has learned."""

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


def base(**options: Any) -> MemoryTransformer:
    torch.manual_seed(0)
    given = {"dim": 16, "depth": 3, "heads": 4, "memories": [partial(RecurrentMemory, window=64)], **options}
    model = MemoryTransformer(40, **given).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)  # so that attention is far from even
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
    """Open all gates, as training may."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention.gate"):
                parameter.fill_(0.7)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"positions": Alibi, "kv_heads": 2}], ids=["rotary", "alibi"])
def test_within_the_window_nothing_changes_and_beyond_it_nothing_but_the_window(
    kind: str, options: dict[str, Any]
) -> None:
    model = base(**options)
    made = model.with_memory(KINDS[kind], window=WINDOW, num_sinks=0)
    torch.testing.assert_close(logits(made)[:, :WINDOW], logits(model)[:, :WINDOW], rtol=0, atol=EXACT)
    alone = model.with_memory(window=WINDOW, num_sinks=0)
    if not any(one.func is CompressedMemory for one in KINDS[kind]):  # which sees up to a block more exactly
        torch.testing.assert_close(logits(made), logits(alone), rtol=0, atol=EXACT)
    # The gates are what holds it back.
    if KINDS[kind]:
        assert (logits(opened(made)) - logits(alone)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_how_a_stream_is_cut_does_not_matter(kind: str) -> None:
    made = opened(base().with_memory(KINDS[kind], window=WINDOW, num_sinks=2))
    whole = logits(made)
    torch.testing.assert_close(logits(made, TOKENS, 3, 1, 20, 26), whole, rtol=0, atol=EXACT)
    with torch.no_grad():
        decoder = Decoder(made, made(TOKENS[:, :30]).state)
        steps = torch.stack([decoder.step(TOKENS[:, at]) for at in range(30, 50)], dim=1)
    torch.testing.assert_close(steps, whole[:, 30:], rtol=0, atol=EXACT)


def test_a_gate_of_one_is_one_softmax_with_the_bank() -> None:
    memory = partial(CompressedMemory, window=WINDOW, compression_rate=2, num_entries=6, compression=MeanPooling)
    made = base().with_memory([memory], num_sinks=0)
    with torch.no_grad():
        for block in made.blocks:
            block.attention.gate.fill_(30.0)  # whose tanh is 1 in float64
    joined = base().with_memory([memory], num_sinks=0, gated_memory=False)
    torch.testing.assert_close(logits(made), logits(joined), rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind]])
def test_gates_learn_at_once_and_what_they_hold_back_from_then_on(kind: str) -> None:
    made = base().with_memory(KINDS[kind], window=WINDOW, num_sinks=1).train()
    memory = made.memory_parameters()
    made(TOKENS, labels=TOKENS).loss.backward()
    gates = [one for name, one in memory.items() if name.endswith(".attention.gate")]
    assert len(gates) == 3
    assert all(gate.grad.isfinite().all() and (gate.grad != 0).any(-1).all() for gate in gates)
    opened(made)(TOKENS, labels=TOKENS).loss.backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in memory.values())


def test_the_weights_are_shared_and_the_chosen_layers_alone_get_it() -> None:
    model = base()
    made = model.with_memory([partial(AssociativeMemory, heads=2)], window=WINDOW, layers=[-1])
    assert [len(block.attention.extra_memories) for block in made.blocks] == [1, 1, 2]
    assert [block.attention.gate is not None for block in made.blocks] == [False, False, True]
    assert all(".2." in name for name in made.memory_parameters())
    own = dict(made.named_parameters())
    for name, parameter in model.named_parameters():
        assert own[name] is parameter
    assert len(list(own)) == len(list(model.parameters())) + len(made.memory_parameters())
    # The one it was made of is as it was.
    assert len(model.blocks[2].attention.extra_memories) == 0
    assert model.blocks[0].attention.memory.window == 64


def test_kept_on_disk_and_read_back(tmp_path: Path) -> None:
    made = opened(base().with_memory(KINDS["several"], window=WINDOW, layers=[0, 2]))
    made.save_pretrained(tmp_path)
    again = MemoryTransformer.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(made))
    assert again.fingerprint == made.fingerprint


def test_a_narrower_window_of_a_layers_own_is_kept() -> None:
    model = base(memories=[partial(RecurrentMemory, window=own) for own in (64, 5, 64)])
    made = model.with_memory(window=WINDOW)
    assert [block.attention.memory.window for block in made.blocks] == [8, 5, 8]
    assert [block.attention.extra_memories[0].exclude_recent for block in made.blocks] == [8, 5, 8]


def test_a_published_folder_gets_one_in_one_call(tmp_path: Path) -> None:
    folder = write(tmp_path, plain.QWEN3, plain.llama(plain.QWEN3))
    memory = partial(CompressedMemory, window=WINDOW, compression_rate=2, num_entries=6)
    made = Retrofit(str(folder), [memory])(40).eval()
    assert made.blocks[0].attention.extra_memories[0].exclude_recent == WINDOW + 1
    given = TOKENS[:, :WINDOW]
    assert (logits(made, given) - logits(memtx.from_pretrained(folder), given)).abs().max() < 1e-5
    memtx.hf.save(made, tmp_path / "back")
    assert torch.equal(logits(memtx.from_pretrained(tmp_path / "back")), logits(memtx.from_pretrained(folder)))
    with pytest.raises(MemtxError, match="41 ids"):
        Retrofit(str(folder))(41)


def test_what_cannot_be_is_refused() -> None:
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

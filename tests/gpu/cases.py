"""Checks of the CUDA path that test_fake_cuda.py runs in a process of their own, which reads their names."""

from __future__ import annotations

from tests.gpu import fake_cuda  # isort: skip  # before torch

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from memtx import CompressedMemory, MemoryTransformer
from memtx.layers.positions.base import Alibi
from memtx.memory.compression import AttentionReconstruction
from memtx.memory.kv_ring import DecodeStep
from memtx.ops.attention import flex
from memtx.ops.cross_entropy import linear_cross_entropy
from tests.gpu.fake_cuda import GraphCounter, LaunchCounter, MemoryTracker, cuda_autocast
from tests.gpu.fake_inductor import InductorTimer
from tests.memory_zoo import KINDS, READ_ON_HOST

VOCAB = 64


def create_model(depth: int = 2, dim: int = 128, **options: Any) -> MemoryTransformer:
    memory = partial(
        CompressedMemory, window=64, compression_rate=4, num_entries=32, reconstruction=AttentionReconstruction
    )
    return MemoryTransformer(VOCAB, **({"dim": dim, "depth": depth, "heads": 4, "memories": [memory]} | options))


def read_segments(model: Callable[..., Any], init_state: Any, num_segments: int = 2, length: int = 32) -> Any:
    """Read segments with a loss and return its gradient graph's end."""
    state, total = init_state(2), torch.zeros((), device="cuda")
    for _ in range(num_segments):
        tokens = torch.zeros(2, length, dtype=torch.int64, device="cuda")
        out = model(tokens, state, labels=tokens, document_starts=tokens == 1)
        state, total = out.state, total + out.loss
    return total


def check_training_step(depth: int = 1) -> None:
    """A step of a scaled-down pg19.yaml is one graph, compiled once while the memory fills, in at most 15 s.

    The seconds are those of Inductor's code generation, forward and backward.
    """
    memory = partial(
        CompressedMemory, window=128, compression_rate=4, num_entries=128,
        reconstruction=partial(AttentionReconstruction, weight=0.1),
    )  # fmt: skip
    model = MemoryTransformer(32_000, dim=256, depth=depth, heads=4, memories=[memory], dropout=0.1)
    compiler = InductorTimer()
    torch.set_default_device(None)  # as in a run; Inductor makes tensors on the CPU
    compiled = torch.compile(model, backend=compiler, dynamic=False, fullgraph=True)
    with cuda_autocast():
        read_segments(compiled, model.init_state, 4, length=128).backward()
    # The first segment's state needs no gradient, the others' do.
    assert compiler.num_graphs == 2, compiler.num_graphs
    assert model.blocks[0].attention.key_value.weight.grad is not None
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(compiler.seconds) == 2, compiler.seconds  # forward and backward
    print(f"code generation: {compiler.seconds}", file=sys.stderr)
    assert sum(compiler.seconds) <= 15, compiler.seconds


def check_training_step_of_two_layers() -> None:
    """Layers share a graph."""
    check_training_step(2)


def check_activation_checkpointing() -> None:
    """Recomputing layers leaves one graph."""
    model, counter = create_model(1), GraphCounter("eager")
    model.activation_checkpointing = True
    compiled = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
    read_segments(compiled, model.init_state, 1).backward()
    assert counter.num_graphs == 1, counter.num_graphs


def check_flex_graphs() -> None:
    """A model with ALiBi, whose attention is flex_attention, is one graph too."""
    model, counter = create_model(positions=Alibi), GraphCounter("eager")
    compiled = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
    read_segments(compiled, model.init_state, 1)
    assert counter.num_graphs == 1, counter.num_graphs


def check_decoder_graphs() -> None:
    """A decoding step is one graph, with an evicted block and without."""
    model = create_model().eval()
    with torch.no_grad():
        state = model.init_state(2)
        rings, counter = model.to_rings(state), GraphCounter("eager")
        assert rings is not None
        layouts = frozenset(ring.layout for ring in rings)  # type: ignore[attr-defined]
        for evicting in (frozenset(), layouts):

            @partial(torch.compile, backend=counter, dynamic=False, fullgraph=True)
            def step(tokens: Tensor, position: Tensor, evicting: Any = evicting) -> Tensor:
                return model.decode_step(tokens, rings, DecodeStep(position, evicting))

            for _ in range(2):
                step(torch.zeros(2, dtype=torch.int64), state.position)
    assert counter.num_graphs == 2, counter.num_graphs


def check_decode_launches() -> None:
    """At most 12 operators a layer besides the attention kernel, and none on the host."""
    counts = []
    for depth in (2, 3):
        model = create_model(depth).eval()
        decoder = model.to_rings(model.init_state(2))
        assert decoder is not None
        tokens, position = torch.zeros(2, dtype=torch.int64), model.init_state(2).position
        with torch.inference_mode(), LaunchCounter() as counter:
            model.decode_step(tokens, decoder, DecodeStep(position, frozenset()))
        counts.append(counter.counts)
    layer = counts[1] - counts[0]
    assert layer.pop("attend_ring") == 1, layer
    layer.pop("dropout", None)  # the identity in eval mode
    assert sum(layer.values()) <= 12, layer


def check_autograd_functions() -> None:
    """The graph of a loss has no autograd function in Python but those of custom operators and of the loss."""
    names, stack, seen = set(), [read_segments(create_model(), create_model().init_state).grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            names.add(type(node).__name__)
        stack += [parent for parent, _ in node.next_functions]
    assert any("triton_attention" in name for name in names), names
    allowed = {name for name in names if "memtx_triton_attention" in name or name.startswith("_LinearCrossEntropy")}
    assert names == allowed, names


def check_loss_memory() -> None:
    """8 x 512 tokens of 32,000: at most 8 chunks, and 300 MiB beyond the weights' gradient."""
    hidden = torch.zeros(8 * 512, 1024, dtype=torch.bfloat16, requires_grad=True)
    weight, labels = torch.zeros(32_000, 1024, requires_grad=True), torch.zeros(8 * 512, dtype=torch.int64)
    with MemoryTracker() as tracker, cuda_autocast():
        linear_cross_entropy(hidden, weight, labels)[0].backward()
    extra = (tracker.peak - weight.numel() * 4) / 2**20
    assert tracker.counts["_softmax"] <= 8, tracker.counts
    assert extra <= 300, f"{extra:.0f} MiB"


def check_memory(name: str) -> None:
    """A memory kind trains under autocast on CUDA: dtypes fit, and no value is read on the host."""
    model = create_model(memories=[KINDS[name](16, 4, 4)], qk_norm=nn.RMSNorm)
    with cuda_autocast(), patch.object(flex, "_load_flex_attention", lambda _: flex_attention):
        read_segments(model, model.init_state).backward()


CASES: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_") and name != "check_memory"
}
CASES |= {f"memory-{name}": partial(check_memory, name) for name in KINDS if name not in READ_ON_HOST}


def main() -> None:
    """Run the check of each name that is read and print its error as a line of JSON, null if there is none."""
    for line in sys.stdin:
        error = None
        torch._dynamo.reset()
        try:
            with fake_cuda.fake_cuda():
                CASES[line.strip()]()
        except Exception:
            error = traceback.format_exc()
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    main()

"""Cost of training a model, computed before it is trained: parameters, bytes and operations per token.

Operations are counted on a narrow copy of the model with the same layers and memories, late in a document: how often a
weight is applied and which pairs are visible does not depend on the width. Every weight counts 2 operations per vector
that it is applied to, and attention 4 per channel and visible pair of query and key, as a multiply-add counts twice
(Chowdhery et al. 2022, appendix B, which counts all pairs). Bytes are those of a copy of fake tensors, which have a
shape but no data, so that a model of any size takes seconds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer

from memtx import class_config
from memtx.errors import MemtxError
from memtx.layers.lm_head import AdaptiveSoftmax
from memtx.layers.positions.relative import RelativePositions
from memtx.memory.base import Memory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.ops.attention.dispatch import use_attention_hook
from memtx.ops.attention.mask import Visibility, num_visible_pairs
from memtx.ops.cpu.linear import linear
from memtx.state import MemoryState
from memtx.training.optimizers import build_optimizer

FAR_POSITION = 1 << 20
"""Position at which operations are counted, so that every memory is full."""

NARROW_HEAD_DIM = 8
"""Head dimension of the narrow copy."""

PARAMETER_KINDS = ("embedding", "norm", "attention", "feed_forward", "head")
"""Parts of a parameter's name that tell its kind, the first that matches."""


@dataclass(frozen=True)
class FlopsPerToken:
    """Model operations per token.

    Attributes:
        forward: Operations of a forward pass.
        training: Operations of a forward and a backward pass, which takes twice as many where both factors need a
            gradient; recomputed activations do not count.
        includes_attention: If False, the model has another kind of attention, and its pairs are not counted.
    """

    forward: float
    training: float
    includes_attention: bool


def count_flops(model: MemoryTransformer, segment_length: int) -> FlopsPerToken:
    """Count the operations per token of a stream that is read ``segment_length`` tokens per call."""
    try:
        if isinstance(model.head, AdaptiveSoftmax):
            return _count_matrix_products(model, segment_length)
        num_vectors, pairs = _record_operations(make_narrow_copy(model), segment_length)
        includes_attention = True
    except (MemtxError, TypeError, KeyError, ValueError):
        # For other subclasses with other arguments, only linear layers can be counted.
        with _fake_tensor_mode():
            num_vectors, pairs = _record_operations(copy_to_cpu(model), segment_length)
        includes_attention = False
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    forward = training = 0.0
    for (name, needs_grad), count in num_vectors.items():
        weight = layers[name].weight
        forward += 2.0 * weight.numel() * count
        training += 2.0 * weight.numel() * count * (1 + needs_grad + weight.requires_grad)
    if includes_attention:
        init_args = model.config["init_args"]
        head_dim = int(init_args.get("head_dim") or init_args["dim"] // init_args["heads"])
        # Relative positions have a score by distance beside that by content.
        products = 3 if any(isinstance(module, RelativePositions) for module in model.modules()) else 2
        for num_pairs, needs_grad in pairs:
            forward += 2.0 * products * head_dim * num_pairs
            training += 2.0 * products * head_dim * num_pairs * (3 if needs_grad else 1)
    return FlopsPerToken(forward / segment_length, training / segment_length, includes_attention)


def _count_matrix_products(model: MemoryTransformer, segment_length: int) -> FlopsPerToken:
    """Count all products of a segment with a full memory, masked pairs too, with the labels in the short list."""
    from torch.utils.flop_counter import FlopCounterMode

    with _fake_tensor_mode(), FlopCounterMode(display=False) as counter:
        copy = copy_to_cpu(model)
        tokens = torch.zeros(1, segment_length, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16):  # in float32 some products are oneDNN's, which are not counted
            loss = copy(tokens, copy.init_state(1), labels=tokens).loss
        forward = counter.get_total_flops()
        loss.backward()
        training = counter.get_total_flops()
    return FlopsPerToken(forward / segment_length, training / segment_length, includes_attention=True)


def _record_operations(
    model: MemoryTransformer, segment_length: int
) -> tuple[Counter[tuple[str, bool]], list[tuple[int, bool]]]:
    """Read one segment of one stream.

    Returns the number of vectors that each linear layer is applied to, by its name and whether they need a gradient,
    and each attention call's number of visible pairs in all heads, with whether its queries need a gradient.
    """
    num_vectors: Counter[tuple[str, bool]] = Counter()
    pairs: list[tuple[int, bool]] = []

    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def count_vectors(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer in names:
            num_vectors[names[layer], inputs[0].requires_grad] += inputs[0].numel() // inputs[0].shape[-1]

    def count_pairs(q: Tensor, visibility: Visibility) -> None:
        pairs.append((int(num_visible_pairs(visibility).sum()) * q.shape[1], q.requires_grad))

    fresh = model.init_state(1)
    state = MemoryState(torch.full_like(fresh.position, FAR_POSITION), fresh.layers)
    with torch.enable_grad(), use_attention_hook(count_pairs), register_module_forward_pre_hook(count_vectors):
        model(torch.zeros(1, segment_length, dtype=torch.int64), state)
    return num_vectors, pairs


def make_narrow_copy(model: MemoryTransformer) -> MemoryTransformer:
    """Return a CPU model of equal layers and memories but narrow heads; raises CheckpointError if its class cannot."""
    narrow_args = {
        "vocab_size": 2,
        "dim": int(model.config["init_args"]["heads"]) * NARROW_HEAD_DIM,
        "head_dim": None,
        "attention_backend": "auto",
        "dropout": 0.0,
    }
    with torch.random.fork_rng(devices=[]):
        return copy_to_cpu(model, **narrow_args)


def _fake_tensor_mode() -> Any:
    # Imported here because it takes seconds, and a run does not need it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def copy_to_cpu(model: MemoryTransformer, **changed_args: Any) -> MemoryTransformer:
    """Return a copy on the CPU with new weights, or with none under a fake tensor mode."""
    init_args = {**model.config["init_args"], **changed_args}
    with torch.device("cpu"):
        copy: MemoryTransformer = class_config.from_config({**model.config, "init_args": init_args})()
    for parameter, original in zip(copy.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    if isinstance(copy.head, AdaptiveSoftmax):
        copy.head.assumes_short_list = True
    return copy.train()


def activation_bytes(
    model: MemoryTransformer,
    batch_size: int,
    segment_length: int,
    bptt_segments: int = 1,
    *,
    replay: bool = False,
    bf16: bool = False,
) -> int:
    """Return the bytes that a batch stores for its backward pass.

    Args:
        model: Model on any device; not changed.
        batch_size: Streams per batch.
        segment_length: Tokens per call.
        bptt_segments: Segments per backward pass.
        replay: If True, segments are recomputed in the backward pass.
        bf16: If True, matrix products run in bfloat16, as with bf16-mixed.
    """
    storages: dict[int, Any] = {}
    with _fake_tensor_mode():
        fake = copy_to_cpu(model)
        fake.activation_checkpointing = False
        weights = {parameter.untyped_storage()._cdata for parameter in fake.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                storages[storage._cdata] = storage
            return tensor

        tokens = torch.zeros(batch_size, segment_length, dtype=torch.int64)
        document_starts = torch.zeros(batch_size, segment_length, dtype=torch.bool)
        state = fake.init_state(batch_size)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16), hooks:
            fake(tokens, state, document_starts=document_starts, labels=tokens)
    size = sum(int(storage.nbytes()) for storage in storages.values())
    if model.activation_checkpointing:
        # The inputs of every layer, and the activations of one.
        depth = len(model.blocks)
        size = size // depth + depth * batch_size * segment_length * model.dim * 4
    return size + bptt_segments * state.nbytes if replay else size * bptt_segments


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters of each kind of module; shared ones count once."""
    memories = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Memory))
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        kind = next((kind for kind in PARAMETER_KINDS if kind in name), "other")
        counts["memory" if name.startswith(memories) else kind] += parameter.numel()
    return dict(counts)


def optimizer_bytes(model: MemoryTransformer, make_optimizer: Callable[[Any], Optimizer]) -> int:
    """Return the bytes of the optimizer's state; ``make_optimizer`` takes parameter groups."""
    with _fake_tensor_mode():
        optimizer = build_optimizer(make_optimizer, copy_to_cpu(model))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.inference_mode()
def measure_peak_flops(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """Return the FLOP/s of the fastest of several products of ``(size, size)`` matrices; uses no random numbers.

    The product is that of the layers, :func:`memtx.ops.cpu.linear.linear`.
    """
    left = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
    right = left.T.contiguous()
    # Ten in a row on a GPU, whose kernels take microseconds, to exclude the launch.
    count = 10 if device.type == "cuda" else 1

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(count):
            linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds()
    return max(count * 2 * size**3 / seconds() for _ in range(repeats))

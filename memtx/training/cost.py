"""What training a model costs, counted before it is trained: parameters, bytes, and operations a token.

Operations are counted on a narrow copy of the model with the same layers and memories, far into a document: how often
each weight is applied and which pairs are seen depends on no width. They are those of every weight's product with what
it is applied to, and four a channel for every pair of query and key that is seen, a multiply-add counting twice
(Chowdhery et al. 2022, appendix B, with the visible pairs for all pairs). Bytes are those of a copy that has shapes and
no numbers (torch's fake tensors), so that a model of any size is counted in seconds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memtx import class_config
from memtx.errors import MemtxError
from memtx.memory.base import Memory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.ops.attention.dispatch import use_attention_hook
from memtx.ops.attention.mask import Visibility, num_visible_pairs
from memtx.ops.cpu.linear import linear
from memtx.state import MemoryState
from memtx.training.optimizers import make_param_groups

FAR_POSITION = 1 << 20
"""The position at which operations are counted: every memory is full."""

NARROW_HEAD_DIM = 8
"""Width of a head in the copy that operations are counted on."""


@dataclass(frozen=True)
class FlopsPerToken:
    """Model operations a token.

    Attributes:
        forward: of reading.
        training: of a forward and a backward pass, which takes twice as many where a gradient of both factors is asked
            for; what is computed again to save memory does not count.
        includes_attention: whether attention's pairs are among them; False for a model whose attention is of its own
            kind.
    """

    forward: float
    training: float
    includes_attention: bool


def count_flops(model: MemoryTransformer, segment_length: int) -> FlopsPerToken:
    """Count what a token costs, where a row gives ``segment_length`` of them in a call; the model is left as it is."""
    try:
        applied, seen = _record_operations(make_narrow_copy(model), segment_length)
        scores = True
    except (MemtxError, TypeError, KeyError, ValueError):
        # Of another class than the memory transformer: its maps alone can be counted.
        with _fake_tensor_mode():
            applied, seen = _record_operations(copy_to_cpu(model), segment_length)
        scores = False
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    forward = training = 0.0
    for (name, learns), places in applied.items():
        weight = linear[name].weight
        forward += 2.0 * weight.numel() * places
        training += 2.0 * weight.numel() * places * (1 + learns + weight.requires_grad)
    if scores:
        given = model.config["init_args"]
        width = int(given["heads"]) * int(given.get("head_dim") or given["dim"] // given["heads"])
        for number, learns in seen:
            forward += 4.0 * width * number
            training += 4.0 * width * number * (3 if learns else 1)
    return FlopsPerToken(forward / segment_length, training / segment_length, scores)


def _record_operations(
    model: MemoryTransformer, segment_length: int
) -> tuple[Counter[tuple[str, bool]], list[tuple[int, bool]]]:
    """Read one segment of one row.

    Returns:
        how many places each linear map is applied to, by whether the gradient of these is asked for; and the pairs that
        each call of attention sees, likewise.
    """
    applied: Counter[tuple[str, bool]] = Counter()
    seen: list[tuple[int, bool]] = []

    def told(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, given: tuple[Tensor, ...]) -> None:
            applied[name, given[0].requires_grad] += given[0].numel() // given[0].shape[-1]

        return hook

    def watch(q: Tensor, visibility: Visibility) -> None:
        seen.append((int(num_visible_pairs(visibility).sum()), q.requires_grad))

    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(told(name))
    fresh = model.init_state(1)
    state = MemoryState(torch.full_like(fresh.position, FAR_POSITION), fresh.layers)
    with torch.enable_grad(), use_attention_hook(watch):
        model(torch.zeros(1, segment_length, dtype=torch.int64), state)
    return applied, seen


def make_narrow_copy(model: MemoryTransformer) -> MemoryTransformer:
    """Return a model on the CPU with the same layers, heads and memories, each head as narrow as can be.

    Raises:
        CheckpointError: it is of another class, which takes other arguments.
    """
    given = dict(model.config["init_args"])
    small = {
        "vocab_size": 2,
        "dim": int(given["heads"]) * NARROW_HEAD_DIM,
        "head_dim": None,
        "attention_backend": "auto",
        "dropout": 0.0,
    }
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        made = class_config.from_config({**model.config, "init_args": {**given, **small}})()
    return cast(MemoryTransformer, _copy_requires_grad(made, model))


def _fake_tensor_mode() -> Any:
    """Return the mode in which tensors have shapes and no numbers."""
    # Not at the top: it takes seconds to be imported, and a run has no use for it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def copy_to_cpu(model: MemoryTransformer) -> MemoryTransformer:
    """Return a copy on the CPU; to be called where tensors have no numbers."""
    with torch.device("cpu"):
        return cast(MemoryTransformer, _copy_requires_grad(class_config.from_config(model.config)(), model))


def _copy_requires_grad(target: nn.Module, source: nn.Module) -> nn.Module:
    for own, other in zip(target.parameters(), source.parameters(), strict=True):
        own.requires_grad_(other.requires_grad)
    return target.train()


def activation_bytes(
    model: MemoryTransformer,
    batch_size: int,
    segment_length: int,
    bptt_segments: int = 1,
    *,
    replay: bool = False,
    bf16: bool = False,
) -> int:
    """Return the bytes that a batch keeps for its backward pass.

    Args:
        model: on any device; left as it is.
        batch_size: streams read side by side.
        segment_length: tokens a row gives the model in one call.
        bptt_segments: segments a backward pass.
        replay: whether segments are computed again in the backward pass.
        bf16: whether matrices are multiplied in bf16, as with bf16-mixed.
    """
    kept: dict[int, Any] = {}
    with _fake_tensor_mode():
        shapes = copy_to_cpu(model)
        shapes.activation_checkpointing = False
        known = {one.untyped_storage()._cdata for one in shapes.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                kept[storage._cdata] = storage
            return tensor

        tokens = torch.zeros(batch_size, segment_length, dtype=torch.int64)
        starts = torch.zeros(batch_size, segment_length, dtype=torch.bool)
        state = shapes.init_state(batch_size)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16), hooks:
            shapes(tokens, state, document_starts=starts, labels=tokens)
    size = sum(int(storage.nbytes()) for storage in kept.values())
    if model.activation_checkpointing:
        # Every layer's inputs, and one layer as it is computed again.
        layers = len(model.blocks)
        size = size // layers + layers * batch_size * segment_length * model.dim * 4
    return size + bptt_segments * state.nbytes if replay else size * bptt_segments


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return how many parameters each kind of part has; shared ones count once."""
    found: Counter[str] = Counter()
    known: set[int] = set()
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in known:
            continue
        known.add(id(parameter))
        above = name.split(".")[:-1]
        owners = [modules[".".join(above[:place])] for place in range(1, len(above) + 1)]
        found[_classify_parameter(name, owners)] += parameter.numel()
    return dict(found)


def _classify_parameter(name: str, owners: Iterable[nn.Module]) -> str:
    if any(isinstance(owner, Memory) for owner in owners):
        return "memory"
    for word, part in (
        ("embedding", "embedding"),
        ("norm", "norm"),
        ("attention", "attention"),
        ("feed_forward", "feed_forward"),
        ("head", "head"),
    ):
        if word in name:
            return part
    return "other"


def optimizer_bytes(model: MemoryTransformer, make_optimizer: Callable[[Any], Optimizer]) -> int:
    """Return the bytes that an optimiser keeps beside weights and gradients; ``make_optimizer`` takes the groups."""
    with _fake_tensor_mode():
        optimizer = make_optimizer(make_param_groups(copy_to_cpu(model)))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in kept)


@torch.inference_mode()
def measure_peak_flops(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """Return the FLOP/s of the fastest of several products of two (size, size) matrices; draws no random number.

    They are made as the layers make theirs, :func:`memtx.ops.cpu.linear.linear`: torch's way or a faster one.
    """
    left = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
    right = left.T.contiguous()
    # A GPU's kernel is over in microseconds: ten in a row, so that the launch is not what is measured.
    number = 10 if device.type == "cuda" else 1

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(number):
            linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    seconds()
    return max(number * 2 * size**3 / seconds() for _ in range(repeats))

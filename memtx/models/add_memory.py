"""Memories added to the layers of a trained model: an exact window, sinks, and others in chosen layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from memtx import class_config
from memtx.errors import MemtxError, check_at_least
from memtx.layers.attention import MemoryAttention
from memtx.layers.token_mixer import TokenMixer
from memtx.memory.base import Memory, ReadoutMemory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.copy_memory import CopyMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.sinks import SinkMemory
from memtx.models.layer_factories import MemoryFactory
from memtx.models.memory_transformer import MemoryTransformer

ModelT = TypeVar("ModelT", bound=MemoryTransformer)

DEFAULT_NUM_SINKS = 4
"""Default number of sinks where full attention was trained (Xiao et al. 2023, section 3.2)."""


def add_memory(
    model: ModelT,
    memories: Sequence[MemoryFactory] | MemoryFactory = (),
    *,
    window: int | None = None,
    num_sinks: int | None = None,
    layers: Sequence[int] | None = None,
    gated_memory: bool = True,
    output_memory: Callable[[int], CopyMemory] | None = None,
) -> ModelT:
    """Return a copy of a model, which shares its weights, with an exact window, sinks and other memories.

    Layers whose memory replaces attention, such as ``GatedDeltaNet``, stay as they are.

    Args:
        model: The model.
        memories: Factories of the memories of the chosen layers, given dim. One that carries the segment itself, such
            as ``CompressedMemory``, replaces the window there.
        window: Exact positions seen, at most each layer's present window, which is the default.
        num_sinks: Number of first tokens of a document that every layer always sees. Defaults to 4 in layers that were
            trained with full attention (``trained_length``), to the present number in layers that have sinks, and to 0
            in others, which were trained with a window that slides.
        layers: Layers that get the memories, from 0, negative from the end. Defaults to all.
        gated_memory: If True, memories enter through gates that begin at 0, so that outputs change only with training.
        output_memory: Factory of a memory that is mixed into the prediction, given dim, in place of the present one;
            its share begins at ``sigmoid(gate_init)``. Defaults to the present one.

    Raises:
        MemtxError: A number is out of range, or a memory does not fit its layer.
    """
    check_at_least(0, num_sinks=num_sinks or 0)
    if window is not None:
        check_at_least(1, window=window)
    factories = list(memories) if isinstance(memories, Sequence) else [memories]
    chosen = _resolve_layers(layers, model.depth)
    adapted = copy_with_shared_weights(model)
    configs = []
    for layer, block in enumerate(adapted._layers()):
        if isinstance(block.attention, TokenMixer):
            # The memory in place of attention has a constant size already.
            if layers is not None and layer in chosen:
                message = f"Layer {layer} has {type(block.attention.memory).__name__} in place of attention."
                raise MemtxError(message, "Remove the layer from layers.")
            configs.append(_present_config(model, layer))
            continue
        layer_factories, layer_memories = _build_stack(
            layer, block.attention, factories if layer in chosen else [], window, num_sinks
        )
        block.attention.set_memories(layer_memories[0], layer_memories[1:], gated_memory=gated_memory)
        configs.append(class_config.to_config(layer_factories))
    if output_memory is not None:
        adapted.output_memory = output_memory(model.dim)
        adapted.config["init_args"]["output_memory"] = class_config.to_config(output_memory)
    adapted.init_memory_tokens()
    if adapted.memory_tokens is not None:
        nn.init.normal_(adapted.write_tokens, std=0.02)
    weight = next(model.blocks.parameters())
    adapted.to(weight.device, weight.dtype)
    _update_init_args(adapted, configs, gated_memory)
    return adapted.train(model.training)


def remove_memory(model: ModelT, window: int) -> ModelT:
    """Return a copy of a model, which shares its weights, that sees ``window`` (at least 1) exact positions alone."""
    factory = partial(RecurrentMemory, window=window)
    adapted = copy_with_shared_weights(model)
    configs = []
    for layer, block in enumerate(adapted._layers()):
        if isinstance(block.attention, TokenMixer):
            configs.append(_present_config(model, layer))
        else:
            block.attention.set_memories(factory(model.dim), [], gated_memory=False)
            configs.append(class_config.to_config(factory))
    adapted.memory_tokens = adapted.output_memory = None
    adapted.config["init_args"].pop("output_memory", None)
    equal = all(config == configs[0] for config in configs)
    _update_init_args(adapted, configs[:1] if equal else configs, gated_memory=False)
    return adapted


def _present_config(model: MemoryTransformer, layer: int) -> Any:
    """Return the config of a layer's memories as the model was built, with one entry per layer or one for all."""
    memories = model.config["init_args"]["memories"]
    return memories[layer if len(memories) > 1 else 0]


def _resolve_layers(layers: Sequence[int] | None, depth: int) -> set[int]:
    if layers is None:
        return set(range(depth))
    for layer in layers:
        if not -depth <= layer < depth:
            raise MemtxError(f"layers names {layer}, but there are {depth} layers.", f"Give {-depth} to {depth - 1}.")
    return {layer % depth for layer in layers}


def _build_stack(
    layer: int,
    attention: MemoryAttention,
    factories: Sequence[MemoryFactory],
    window: int | None,
    num_sinks: int | None,
) -> tuple[list[MemoryFactory], list[Memory[Any]]]:
    """Return the factories of a layer's new memories and the memories, the exact one first."""
    present = attention.memory
    present_window = getattr(present, "window", None)
    if not isinstance(present, RecurrentMemory | CompressedMemory) or present_window is None:
        message = f"Layer {layer} has {type(present).__name__}, which has no window to replace."
        raise MemtxError(message, "Add memory to a model with RecurrentMemory or CompressedMemory.")
    window = present_window if window is None else min(present_window, window)
    trained_length = present.trained_length if isinstance(present, RecurrentMemory) else None
    if num_sinks is None:
        present_sinks = (memory for memory in attention.extra_memories if isinstance(memory, SinkMemory))
        default = DEFAULT_NUM_SINKS if trained_length is not None else 0
        num_sinks = next((memory.num_sinks for memory in present_sinks), default)
    stack = [(factory, factory(present.dim)) for factory in factories]
    exact = [entry for entry in stack if not isinstance(entry[1], ReadoutMemory)]
    if len(exact) > 1:
        raise MemtxError("Two memories would carry the segment itself.", "Give one, such as CompressedMemory.")
    if not exact:
        factory = partial(RecurrentMemory, window=window, trained_length=trained_length)
        exact = [(factory, factory(present.dim))]
    if (new_window := getattr(exact[0][1], "window", window)) > present_window:
        message = f"{type(exact[0][1]).__name__} has a window of {new_window}, but layer {layer} sees {present_window}."
        raise MemtxError(message, "Give a window that is at most the layer's, or other layers.")
    # A compressed memory may keep one exact block more than the window.
    cache_length = exact[0][1].cache_length if isinstance(exact[0][1], CompressedMemory) else window
    if num_sinks:
        sinks = partial(SinkMemory, num_sinks=num_sinks, exclude_recent=cache_length, use_positions=True)
        exact.append((sinks, sinks(present.dim)))
    stack = [*exact, *(entry for entry in stack if isinstance(entry[1], ReadoutMemory))]
    return [factory for factory, _ in stack], [memory for _, memory in stack]


def _update_init_args(model: MemoryTransformer, memories: Any, gated_memory: bool) -> None:
    init_args = {**model.config["init_args"], "memories": memories, "gated_memory": gated_memory}
    model.config = {**model.config, "init_args": init_args}


def copy_with_shared_weights(model: ModelT) -> ModelT:
    """Return a copy whose parameters and buffers are the model's own tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


class Retrofit:
    """Factory of a trained model with added memory, for a config: see :func:`add_memory`.

    Args:
        path: Hugging Face decoder, pretrained folder or training checkpoint.
        memories: Factories of the memories of the chosen layers, given dim.
        window: Exact positions seen. Defaults to each layer's present window.
        num_sinks: Number of first tokens of a document that every layer always sees. Defaults as in
            :func:`add_memory`.
        layers: Layers that get the memories. Defaults to all.
        gated_memory: If True, memories enter through gates that begin at 0.
        output_memory: Factory of a memory that is mixed into the prediction, given dim.
    """

    def __init__(
        self,
        path: str | None = None,
        memories: Sequence[MemoryFactory] = (),
        window: int | None = None,
        num_sinks: int | None = None,
        layers: Sequence[int] | None = None,
        gated_memory: bool = True,
        output_memory: Callable[[int], CopyMemory] | None = None,
    ) -> None:
        self.path = path
        self._options: dict[str, Any] = {"window": window, "num_sinks": num_sinks, "layers": layers}
        self._options |= {"memories": memories, "gated_memory": gated_memory, "output_memory": output_memory}

    def __call__(self, vocab_size: int) -> MemoryTransformer:
        """Return the model in training mode; ``vocab_size`` is that of the tokenizer, which must be the model's own.

        Raises MemtxError if ``path`` is missing, the tokenizer does not fit the model, or the model cannot be loaded or
        take the memories.
        """
        if self.path is None:
            hint = "Add --model.model.init_args.path FOLDER --data.tokenizer.init_args.path FOLDER/tokenizer.json."
            raise MemtxError("Retrofit has no model path.", hint)
        model = MemoryTransformer.from_pretrained(self.path)
        if vocab_size > model.vocab_size:
            hint = "Use the model's tokenizer: --data.tokenizer.init_args.path FOLDER/tokenizer.json."
            message = f"The tokenizer has {vocab_size} ids, the model in '{self.path}' {model.vocab_size}."
            raise MemtxError(message, hint)
        return add_memory(model, **self._options).train()

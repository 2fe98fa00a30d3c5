"""Training beside a frozen base: memories alone, or with LoRA (Hu et al. 2021) by the optional package peft.

peft replaces each adapted layer by a module. Code that uses the layer calls that module, so memories that project with
a layer's weights see the adapted ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from memtx.checkpoint.lora import BASE_LAYER, LoRAConfig, is_lora_parameter
from memtx.errors import (
    MemtxError,
    check_at_least,
    check_positive,
    check_probability,
    closest_match,
    missing_package_error,
)
from memtx.models.memory_transformer import MemoryTransformer

DEFAULT_TARGETS = ("attention.query", "attention.key_value", "attention.mixer.qkv")
"""Queries, keys and values of layers with attention and of those with a memory in its place."""


class LoRA:
    """Adds low-rank matrices to linear layers of a model: W x becomes W x + (alpha / rank) B A x.

    A is random and B is zero at first, so the model's outputs do not change. Models written or opened by
    ``save_pretrained``, :func:`memtx.hf.save` or ``from_pretrained`` of a run's checkpoint have B A merged into W.

    Args:
        rank: Rank of A ``(rank, in)`` and B ``(out, rank)``.
        alpha: Scale of B A is ``alpha / rank``.
        dropout: Dropout rate of A's input.
        target_modules: Patterns of names within a layer, such as ``attention.query``, ``attention.key_value`` (both in
            one), ``attention.out`` and ``feed_forward.*``; linear layers of memories are never adapted, except for a
            memory in place of attention, ``attention.mixer.*``. Defaults to queries, keys and values.

    Raises:
        MemtxError: A number is out of range, ``target_modules`` is empty, or peft is not installed.
    """

    def __init__(
        self, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, target_modules: Sequence[str] = DEFAULT_TARGETS
    ) -> None:
        check_at_least(1, rank=rank)
        check_positive(alpha=alpha)
        check_probability(dropout=dropout)
        if not target_modules:
            raise MemtxError("LoRA's target_modules is empty.", "Name linear layers, such as attention.query.")
        _import_peft()
        self.lora_config = LoRAConfig(rank, alpha, dropout, tuple(target_modules))

    def __call__(self, model: MemoryTransformer) -> dict[str, nn.Parameter]:
        """Adapt a model in place and return every A and B by name; other parameters keep their ``requires_grad``.

        Raises:
            MemtxError: The model is adapted already, or a pattern matches no linear layer.
        """
        if model.adapter_config is not None:
            raise MemtxError("The model is adapted by LoRA already.", "Adapt it once, with all target_modules.")
        peft, config = _import_peft(), self.lora_config
        names = _match_targets(_linear_layer_names(model), config.target_modules)
        requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        peft_config = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            # A pattern, because peft takes names in a list for suffixes too.
            target_modules="|".join(map(re.escape, names)),
        )
        # The layers only, because peft would take the model's config for one of its own type.
        peft.inject_adapter_in_model(peft_config, model.blocks)
        model.adapter_config = config
        adapters = {}
        for name, parameter in model.named_parameters():
            if is_lora_parameter(name):
                adapters[name] = parameter
                # Small steps would be lost in half precision.
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            else:
                # peft froze all others.
                parameter.requires_grad_(requires_grad[name.replace(BASE_LAYER, ".")])
        return adapters


def freeze_base_model(model: MemoryTransformer, lora: LoRA | None = None) -> None:
    """Freeze all parameters but those of memories and, with ``lora``, adapters; raises MemtxError if none remain."""
    adapters = lora(model) if lora is not None else {}
    trained = {id(parameter) for parameter in (*model.memory_parameters().values(), *adapters.values())}
    if not trained:
        raise MemtxError(
            f"freeze_base leaves nothing to train: the {type(model).__name__} has no memory with parameters.",
            "Add one, such as CompressedMemory with its gates, adapt the model with lora, or remove freeze_base.",
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise missing_package_error("LoRA", error, "retrofit") from error
    return peft


def _linear_layer_names(model: MemoryTransformer) -> list[str]:
    """Return the names of the linear layers outside memories: ``0.attention.query``, ..."""
    memories = (".attention.memory.", ".attention.extra_memories.")
    return [
        name
        for name, module in model.blocks.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in memories)
    ]


def _match_targets(layer_names: Iterable[str], target_modules: Sequence[str]) -> list[str]:
    """Return the layer names that match a pattern; raise MemtxError for a pattern without a match."""
    short_names = {name: name.partition(".")[2] for name in layer_names}
    for target in target_modules:
        if tuple(target_modules) == DEFAULT_TARGETS and any(name in DEFAULT_TARGETS for name in short_names.values()):
            continue  # few models have both kinds of layers
        if not any(fnmatchcase(name, target) for name in short_names.values()):
            names = list(dict.fromkeys(short_names.values()))
            raise MemtxError(
                f"LoRA's target_modules has '{target}', which matches no linear layer.{closest_match(target, names)}",
                f"Choose from {', '.join(names)}.",
            )
    return [name for name, short in short_names.items() if any(fnmatchcase(short, target) for target in target_modules)]

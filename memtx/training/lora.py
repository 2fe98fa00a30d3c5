"""LoRA (Hu et al. 2021): maps of a frozen base learn by low-rank matrices beside them, through the package peft.

The package is optional, and imported here alone when an adapter is asked for. It puts a module in each map's place, and
whatever uses the map calls that module: memories that project by a layer's maps see what these have learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from memtx.checkpoint.lora import BASE_LAYER, LoRAConfig, is_lora_parameter
from memtx.errors import MemtxError, check_at_least, check_positive, closest_match, missing_package_error
from memtx.models.memory_transformer import MemoryTransformer


class LoRA:
    """Puts low-rank matrices beside maps of a model's layers: W x becomes W x + (alpha / rank) B A x.

    A is drawn and B begins at 0, so that the model computes what it computed. What is kept of it for reading, by
    ``save_pretrained``, :func:`memtx.hf.save` or ``from_pretrained`` of a run's checkpoint, has B A added to W.

    Args:
        rank: width between A, (rank, into), and B, (out, rank).
        alpha: B A counts alpha / rank.
        dropout: of what A is given, in training.
        target_modules: maps, by patterns of their names within a layer, such as ``attention.query``,
            ``attention.key_value`` (which is both in one), ``attention.out`` and ``feed_forward.*``; a memory's own are
            none of them.

    Raises:
        MemtxError: a number is out of range, there is no target, or the package peft is not installed.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: Sequence[str] = ("attention.query", "attention.key_value"),
    ) -> None:
        check_at_least(1, rank=rank)
        check_positive(alpha=alpha)
        if not 0.0 <= dropout < 1.0:
            raise MemtxError(f"dropout is {dropout}.", "Give a probability from 0 up to, not including, 1.")
        if not target_modules:
            raise MemtxError("LoRA got no target_modules.", "Name maps of a layer, such as attention.query.")
        _import_peft()
        self.lora_config = LoRAConfig(rank, alpha, dropout, tuple(target_modules))

    def __call__(self, model: MemoryTransformer) -> dict[str, nn.Parameter]:
        """Adapt a model in place.

        Returns:
            What is to learn: every A and B, by its name in the model. Other parameters learn if they did.

        Raises:
            MemtxError: the model is adapted already, or a target is none of its layers' maps.
        """
        if model.adapter_config is not None:
            raise MemtxError("The model is adapted by LoRA already.", "Adapt it once, naming all targets.")
        peft, own = _import_peft(), self.lora_config
        wanted = _match_targets(_linear_layer_names(model), own.target_modules)
        learned = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        config = peft.LoraConfig(
            r=own.rank,
            lora_alpha=own.alpha,
            lora_dropout=own.dropout,
            # As a pattern: names in a list would also be taken for the ends of other names.
            target_modules="|".join(map(re.escape, wanted)),
        )
        # Into the layers alone: it would take the model's config for one of its own kind.
        peft.inject_adapter_in_model(config, model.blocks)
        model.adapter_config = own
        found = {}
        for name, parameter in model.named_parameters():
            if is_lora_parameter(name):
                found[name] = parameter
                # In half precision small steps would be lost.
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            else:
                # All the others were frozen.
                parameter.requires_grad_(learned[name.replace(BASE_LAYER, ".")])
        return found


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise missing_package_error("LoRA", error, "retrofit") from error
    return peft


def _linear_layer_names(model: MemoryTransformer) -> list[str]:
    """Return the names of the layers' linear maps, without the memories' own: ``0.attention.query``, ..."""
    memories = (".attention.memory.", ".attention.extra_memories.")
    named = model.blocks.named_modules()
    return [name for name, one in named if isinstance(one, nn.Linear) and not any(part in name for part in memories)]


def _match_targets(layer_names: Iterable[str], target_modules: Sequence[str]) -> list[str]:
    """Return those of the maps that a target's pattern fits.

    Raises:
        MemtxError: a pattern fits none.
    """
    within = {name: name.partition(".")[2] for name in layer_names}
    for target in target_modules:
        if not any(fnmatchcase(name, target) for name in within.values()):
            names = list(dict.fromkeys(within.values()))
            raise MemtxError(
                f"LoRA's target_modules name '{target}', which is no map of the layers.{closest_match(target, names)}",
                f"There are {', '.join(names)}.",
            )
    return [name for name, short in within.items() if any(fnmatchcase(short, target) for target in target_modules)]

"""The stacks that compare_books.py trains, as parts of a config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Config = dict[str, Any]

COPY_ENTRIES = (384, 1536, 6144)
"""Entries with which the copy memory is read."""


@dataclass(frozen=True)
class Stack:
    """A row of the comparison.

    Attributes:
        title: Name in the tables.
        memories: Config of the memories, one for all layers or one per layer.
        depth: Number of layers.
        hidden_dim: Width of the feed-forward parts.
        options: Further arguments of the model.
        data_seed: Seed of the order of books. None means that of the run.
        gate_lr_multiplier: Factor of the learning rate of gates and log-weights.
    """

    title: str
    memories: Sequence[Config]
    depth: int = 3
    hidden_dim: int = 384
    options: Config = field(default_factory=dict)
    data_seed: int | None = None
    gate_lr_multiplier: float = 1.0

    def model_config(self) -> Config:
        """Return the config of the model."""
        feed_forward = {"class_path": "memtx.SwiGLU", "init_args": {"hidden_dim": self.hidden_dim}}
        arguments = {"dim": 128, "depth": self.depth, "heads": 4, "memories": list(self.memories)}
        return {
            "class_path": "memtx.MemoryTransformer",
            "init_args": {**arguments, "feed_forward": feed_forward, **self.options},
        }


def _window(window: int, **options: Any) -> Config:
    return {"class_path": "memtx.RecurrentMemory", "init_args": {"window": window, **options}}


def _compressed(rate: int, compression: str = "MeanPooling", **options: Any) -> Config:
    arguments = {"window": 64, "compression_rate": rate, "num_entries": 96, **options}
    arguments["compression"] = f"memtx.memory.compression.{compression}"
    return {"class_path": "memtx.CompressedMemory", "init_args": arguments}


_LOWER = [_window(16), _window(32)]
_DELTA: Config = {"class_path": "memtx.memory.gated_delta_net.GatedDeltaNet", "init_args": {"heads": 4}}
_COPY: Config = {"output_memory": {"class_path": "memtx.CopyMemory", "init_args": {"num_entries": COPY_ENTRIES[-1]}}}

UNIFORM, WINDOWS = "uniform", "windows"
_BASES = {
    UNIFORM: Stack("window 64", [_window(64)]),
    WINDOWS: Stack("windows 16, 32, 64", [*_LOWER, _window(64)]),
    "compressed": Stack("16, 32, compressed 4:1", [*_LOWER, _compressed(4)]),
    "compressed-2": Stack("16, 32, compressed 2:1", [*_LOWER, _compressed(2)]),
    "compressed-8": Stack("16, 32, compressed 8:1", [*_LOWER, _compressed(8)]),
    "learned": Stack("16, 32, compressed 4:1, learned", [*_LOWER, _compressed(4, "StridedConvolution")]),
    # The cache of 163 states has as many numbers as the compressed memory's cache of 67 and bank of 96.
    "cache": Stack("windows 16, 32, 164", [*_LOWER, _window(164, near_window=64)]),
}


def _with_entry_bias(stack: Stack) -> Stack:
    """Return a stack whose last memory reads its bank with a log-weight that begins at -3."""
    *lower, last = stack.memories
    last = {**last, "init_args": {**last["init_args"], "entry_bias": -3.0}}
    return replace(stack, title=f"{stack.title}, bias", memories=[*lower, last])


_BASES |= {f"{name}+bias": _with_entry_bias(_BASES[name]) for name in list(_BASES)[2:]}


def _with_copy(name: str) -> Stack:
    """Return a stack with a copy memory."""
    return replace(_BASES[name], title=f"{_BASES[name].title}; copy", options=_COPY)


STACKS: dict[str, Stack] = {
    **_BASES,
    **{f"{name}+copy": _with_copy(name) for name in _BASES},
    **{
        f"{name}+rate": replace(stack, title=f"{stack.title}; gates 10 x rate", gate_lr_multiplier=10.0)
        for name, stack in (("windows+copy", _with_copy("windows")), ("compressed+bias", _BASES["compressed+bias"]))
    },
    "wide": replace(_BASES[UNIFORM], title="window 64, wider feed-forward", hidden_dim=448),
    "weights": replace(_BASES[UNIFORM], title="window 64, seed 0's books", data_seed=0),
    # A GatedDeltaNet has 19,000 parameters more than attention, the transformers wider feed-forward parts instead.
    "hybrid-4": Stack("3 GatedDeltaNets, window 64", [_DELTA, _DELTA, _DELTA, _window(64)], depth=4),
    "uniform-4": Stack("4 layers, window 64", [_window(64)], depth=4, hidden_dim=421),
    "xl-4": Stack("4 layers, Transformer-XL's cache of 64", [_window(64, same_length=False)], depth=4, hidden_dim=421),
}
"""Stacks by name."""

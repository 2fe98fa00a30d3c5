"""memtx: transformers that read texts of any length, one segment at a time, with a state of fixed size.

Public names are imported on first use, so that ``import memtx`` takes milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memtx import hf as hf
    from memtx.checkpoint.load import from_pretrained as from_pretrained
    from memtx.data.books import BookDataModule as BookDataModule
    from memtx.errors import MemtxError as MemtxError
    from memtx.inference.generate import generate as generate
    from memtx.inference.predictor import load_predictor as load_predictor
    from memtx.inference.reader import StreamReader as StreamReader
    from memtx.layers.feed_forward import FeedForward as FeedForward
    from memtx.layers.feed_forward import SwiGLU as SwiGLU
    from memtx.layers.positions.base import Alibi as Alibi
    from memtx.layers.positions.rotary import Rotary as Rotary
    from memtx.memory.associative import AssociativeMemory as AssociativeMemory
    from memtx.memory.compressed import CompressedMemory as CompressedMemory
    from memtx.memory.ernie_doc import ErnieDocMemory as ErnieDocMemory
    from memtx.memory.memory_tokens import TokenMemory as TokenMemory
    from memtx.memory.none import NoMemory as NoMemory
    from memtx.memory.recurrent import RecurrentMemory as RecurrentMemory
    from memtx.memory.retrieval import RetrievalMemory as RetrievalMemory
    from memtx.memory.sinks import SinkMemory as SinkMemory
    from memtx.memory.slots import SlotMemory as SlotMemory
    from memtx.memory.top_k import TopKMemory as TopKMemory
    from memtx.models.encoder import Encoder as Encoder
    from memtx.models.memory_transformer import MemoryTransformer as MemoryTransformer
    from memtx.models.recurrent_lm import MemoryOutput as MemoryOutput
    from memtx.models.reformer import Reformer as Reformer
    from memtx.models.transformer_xl import TransformerXL as TransformerXL
    from memtx.state import MemoryState as MemoryState
    from memtx.training.language import LanguageModule as LanguageModule

__version__ = "0.1.0"

_EXPORTS = {
    "checkpoint.load": ["from_pretrained"],
    "data.books": ["BookDataModule"],
    "errors": ["MemtxError"],
    "inference.generate": ["generate"],
    "inference.reader": ["StreamReader"],
    "inference.predictor": ["load_predictor"],
    "layers.feed_forward": ["FeedForward", "SwiGLU"],
    "layers.positions.base": ["Alibi"],
    "layers.positions.rotary": ["Rotary"],
    "memory.associative": ["AssociativeMemory"],
    "memory.compressed": ["CompressedMemory"],
    "memory.ernie_doc": ["ErnieDocMemory"],
    "memory.memory_tokens": ["TokenMemory"],
    "memory.none": ["NoMemory"],
    "memory.recurrent": ["RecurrentMemory"],
    "memory.retrieval": ["RetrievalMemory"],
    "memory.sinks": ["SinkMemory"],
    "memory.slots": ["SlotMemory"],
    "memory.top_k": ["TopKMemory"],
    "models.encoder": ["Encoder"],
    "models.memory_transformer": ["MemoryTransformer"],
    "models.recurrent_lm": ["MemoryOutput"],
    "models.reformer": ["Reformer"],
    "models.transformer_xl": ["TransformerXL"],
    "state": ["MemoryState"],
    "training.language": ["LanguageModule"],
}
_MODULES = {name: f"memtx.{module}" for module, names in _EXPORTS.items() for name in names}

__all__ = sorted([*_MODULES, "hf"])


def __getattr__(name: str) -> Any:
    if name == "hf":
        return importlib.import_module("memtx.hf")
    if name not in _MODULES:
        raise AttributeError(f"module 'memtx' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

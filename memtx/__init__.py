"""memtx: transformers that read texts of any length, one segment at a time, with a state of fixed size.

Public names are resolved when first used, so that ``import memtx`` costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memtx.data.books import BookDataModule
    from memtx.errors import MemtxError
    from memtx.hf.load import from_pretrained
    from memtx.inference.generate import generate
    from memtx.inference.reader import StreamReader
    from memtx.inference.summarizer import load_predictor
    from memtx.layers.feed_forward import FeedForward, SwiGLU
    from memtx.layers.positions.base import Alibi, Rotary
    from memtx.memory.associative import AssociativeMemory
    from memtx.memory.compressed import CompressedMemory
    from memtx.memory.ernie_doc import ErnieDocMemory
    from memtx.memory.memory_tokens import TokenMemory
    from memtx.memory.none import NoMemory
    from memtx.memory.recurrent import RecurrentMemory
    from memtx.memory.retrieval import RetrievalMemory
    from memtx.memory.sinks import SinkMemory
    from memtx.memory.slots import SlotMemory
    from memtx.memory.top_k import TopKMemory
    from memtx.models.encoder import Encoder
    from memtx.models.memory_transformer import MemoryTransformer
    from memtx.models.recurrent_lm import MemoryOutput
    from memtx.models.reformer import Reformer
    from memtx.models.transformer_xl import TransformerXL
    from memtx.state import MemoryState
    from memtx.training.language import LanguageModule

__version__ = "0.1.0"

_EXPORTS = {
    "Alibi": "memtx.layers.positions.base:Alibi",
    "AssociativeMemory": "memtx.memory.associative:AssociativeMemory",
    "BookDataModule": "memtx.data.books:BookDataModule",
    "CompressedMemory": "memtx.memory.compressed:CompressedMemory",
    "Encoder": "memtx.models.encoder:Encoder",
    "ErnieDocMemory": "memtx.memory.ernie_doc:ErnieDocMemory",
    "FeedForward": "memtx.layers.feed_forward:FeedForward",
    "LanguageModule": "memtx.training.language:LanguageModule",
    "MemoryOutput": "memtx.models.recurrent_lm:MemoryOutput",
    "MemoryState": "memtx.state:MemoryState",
    "MemoryTransformer": "memtx.models.memory_transformer:MemoryTransformer",
    "MemtxError": "memtx.errors:MemtxError",
    "NoMemory": "memtx.memory.none:NoMemory",
    "RecurrentMemory": "memtx.memory.recurrent:RecurrentMemory",
    "Reformer": "memtx.models.reformer:Reformer",
    "RetrievalMemory": "memtx.memory.retrieval:RetrievalMemory",
    "Rotary": "memtx.layers.positions.base:Rotary",
    "SinkMemory": "memtx.memory.sinks:SinkMemory",
    "SlotMemory": "memtx.memory.slots:SlotMemory",
    "StreamReader": "memtx.inference.reader:StreamReader",
    "SwiGLU": "memtx.layers.feed_forward:SwiGLU",
    "TopKMemory": "memtx.memory.top_k:TopKMemory",
    "TransformerXL": "memtx.models.transformer_xl:TransformerXL",
    "TokenMemory": "memtx.memory.memory_tokens:TokenMemory",
    "from_pretrained": "memtx.hf.load:from_pretrained",
    "generate": "memtx.inference.generate:generate",
    "load_predictor": "memtx.inference.summarizer:load_predictor",
}

__all__ = [
    "Alibi",
    "AssociativeMemory",
    "BookDataModule",
    "CompressedMemory",
    "Encoder",
    "ErnieDocMemory",
    "FeedForward",
    "LanguageModule",
    "MemoryOutput",
    "MemoryState",
    "MemoryTransformer",
    "MemtxError",
    "NoMemory",
    "RecurrentMemory",
    "Reformer",
    "RetrievalMemory",
    "Rotary",
    "SinkMemory",
    "SlotMemory",
    "StreamReader",
    "SwiGLU",
    "TokenMemory",
    "TopKMemory",
    "TransformerXL",
    "from_pretrained",
    "generate",
    "load_predictor",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'memtx' has no attribute '{name}'")
    module, _, attribute = _EXPORTS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

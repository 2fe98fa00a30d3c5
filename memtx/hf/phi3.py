"""Layout of Phi-3 and Phi-4-mini (Microsoft 2024): joined projections, and positions stretched by learned factors."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import build_rotary, build_window_memories
from memtx.hf.decoder import DecoderConfig, layer_index, load_decoder
from memtx.hf.layout import RowSlice, WeightEntry, WeightTransform
from memtx.hf.llama import LLAMA, mistral_sliding_windows
from memtx.models.memory_transformer import MemoryTransformer

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}


def build(hf_checkpoint: HFCheckpoint, window: int | None) -> MemoryTransformer:
    """Build the decoder of a folder; window and errors as in :func:`memtx.hf.loader.load`."""
    config = DecoderConfig(hf_checkpoint.config, **DEFAULTS)
    max_length = config.get_int("max_position_embeddings")
    positions, max_length, rotary_dim = build_rotary(config, max_length, head_dim=config.head_dim, window=window)

    def special_entries(name: str, tensor: Tensor) -> list[WeightEntry] | None:
        if ".attention.query." in name:
            key_value, half = name.replace(".query.", ".key_value."), config.kv_heads * config.head_dim
            slices = (
                RowSlice(name, rotary_heads=config.heads, rotary_dim=rotary_dim),
                RowSlice(key_value, 0, half, config.kv_heads, rotary_dim),
                RowSlice(key_value, half, half),
            )
            return [
                (WeightTransform(slices), [f"layers.{layer_index(name)}.self_attn.qkv_proj.{name.rpartition('.')[2]}"])
            ]
        if ".attention.key_value." in name:
            return []  # stored together with the query
        if ".feed_forward.gate_up." in name:
            return [(WeightTransform((RowSlice(name),)), [f"layers.{layer_index(name)}.mlp.gate_up_proj.weight"])]
        return None

    return load_decoder(
        hf_checkpoint,
        LLAMA,
        config,
        special_entries=special_entries,
        memories=build_window_memories(window, max_length, mistral_sliding_windows(config, None)),
        norm=partial(nn.RMSNorm, eps=config.get_float("rms_norm_eps", 1e-5)),
        feed_forward=config.build_feed_forward(),
        positions=positions,
    )

"""Layout of Gemma 3's text models (Gemma Team 2025): sliding and full attention mixed, norms around each part."""

from __future__ import annotations

from functools import partial
from typing import Any

from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig, build_rotary, build_window_memories
from memtx.hf.decoder import DecoderConfig, decoder_mapping, load_decoder
from memtx.layers.norms import ZeroCenteredRMSNorm
from memtx.models.memory_transformer import MemoryTransformer

GEMMA3 = decoder_mapping(
    {
        "blocks.{}.attention_norm": ["layers.{}.input_layernorm"],
        "blocks.{}.attention_post_norm": ["layers.{}.post_attention_layernorm"],
        "blocks.{}.feed_forward_norm": ["layers.{}.pre_feedforward_layernorm"],
        "blocks.{}.feed_forward_post_norm": ["layers.{}.post_feedforward_layernorm"],
    }
)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


def build(hf_checkpoint: HFCheckpoint, window: int | None) -> MemoryTransformer:
    """Build the decoder of a folder; window and errors as in :func:`memtx.hf.loader.load`."""
    config = DecoderConfig(hf_checkpoint.config, **DEFAULTS)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        config.require(key, None, "capped logits")
    config.require("use_bidirectional_attention", False, "bidirectional layers")
    interval = config.get_int("sliding_window_pattern", config.get_int("_sliding_window_pattern", 6))
    default = ["full_attention" if (i + 1) % interval == 0 else "sliding_attention" for i in range(config.depth)]
    windows = config.sliding_windows(config.get_int("sliding_window", 4096), default)
    max_length = config.get_int("max_position_embeddings")
    rope = config.get("rope_parameters") or {}
    bases = {
        "sliding_attention": config.get_float("rope_local_base_freq", 10000.0),
        "full_attention": config.get_float("rope_theta", 1000000.0),
    }
    # Formerly, rope_scaling was that of the layers with full attention.
    scaling = {"full_attention": config.get("rope_scaling") or {}}
    positions = {}
    for layer_type, base in bases.items():
        parameters = {"rope_theta": base, **scaling.get(layer_type, {}), **(rope.get(layer_type) or {})}
        positions[layer_type], _, _ = build_rotary(HFConfig({"rope_parameters": parameters}), max_length)
    norm = partial(ZeroCenteredRMSNorm, eps=config.get_float("rms_norm_eps", 1e-6))
    return load_decoder(
        hf_checkpoint,
        GEMMA3,
        config,
        memories=build_window_memories(window, max_length, windows),
        norm=norm,
        feed_forward=config.build_feed_forward("hidden_activation", "gelu_pytorch_tanh"),
        layer_positions=[positions["full_attention" if width is None else "sliding_attention"] for width in windows],
        qk_norm=norm,
        norm_placement="sandwich",
        query_scale=(config.head_dim / config.get_float("query_pre_attn_scalar", 256)) ** 0.5,
        embedding_scale=config.dim**0.5,
    )

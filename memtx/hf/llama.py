"""Layout of Llama (Touvron et al. 2023), and of Mistral, Qwen 2, Qwen 3 and SmolLM 3, which differ only in options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import build_rotary, build_window_memories
from memtx.hf.decoder import PRE_NORM_KEYS, DecoderConfig, decoder_mapping, load_decoder
from memtx.layers.positions.base import NoPositions
from memtx.models.memory_transformer import MemoryTransformer

LLAMA = decoder_mapping(PRE_NORM_KEYS)

LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
QWEN_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}
SMOLLM_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Variant:
    """Differences of a model from Llama.

    Attributes:
        defaults: Values of keys that config.json omits.
        sliding_windows: Returns each layer's window, or None for full attention.
        qkv_bias: If True, queries, keys and values have biases. None uses the config's ``attention_bias``, which also
            applies to the output projection.
        qk_norm: If True, queries and keys are normalized per head.
        has_layers_without_positions: If True, the config may name layers without positions.
    """

    defaults: dict[str, Any] = field(default_factory=dict)
    sliding_windows: Callable[[DecoderConfig], list[int | None]] = lambda config: [None] * config.depth
    qkv_bias: bool | None = None
    qk_norm: bool = False
    has_layers_without_positions: bool = False


def mistral_sliding_windows(config: DecoderConfig, default: int | None = 4096) -> list[int | None]:
    """Return the window of all layers; null in config.json disables it, the default applies if the key is missing."""
    if config.values.get("sliding_window", default) is None:
        return [None] * config.depth
    return [config.get_int("sliding_window", default)] * config.depth


def qwen_sliding_windows(config: DecoderConfig) -> list[int | None]:
    """Return each layer's window by ``layer_types``, by default that of all layers from ``max_window_layers`` on."""
    first_sliding = config.get_int("max_window_layers", 28, min_value=0)
    default = ["full_attention" if layer < first_sliding else "sliding_attention" for layer in range(config.depth)]
    window = config.get_int("sliding_window", 4096) if config.get_bool("use_sliding_window", False) else None
    return config.sliding_windows(window, default)


def _layers_with_positions(config: DecoderConfig) -> list[bool]:
    interval = config.get_int("no_rope_layer_interval", 4)
    default = [int((layer + 1) % interval != 0) for layer in range(config.depth)]
    return [bool(flag) for flag in config.get_ints("no_rope_layers", config.depth, default, min_value=0)]


def _smollm_sliding_windows(config: DecoderConfig) -> list[int | None]:
    window = config.get("sliding_window") if config.get_bool("use_sliding_window", False) else None
    default = [
        "full_attention" if rotated or window is None else "sliding_attention"
        for rotated in _layers_with_positions(config)
    ]
    return config.sliding_windows(window, default)


VARIANTS = {
    "llama": Variant(),
    "mistral": Variant(
        {"intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8},
        mistral_sliding_windows,
        qkv_bias=False,
    ),
    "qwen2": Variant(QWEN_DEFAULTS, qwen_sliding_windows, qkv_bias=True),
    "qwen3": Variant(QWEN_DEFAULTS | {"head_dim": 128}, qwen_sliding_windows, qk_norm=True),
    "smollm3": Variant(SMOLLM_DEFAULTS, _smollm_sliding_windows, has_layers_without_positions=True),
}


def build(hf_checkpoint: HFCheckpoint, window: int | None) -> MemoryTransformer:
    """Build the decoder of a folder; window and errors as in :func:`memtx.hf.loader.load`."""
    variant = VARIANTS[str(hf_checkpoint.config["model_type"])]
    config = DecoderConfig(hf_checkpoint.config, **(LLAMA_DEFAULTS | variant.defaults))
    has_bias = config.get_bool("attention_bias", False)
    positions, max_length, _ = build_rotary(config, config.get_int("max_position_embeddings"))
    norm = partial(nn.RMSNorm, eps=config.get_float("rms_norm_eps", 1e-6))
    rotated = [True] * config.depth
    if variant.has_layers_without_positions:
        rotated = _layers_with_positions(config)
    return load_decoder(
        hf_checkpoint,
        LLAMA,
        config,
        rotated_layers=rotated,
        memories=build_window_memories(window, max_length, variant.sliding_windows(config)),
        norm=norm,
        feed_forward=config.build_feed_forward(bias=config.get_bool("mlp_bias", False)),
        positions=positions,
        layer_positions=None if all(rotated) else [positions if flag else NoPositions for flag in rotated],
        bias=has_bias if variant.qkv_bias is None else variant.qkv_bias,
        out_bias=has_bias and variant.qkv_bias is None,
        qk_norm=norm if variant.qk_norm else None,
    )

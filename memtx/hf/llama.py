"""Layout of Llama (Touvron et al. 2023), and of Mistral, Qwen 2 and Qwen 3, which differ only in options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from memtx.errors import CheckpointError
from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig, build_rotary, build_window_memories
from memtx.hf.layout import KeyMapping, RowSlice, WeightEntry, WeightTransform
from memtx.hf.loader import has_tied_weights, load_weights
from memtx.layers.feed_forward import SwiGLU
from memtx.models.memory_transformer import MemoryTransformer

EMBEDDING_KEY, LM_HEAD_KEY = "embed_tokens.weight", "lm_head.weight"

LLAMA = KeyMapping(
    hf_keys={
        "embedding.weight": [EMBEDDING_KEY, LM_HEAD_KEY],
        "blocks.{}.attention_norm": ["layers.{}.input_layernorm"],
        "blocks.{}.attention.query": ["layers.{}.self_attn.q_proj"],
        # Two keys, with half of the rows each.
        "blocks.{}.attention.key_value": ["layers.{}.self_attn.k_proj", "layers.{}.self_attn.v_proj"],
        "blocks.{}.attention.out": ["layers.{}.self_attn.o_proj"],
        "blocks.{}.attention.query_norm": ["layers.{}.self_attn.q_norm"],
        "blocks.{}.attention.key_norm": ["layers.{}.self_attn.k_norm"],
        "blocks.{}.feed_forward_norm": ["layers.{}.post_attention_layernorm"],
        "blocks.{}.feed_forward.gate_up": ["layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"],
        "blocks.{}.feed_forward.out": ["layers.{}.mlp.down_proj"],
        "norm": ["norm"],
        "head.weight": [LM_HEAD_KEY],
    },
    prefix="model.",
    head_prefixes=("lm_head.",),
    extra_patterns=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)


@dataclass(frozen=True)
class ConfigDefaults:
    """Defaults of options that config.json omits, and differences between the models.

    Attributes:
        kv_heads: Number of key-value heads; None for as many as query heads.
        head_dim: Dimension of a head; None for dim / heads.
        sliding_windows: Returns each layer's window, or None for full attention, from the config and depth.
        qkv_bias: If True, queries, keys and values have biases. None uses the config's ``attention_bias``, which also
            applies to the output projection.
        qk_norm: If True, queries and keys are normalized per head.
    """

    vocab_size: int = 32000
    intermediate_size: int = 11008
    max_position_embeddings: int = 2048
    kv_heads: int | None = None
    head_dim: int | None = None
    sliding_windows: Callable[[HFConfig, int], list[int | None]] = lambda config, depth: [None] * depth
    qkv_bias: bool | None = None
    qk_norm: bool = False


def _mistral_sliding_windows(config: HFConfig, depth: int) -> list[int | None]:
    # null disables the window; the default applies only if the key is missing.
    if "sliding_window" in config.values and config.values["sliding_window"] is None:
        return [None] * depth
    return [config.get_int("sliding_window", 4096)] * depth


def _qwen_sliding_windows(config: HFConfig, depth: int) -> list[int | None]:
    layer_types = config.get("layer_types")
    first_sliding = config.get_int("max_window_layers", 28, min_value=0)
    if layer_types is None:
        layer_types = ["full_attention" if layer < first_sliding else "sliding_attention" for layer in range(depth)]
    known = {"full_attention", "sliding_attention"}
    if not isinstance(layer_types, list) or len(layer_types) != depth or set(layer_types) - known:
        message = f"config.json has layer_types = {layer_types!r}."
        raise CheckpointError(message, f"Name 'full_attention' or 'sliding_attention' for each of {depth} layers.")
    window = config.get_int("sliding_window", 4096) if config.get_bool("use_sliding_window", False) else None
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]


CONFIG_DEFAULTS = {
    "llama": ConfigDefaults(),
    "mistral": ConfigDefaults(
        intermediate_size=14336,
        max_position_embeddings=131072,
        kv_heads=8,
        sliding_windows=_mistral_sliding_windows,
        qkv_bias=False,
    ),
    "qwen2": ConfigDefaults(151936, 22016, 32768, 32, sliding_windows=_qwen_sliding_windows, qkv_bias=True),
    "qwen3": ConfigDefaults(
        151936, 22016, 32768, 32, head_dim=128, sliding_windows=_qwen_sliding_windows, qk_norm=True
    ),
}


def build(hf_checkpoint: HFCheckpoint, window: int | None) -> MemoryTransformer:
    """Build the decoder of a folder; window and errors as in :func:`memtx.hf.loader.load`."""
    config = HFConfig(hf_checkpoint.config)
    defaults = CONFIG_DEFAULTS[str(hf_checkpoint.config["model_type"])]
    dim, depth = config.get_int("hidden_size", 4096), config.get_int("num_hidden_layers", 32)
    heads = config.get_int("num_attention_heads", 32)
    kv_heads = config.get_int("num_key_value_heads", defaults.kv_heads or heads)
    head_dim = config.get_int("head_dim", defaults.head_dim or dim // heads)
    hidden_dim = config.get_int("intermediate_size", defaults.intermediate_size)
    bias = config.get_bool("attention_bias", False) if defaults.qkv_bias is None else defaults.qkv_bias
    out_bias = bias and defaults.qkv_bias is None
    mlp_bias = config.get_bool("mlp_bias", False)
    max_length = config.get_int("max_position_embeddings", defaults.max_position_embeddings)
    positions, max_length = build_rotary(config, max_length)
    norm = partial(nn.RMSNorm, eps=config.get_float("rms_norm_eps", 1e-6))
    model_factory = partial(
        MemoryTransformer,
        config.get_int("vocab_size", defaults.vocab_size),
        dim,
        depth,
        heads,
        kv_heads,
        build_window_memories(window, max_length, defaults.sliding_windows(config, depth)),
        norm,
        partial(SwiGLU, hidden_dim=hidden_dim, bias=mlp_bias, activation=config.get_activation("hidden_act", "silu")),
        positions,
        bias=bias,
        out_bias=out_bias,
        head_dim=head_dim,
        qk_norm=norm if defaults.qk_norm else None,
        attention_dropout=config.get_float("attention_dropout", 0.0),
        tie_embeddings=has_tied_weights(hf_checkpoint, LLAMA, LM_HEAD_KEY, EMBEDDING_KEY, default=False),
    )
    return load_weights(model_factory, hf_checkpoint, LLAMA, partial(_build_entries, heads=heads, kv_heads=kv_heads))


def _build_entries(weights: Mapping[str, Tensor], *, heads: int, kv_heads: int) -> list[WeightEntry]:
    entries: list[tuple[RowSlice, Sequence[str]]] = []
    for name, tensor in weights.items():
        keys, half = LLAMA.candidate_keys(name), tensor.shape[0] // 2
        if ".attention.key_value." in name or ".feed_forward.gate_up." in name:
            rotary_heads = kv_heads if ".key_value." in name else 0
            entries += [(RowSlice(name, 0, half, rotary_heads), keys[:1]), (RowSlice(name, half, half), keys[1:])]
        elif ".attention.query." in name:
            entries.append((RowSlice(name, rotary_heads=heads), keys))
        else:
            is_head_norm = name.endswith((".query_norm.weight", ".key_norm.weight"))
            entries.append((RowSlice(name, rotary_heads=1 if is_head_norm else 0), keys))
    return [(WeightTransform((part,)), keys) for part, keys in entries]

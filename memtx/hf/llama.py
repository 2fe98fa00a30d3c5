"""The layout of Llama (Touvron et al. 2023) and of Mistral, Qwen 2 and Qwen 3, which differ in options alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from memtx.errors import CheckpointError
from memtx.hf import decoder
from memtx.hf.checkpoint import LazyCheckpoint
from memtx.hf.options import HFConfig
from memtx.hf.rope import build_rotary
from memtx.hf.weight_transforms import WeightTransform
from memtx.layers.feed_forward import SwiGLU
from memtx.models.memory_transformer import MemoryTransformer

PREFIX = "model."
EMBEDDING_KEY = "embed_tokens.weight"
EXTRA_PATTERNS = (r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


@dataclass(frozen=True)
class ConfigDefaults:
    """What a config.json of the kind leaves out.

    Attributes:
        vocab_size: of the vocabulary.
        intermediate_size: of the feed-forward part.
        max_position_embeddings: positions known.
        kv_heads: None for as many as query heads.
        head_dim: None for dim / heads.
        sliding_windows: from which each layer's window follows, or None.
        qkv_bias: of the projections to queries, keys and values; None where the config says it of these and the last.
        qk_norm: whether queries and keys are normed by head.
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
    # null is said there, and means that nothing slides; only a missing key has the default.
    if "sliding_window" in config.values and config.values["sliding_window"] is None:
        return [None] * depth
    return [config.get_int("sliding_window", 4096)] * depth


def _qwen_sliding_windows(config: HFConfig, depth: int) -> list[int | None]:
    kinds = config.get("layer_types")
    first = config.get_int("max_window_layers", 28, min_value=0)
    if kinds is None:
        kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(depth)]
    if not isinstance(kinds, list) or len(kinds) != depth or set(kinds) - {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"config.json has layer_types = {kinds!r}.",
            f"Name 'full_attention' or 'sliding_attention' for each of {depth} layers.",
        )
    window = None
    if config.get_bool("use_sliding_window", False):
        window = config.get_int("sliding_window", 4096)
    return [window if kind == "sliding_attention" else None for kind in kinds]


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


def build(hf_checkpoint: LazyCheckpoint, window: int | None) -> MemoryTransformer:
    """Return the model of a folder.

    Args:
        hf_checkpoint: the folder.
        window: exact positions seen; None for as many as the model knows.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = HFConfig(hf_checkpoint.config)
    family = CONFIG_DEFAULTS[str(hf_checkpoint.config["model_type"])]
    dim, depth = options.get_int("hidden_size", 4096), options.get_int("num_hidden_layers", 32)
    heads = options.get_int("num_attention_heads", 32)
    kv_heads = options.get_int("num_key_value_heads", family.kv_heads or heads)
    head_dim = options.get_int("head_dim", family.head_dim or dim // heads)
    inner = options.get_int("intermediate_size", family.intermediate_size)
    bias = options.get_bool("attention_bias", False) if family.qkv_bias is None else family.qkv_bias
    out_bias = bias if family.qkv_bias is None else False
    wide = options.get_bool("mlp_bias", False)
    positions, longest = build_rotary(
        options, options.get_int("max_position_embeddings", family.max_position_embeddings)
    )
    norm = partial(nn.RMSNorm, eps=options.get_float("rms_norm_eps", 1e-6))
    make = partial(
        MemoryTransformer,
        options.get_int("vocab_size", family.vocab_size),
        dim,
        depth,
        heads,
        kv_heads,
        decoder.build_window_memories(window, longest, family.sliding_windows(options, depth)),
        norm,
        partial(SwiGLU, hidden_dim=inner, bias=wide, activation=options.get_activation("hidden_act", "silu")),
        positions,
        bias=bias,
        out_bias=out_bias,
        head_dim=head_dim,
        qk_norm=norm if family.qk_norm else None,
        attention_dropout=options.get_float("attention_dropout", 0.0),
        tie_embeddings=decoder.has_tied_embeddings(hf_checkpoint, False, EMBEDDING_KEY, PREFIX),
    )
    pieces = {PREFIX + EMBEDDING_KEY: WeightTransform.from_rows("embedding.weight")}
    for layer in range(depth):
        pieces |= _layer_transforms(layer, heads, kv_heads, head_dim, inner, bias, out_bias, wide, family.qk_norm)
    pieces |= {
        PREFIX + "norm.weight": WeightTransform.from_rows("norm.weight"),
        decoder.LM_HEAD_KEY: WeightTransform.from_rows("head.weight"),
    }
    return decoder.build(hf_checkpoint, make, pieces, PREFIX, EXTRA_PATTERNS)


def _layer_transforms(
    layer: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    qkv_bias: bool,
    out_bias: bool,
    mlp_bias: bool,
    qk_norm: bool,
) -> dict[str, WeightTransform]:
    """Return the pieces of a layer."""
    own, theirs = f"blocks.{layer}.", f"{PREFIX}layers.{layer}."
    attention, keys = f"{own}attention.", kv_heads * head_dim
    pieces = {
        f"{theirs}input_layernorm.weight": WeightTransform.from_rows(f"{own}attention_norm.weight"),
        f"{theirs}post_attention_layernorm.weight": WeightTransform.from_rows(f"{own}feed_forward_norm.weight"),
    }
    for end in ["weight"] + ["bias"] * qkv_bias:
        pieces |= {
            f"{theirs}self_attn.q_proj.{end}": WeightTransform.from_rows(f"{attention}query.{end}", rotary_heads=heads),
            f"{theirs}self_attn.k_proj.{end}": WeightTransform.from_rows(
                f"{attention}key_value.{end}", 0, keys, rotary_heads=kv_heads
            ),
            f"{theirs}self_attn.v_proj.{end}": WeightTransform.from_rows(f"{attention}key_value.{end}", keys, keys),
        }
    for end in ["weight"] + ["bias"] * out_bias:
        pieces[f"{theirs}self_attn.o_proj.{end}"] = WeightTransform.from_rows(f"{attention}out.{end}")
    if qk_norm:
        pieces |= {
            f"{theirs}self_attn.{part[0]}_norm.weight": WeightTransform.from_rows(
                f"{attention}{part}_norm.weight", rotary_heads=1
            )
            for part in ("query", "key")
        }
    for end in ["weight"] + ["bias"] * mlp_bias:
        pieces |= {
            f"{theirs}mlp.gate_proj.{end}": WeightTransform.from_rows(
                f"{own}feed_forward.gate_up.{end}", 0, intermediate_size
            ),
            f"{theirs}mlp.up_proj.{end}": WeightTransform.from_rows(
                f"{own}feed_forward.gate_up.{end}", intermediate_size, intermediate_size
            ),
            f"{theirs}mlp.down_proj.{end}": WeightTransform.from_rows(f"{own}feed_forward.out.{end}"),
        }
    return pieces

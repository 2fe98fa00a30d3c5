"""The layout of Llama (Touvron et al. 2023) and of Mistral, Qwen 2 and Qwen 3, which differ in options alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from memtx.errors import CheckpointError
from memtx.layers.feed_forward import SwiGLU
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.published import decoder
from memtx.models.published.content import Opened
from memtx.models.published.options import Options
from memtx.models.published.pieces import Piece
from memtx.models.published.rope import rotary

PREFIX = "model."
EMBEDDING = "embed_tokens.weight"
KEPT = (r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


@dataclass(frozen=True)
class Family:
    """What a config.json of the kind leaves out.

    Attributes:
        vocab: of the vocabulary.
        inner: of the feed-forward part.
        longest: positions known.
        kv_heads: None for as many as query heads.
        head_dim: None for dim / heads.
        sliding: from which each layer's window follows, or None.
        bias: of the projections to queries, keys and values; None where the config says it of these and the last.
        head_norm: whether queries and keys are normed by head.
    """

    vocab: int = 32000
    inner: int = 11008
    longest: int = 2048
    kv_heads: int | None = None
    head_dim: int | None = None
    sliding: Callable[[Options, int], list[int | None]] = lambda options, depth: [None] * depth
    bias: bool | None = None
    head_norm: bool = False


def _mistral(options: Options, depth: int) -> list[int | None]:
    # null is said there, and means that nothing slides; only a missing key has the default.
    if "sliding_window" in options.config and options.config["sliding_window"] is None:
        return [None] * depth
    return [options.whole("sliding_window", 4096)] * depth


def _qwen(options: Options, depth: int) -> list[int | None]:
    kinds = options.value("layer_types")
    first = options.whole("max_window_layers", 28, least=0)
    if kinds is None:
        kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(depth)]
    if not isinstance(kinds, list) or len(kinds) != depth or set(kinds) - {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"config.json has layer_types = {kinds!r}.",
            f"Name 'full_attention' or 'sliding_attention' for each of {depth} layers.",
        )
    window = None
    if options.flag("use_sliding_window", False):
        window = options.whole("sliding_window", 4096)
    return [window if kind == "sliding_attention" else None for kind in kinds]


FAMILIES = {
    "llama": Family(),
    "mistral": Family(inner=14336, longest=131072, kv_heads=8, sliding=_mistral, bias=False),
    "qwen2": Family(151936, 22016, 32768, 32, sliding=_qwen, bias=True),
    "qwen3": Family(151936, 22016, 32768, 32, head_dim=128, sliding=_qwen, head_norm=True),
}


def build(found: Opened, window: int | None) -> MemoryTransformer:
    """Return the model of a folder.

    Args:
        found: the folder.
        window: exact positions seen; None for as many as the model knows.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = Options(found.config)
    family = FAMILIES[str(found.config["model_type"])]
    dim, depth = options.whole("hidden_size", 4096), options.whole("num_hidden_layers", 32)
    heads = options.whole("num_attention_heads", 32)
    kv_heads = options.whole("num_key_value_heads", family.kv_heads or heads)
    head_dim = options.whole("head_dim", family.head_dim or dim // heads)
    inner = options.whole("intermediate_size", family.inner)
    bias = options.flag("attention_bias", False) if family.bias is None else family.bias
    out_bias = bias if family.bias is None else False
    wide = options.flag("mlp_bias", False)
    positions, longest = rotary(options, options.whole("max_position_embeddings", family.longest))
    norm = partial(nn.RMSNorm, eps=options.number("rms_norm_eps", 1e-6))
    make = partial(
        MemoryTransformer,
        options.whole("vocab_size", family.vocab),
        dim,
        depth,
        heads,
        kv_heads,
        decoder.windows(window, longest, family.sliding(options, depth)),
        norm,
        partial(SwiGLU, hidden=inner, bias=wide, activation=options.activation("hidden_act", "silu")),
        positions,
        bias=bias,
        out_bias=out_bias,
        head_dim=head_dim,
        head_norm=norm if family.head_norm else None,
        attention_dropout=options.number("attention_dropout", 0.0),
        tie_embeddings=decoder.is_tied(found, False, EMBEDDING, PREFIX),
    )
    pieces = {PREFIX + EMBEDDING: Piece.of("embedding.weight")}
    for layer in range(depth):
        pieces |= _layer(layer, heads, kv_heads, head_dim, inner, bias, out_bias, wide, family.head_norm)
    pieces |= {PREFIX + "norm.weight": Piece.of("norm.weight"), decoder.HEAD: Piece.of("head.weight")}
    return decoder.build(found, make, pieces, PREFIX, KEPT)


def _layer(
    layer: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    inner: int,
    bias: bool,
    out_bias: bool,
    wide: bool,
    head_norm: bool,
) -> dict[str, Piece]:
    """Return the pieces of a layer."""
    own, theirs = f"blocks.{layer}.", f"{PREFIX}layers.{layer}."
    attention, keys = f"{own}attention.", kv_heads * head_dim
    pieces = {
        f"{theirs}input_layernorm.weight": Piece.of(f"{own}attention_norm.weight"),
        f"{theirs}post_attention_layernorm.weight": Piece.of(f"{own}feed_forward_norm.weight"),
    }
    for end in ["weight"] + ["bias"] * bias:
        pieces |= {
            f"{theirs}self_attn.q_proj.{end}": Piece.of(f"{attention}query.{end}", heads=heads),
            f"{theirs}self_attn.k_proj.{end}": Piece.of(f"{attention}key_value.{end}", 0, keys, heads=kv_heads),
            f"{theirs}self_attn.v_proj.{end}": Piece.of(f"{attention}key_value.{end}", keys, keys),
        }
    for end in ["weight"] + ["bias"] * out_bias:
        pieces[f"{theirs}self_attn.o_proj.{end}"] = Piece.of(f"{attention}out.{end}")
    if head_norm:
        pieces |= {
            f"{theirs}self_attn.{part[0]}_norm.weight": Piece.of(f"{attention}{part}_norm.weight", heads=1)
            for part in ("query", "key")
        }
    for end in ["weight"] + ["bias"] * wide:
        pieces |= {
            f"{theirs}mlp.gate_proj.{end}": Piece.of(f"{own}feed_forward.gate_up.{end}", 0, inner),
            f"{theirs}mlp.up_proj.{end}": Piece.of(f"{own}feed_forward.gate_up.{end}", inner, inner),
            f"{theirs}mlp.down_proj.{end}": Piece.of(f"{own}feed_forward.out.{end}"),
        }
    return pieces

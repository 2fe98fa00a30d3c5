"""Layouts of hybrids: Qwen 3.5, Qwen3-Next and OLMo Hybrid, most of whose layers are Gated DeltaNets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import build_rotary, build_window_memories
from memtx.hf.decoder import PRE_NORM_KEYS, DecoderConfig, decoder_mapping, layer_index, load_decoder
from memtx.hf.layout import RowSlice, WeightEntry, WeightTransform
from memtx.layers.mixture_of_experts import MixtureOfExperts
from memtx.layers.norms import ZeroCenteredRMSNorm
from memtx.layers.positions.base import NoPositions
from memtx.memory.gated_delta_net import GatedDeltaNet
from memtx.models.layer_factories import PositionsFactory
from memtx.models.memory_transformer import MemoryTransformer

MEMORY = "blocks.{}.attention.mixer."
DELTA_KEYS = {
    MEMORY + "conv_weight": ["layers.{}.linear_attn.conv1d.weight"],
    MEMORY + "log_decay_rate": ["layers.{}.linear_attn.A_log"],
    MEMORY + "decay_bias": ["layers.{}.linear_attn.dt_bias"],
}
EXPERT_KEYS = {
    "blocks.{}.feed_forward.router": ["layers.{}.mlp.gate"],
    "blocks.{}.feed_forward.shared.gate_up": [
        "layers.{}.mlp.shared_expert.gate_proj",
        "layers.{}.mlp.shared_expert.up_proj",
    ],
    "blocks.{}.feed_forward.shared.out": ["layers.{}.mlp.shared_expert.down_proj"],
    "blocks.{}.feed_forward.shared_gate": ["layers.{}.mlp.shared_expert_gate"],
}
QWEN = decoder_mapping(
    {
        **PRE_NORM_KEYS,
        **DELTA_KEYS,
        **EXPERT_KEYS,
        MEMORY + "qkv": ["layers.{}.linear_attn.in_proj_qkv"],
        MEMORY + "output_gate": ["layers.{}.linear_attn.in_proj_z"],
        MEMORY + "write_gate": ["layers.{}.linear_attn.in_proj_b"],
        MEMORY + "decay_gate": ["layers.{}.linear_attn.in_proj_a"],
        MEMORY + "norm": ["layers.{}.linear_attn.norm"],
        MEMORY + "out": ["layers.{}.linear_attn.out_proj"],
    }
)
OLMO = decoder_mapping(
    {
        **DELTA_KEYS,
        # The second names are those of the published folders.
        "blocks.{}.attention_norm": ["layers.{}.input_layernorm", "layers.{}.attention_layer_norm"],
        "blocks.{}.feed_forward_norm": ["layers.{}.post_attention_layernorm", "layers.{}.feedforward_layer_norm"],
        "blocks.{}.attention.query_norm.norm": ["layers.{}.self_attn.q_norm"],
        "blocks.{}.attention.key_norm.norm": ["layers.{}.self_attn.k_norm"],
        "blocks.{}.attention_post_norm": ["layers.{}.post_attention_layernorm", "layers.{}.feedforward_layer_norm"],
        "blocks.{}.feed_forward_post_norm": ["layers.{}.post_feedforward_layernorm"],
        # Three keys, with the rows of queries, keys and values.
        MEMORY + "qkv": [f"layers.{{}}.linear_attn.{part}_proj" for part in "qkv"],
        MEMORY + "output_gate": ["layers.{}.linear_attn.g_proj"],
        MEMORY + "write_gate": ["layers.{}.linear_attn.b_proj"],
        MEMORY + "decay_gate": ["layers.{}.linear_attn.a_proj"],
        MEMORY + "norm": ["layers.{}.linear_attn.o_norm"],
        MEMORY + "out": ["layers.{}.linear_attn.o_proj"],
    }
)

QWEN3_5_DEFAULTS: dict[str, Any] = {
    "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
QWEN3_NEXT_DEFAULTS: dict[str, Any] = QWEN3_5_DEFAULTS | {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 48,
    "num_key_value_heads": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 10, "num_experts": 512,
}  # fmt: skip
OLMO_DEFAULTS: dict[str, Any] = {
    "vocab_size": 100352, "hidden_size": 3840, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 30, "max_position_embeddings": 65536,
}  # fmt: skip


def build_qwen3_5(hf_checkpoint: HFCheckpoint, window: int | None) -> MemoryTransformer:
    """Build Qwen 3.5 (text, dense); window and errors as in :func:`memtx.hf.loader.load`."""
    config = DecoderConfig(hf_checkpoint.config, **QWEN3_5_DEFAULTS)
    feed_forward = {"feed_forward": config.build_feed_forward()}
    return _build_qwen(hf_checkpoint, config, window, feed_forward, lambda name, tensor: None)


def build_qwen3_next(hf_checkpoint: HFCheckpoint, window: int | None) -> MemoryTransformer:
    """Build Qwen3-Next, with a mixture of experts in its layers; arguments as in :func:`build_qwen3_5`."""
    config = DecoderConfig(hf_checkpoint.config, **QWEN3_NEXT_DEFAULTS)
    has_split_experts = QWEN.has_any(
        hf_checkpoint.tensors, *(f"layers.{i}.mlp.experts.0." for i in range(config.depth))
    )

    def special_entries(name: str, tensor: Tensor) -> list[WeightEntry] | None:
        layer = layer_index(name)
        part = name.removeprefix(f"blocks.{layer}.")
        if part in ("attention.mixer.qkv.weight", "attention.mixer.write_gate.weight"):
            return list(_joined_by_key_head(config, name, layer))
        if part in ("attention.mixer.output_gate.weight", "attention.mixer.decay_gate.weight"):
            return []  # stored together with qkv and write_gate
        if part in ("feed_forward.gate_up", "feed_forward.out") and tensor.dim() == 3:
            return list(_expert_entries(name, tensor, f"layers.{layer}.mlp.experts", has_split_experts))
        return None

    sparse_step = config.get_int("decoder_sparse_step", 1)
    dense_layers = set(config.get_ints("mlp_only_layers", None, [], min_value=0))
    experts = partial(
        MixtureOfExperts,
        hidden_dim=config.get_int("moe_intermediate_size"),
        num_experts=config.get_int("num_experts", min_value=0) or 1,
        top_k=config.get_int("num_experts_per_tok"),
        shared_hidden_dim=config.get_int("shared_expert_intermediate_size"),
        normalize_weights=config.get_bool("norm_topk_prob", True),
        activation=config.get_activation("hidden_act", "silu"),
    )
    has_experts = [
        config.get_int("num_experts", min_value=0) > 0 and (layer + 1) % sparse_step == 0 and layer not in dense_layers
        for layer in range(config.depth)
    ]
    dense = config.build_feed_forward()
    feed_forward = {"layer_feed_forward": [experts if sparse else dense for sparse in has_experts]}
    return _build_qwen(hf_checkpoint, config, window, feed_forward, special_entries)


def build_olmo_hybrid(hf_checkpoint: HFCheckpoint, window: int | None) -> MemoryTransformer:
    """Build OLMo Hybrid, with norms after the parts of its attention layers; arguments as in :func:`build_qwen3_5`."""
    config = DecoderConfig(hf_checkpoint.config, **OLMO_DEFAULTS)
    key_heads = config.get_int("linear_num_key_heads", config.heads)
    key_dim = config.get_int("linear_key_head_dim", int(0.75 * config.dim / key_heads))
    shapes = {OLMO.normalize_key(name): tensor.shape for name, tensor in hf_checkpoint.tensors.items()}

    def special_entries(name: str, tensor: Tensor) -> list[WeightEntry] | None:
        keys = [f"layers.{layer_index(name)}.linear_attn.{part}_conv1d.weight" for part in "qkv"]
        widths = [key_heads * key_dim, key_heads * key_dim]
        if name.endswith(".mixer.qkv.weight"):
            keys = OLMO.candidate_keys(name)
        elif name.endswith(".mixer.conv_weight") and all(key in shapes for key in keys):
            # transformers 5 writes thirds, the published folders the parts' own widths.
            widths = [shapes[key][0] for key in keys[:2]]
        else:
            return None
        bounds = [0, widths[0], sum(widths), tensor.shape[0]]
        slices = [RowSlice(name, start, end - start) for start, end in pairwise(bounds)]
        return [(WeightTransform((part,)), [key]) for part, key in zip(slices, keys, strict=True)]

    types = _layer_types(config)
    norm = partial(nn.RMSNorm, eps=config.get_float("rms_norm_eps", 1e-6))
    memory = partial(
        GatedDeltaNet,
        heads=config.get_int("linear_num_value_heads", config.heads),
        key_heads=key_heads,
        key_dim=key_dim,
        value_dim=config.get_int("linear_value_head_dim", 2 * key_dim),
        conv_size=config.get_int("linear_conv_kernel_dim", 4),
        negative_eigenvalues=config.get_bool("linear_allow_neg_eigval", True),
        norm_eps=1e-5,  # whatever config.json says
    )
    rope = config.get("rope_parameters") or {}
    has_positions = isinstance(rope, Mapping) and rope.get("rope_theta") is not None
    max_length = config.get_int("max_position_embeddings")
    positions: PositionsFactory = NoPositions
    if has_positions:
        positions, max_length, _ = build_rotary(config, max_length)
    return load_decoder(
        hf_checkpoint,
        OLMO,
        config,
        rotated_layers=[has_positions] * config.depth,
        special_entries=special_entries,
        memories=_hybrid_memories(window, max_length, types, memory),
        norm=norm,
        positions=positions,
        feed_forward=config.build_feed_forward(),
        qk_norm=norm,
        joint_qk_norm=True,
        norm_placement=["pre" if layer_type == "linear_attention" else "post" for layer_type in types],
    )


def _build_qwen(
    hf_checkpoint: HFCheckpoint,
    config: DecoderConfig,
    window: int | None,
    feed_forward: dict[str, Any],
    special_entries: Callable[[str, Tensor], list[WeightEntry] | None],
) -> MemoryTransformer:
    norm = partial(ZeroCenteredRMSNorm, eps=config.get_float("rms_norm_eps", 1e-6))
    memory = partial(
        GatedDeltaNet,
        heads=config.get_int("linear_num_value_heads"),
        key_heads=config.get_int("linear_num_key_heads"),
        key_dim=config.get_int("linear_key_head_dim"),
        value_dim=config.get_int("linear_value_head_dim"),
        conv_size=config.get_int("linear_conv_kernel_dim", 4),
        norm_eps=config.get_float("rms_norm_eps", 1e-6),
    )
    max_length = config.get_int("max_position_embeddings", 32768)
    positions, max_length, rotary_dim = build_rotary(config, max_length, head_dim=config.head_dim, partial_factor=0.25)
    return load_decoder(
        hf_checkpoint,
        QWEN,
        config,
        rotary_dim=rotary_dim,
        special_entries=special_entries,
        memories=_hybrid_memories(window, max_length, _layer_types(config), memory),
        norm=norm,
        positions=positions,
        qk_norm=norm,
        output_gate=True,
        **feed_forward,
    )


def _layer_types(config: DecoderConfig) -> list[str]:
    interval = config.get_int("full_attention_interval", 4)
    default = ["full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in range(config.depth)]
    return config.layer_types("linear_attention", "full_attention", default=default)


def _hybrid_memories(window: int | None, max_length: int, types: list[str], memory: Any) -> list[Any]:
    """Return a layer's memory each: an exact window for full attention."""
    windows = build_window_memories(window, max_length, [None])
    return [memory if layer_type == "linear_attention" else windows[0] for layer_type in types]


def _joined_by_key_head(config: DecoderConfig, name: str, layer: int) -> Iterator[WeightEntry]:
    """Yield the entry of a projection that Qwen3-Next joins with another, key head by key head."""
    key_heads, key_dim = config.get_int("linear_num_key_heads"), config.get_int("linear_key_head_dim")
    ratio = config.get_int("linear_num_value_heads") // key_heads
    value_rows = ratio * config.get_int("linear_value_head_dim")
    keys = key_heads * key_dim
    slices: list[RowSlice] = []
    for head in range(key_heads):
        if name.endswith(".qkv.weight"):
            slices += [
                RowSlice(name, head * key_dim, key_dim),
                RowSlice(name, keys + head * key_dim, key_dim),
                RowSlice(name, 2 * keys + head * value_rows, value_rows),
                RowSlice(name.replace(".qkv.", ".output_gate."), head * value_rows, value_rows),
            ]
        else:
            decay = name.replace(".write_gate.", ".decay_gate.")
            slices += [RowSlice(name, head * ratio, ratio), RowSlice(decay, head * ratio, ratio)]
    key = "in_proj_qkvz" if name.endswith(".qkv.weight") else "in_proj_ba"
    yield WeightTransform(tuple(slices)), [f"layers.{layer}.linear_attn.{key}.weight"]


def _expert_entries(name: str, tensor: Tensor, prefix: str, has_split_experts: bool) -> Iterator[WeightEntry]:
    """Yield the entries of all experts' weights: one tensor, or one per expert, whose gate and up parts are apart."""
    is_out = name.endswith(".out")
    if not has_split_experts:
        yield WeightTransform((RowSlice(name),)), [f"{prefix}.{'down_proj' if is_out else 'gate_up_proj'}"]
        return
    half = tensor.shape[1] // 2
    for expert in range(tensor.shape[0]):
        if is_out:
            yield WeightTransform((RowSlice(name, index=expert),)), [f"{prefix}.{expert}.down_proj.weight"]
            continue
        for part, start in (("gate_proj", 0), ("up_proj", half)):
            yield (WeightTransform((RowSlice(name, start, half, index=expert),)), [f"{prefix}.{expert}.{part}.weight"])

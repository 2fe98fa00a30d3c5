"""Layout of Reformer (Kitaev et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from memtx.errors import CheckpointError
from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig
from memtx.hf.layout import KeyMapping
from memtx.hf.loader import load_weights
from memtx.layers.positions.absolute import AxialPositionEmbeddings, PositionEmbeddings
from memtx.layers.reformer import LocalAttention, LSHAttention, ReformerAttention
from memtx.models.reformer import Reformer

REFORMER = KeyMapping(
    hf_keys={
        "embedding": ["embeddings.word_embeddings"],
        "positions.weights.{}": ["embeddings.position_embeddings.weights.{}"],
        "positions.table": ["embeddings.position_embeddings.embedding"],
        "blocks.{}.attention_norm": ["encoder.layers.{}.attention.layer_norm"],
        "blocks.{}.attention.query": ["encoder.layers.{}.attention.self_attention.query"],
        "blocks.{}.attention.key": ["encoder.layers.{}.attention.self_attention.key"],
        "blocks.{}.attention.query_key": ["encoder.layers.{}.attention.self_attention.query_key"],
        "blocks.{}.attention.value": ["encoder.layers.{}.attention.self_attention.value"],
        "blocks.{}.attention.out": ["encoder.layers.{}.attention.output.dense"],
        "blocks.{}.feed_forward_norm": ["encoder.layers.{}.feed_forward.layer_norm"],
        "blocks.{}.up": ["encoder.layers.{}.feed_forward.dense.dense"],
        "blocks.{}.down": ["encoder.layers.{}.feed_forward.output.dense"],
        "norm": ["encoder.layer_norm"],
        "head.weight": ["lm_head.decoder.weight"],
        # If both are present, transformers uses the first.
        "head.bias": ["lm_head.decoder.bias", "lm_head.bias"],
    },
    prefix="reformer.",
    head_prefixes=("lm_head.",),
    extra_patterns=(r"encoder\.layers\.\d+\.attention\.self_attention\.(self_)?mask_value_float(16|32)",),
)


def build(hf_checkpoint: HFCheckpoint) -> Reformer:
    """Build the Reformer of a folder; raises CheckpointError if an option or a tensor does not fit."""
    config = HFConfig(hf_checkpoint.config)
    model_factory = partial(
        Reformer,
        config.get_int("vocab_size", 320),
        config.get_int("hidden_size", 256),
        config.get_int("num_attention_heads", 12),
        _build_attentions(config),
        config.get_int("feed_forward_size", 512),
        _build_positions(config),
        config.get_bool("is_decoder", False),
        config.get_int("pad_token_id", 0, min_value=0),
        config.get_activation("hidden_act", "relu"),
        config.get_int("chunk_size_feed_forward", 0, min_value=0),
        add_lm_head=REFORMER.has_any(hf_checkpoint.tensors, *REFORMER.head_prefixes),
        eps=config.get_float("layer_norm_eps", 1e-12),
        dropout=config.get_float("hidden_dropout_prob", 0.05),
    )
    return load_weights(model_factory, hf_checkpoint, REFORMER)


def _build_attentions(config: HFConfig) -> list[Callable[[int, int, bool], ReformerAttention]]:
    def chunk_options(kind: str) -> dict[str, Any]:
        return {
            "head_dim": config.get_int("attention_head_size", 64),
            "chunk_length": config.get_int(f"{kind}_attn_chunk_length", 64),
            "num_chunks_before": config.get_int(f"{kind}_num_chunks_before", 1, min_value=0),
            "num_chunks_after": config.get_int(f"{kind}_num_chunks_after", 0, min_value=0),
            "dropout": config.get_float(f"{kind}_attention_probs_dropout_prob", 0.05 if kind == "local" else 0.0),
        }

    num_buckets = config.get("num_buckets")
    if num_buckets is not None:
        num_buckets = config.get_ints("num_buckets", None if isinstance(num_buckets, list) else 1)
    hashing: dict[str, Any] = {
        "num_hashes": config.get_int("num_hashes", 1),
        "num_buckets": num_buckets,
        "max_length": config.get_int("max_position_embeddings", 4096),
        "seed": config.get("hash_seed"),
    }
    factories: dict[str, Callable[[int, int, bool], ReformerAttention]] = {
        "local": partial(LocalAttention, **chunk_options("local")),
        "lsh": partial(LSHAttention, **chunk_options("lsh"), **hashing),
    }
    kinds = config.get("attn_layers", ["local", "lsh"] * 3)
    if unknown := [kind for kind in kinds if kind not in factories]:
        message = f"config.json has attn_layers = {unknown[0]!r}, expected 'local' or 'lsh'."
        raise CheckpointError(message, "Restore config.json.")
    return [factories[kind] for kind in kinds]


def _build_positions(config: HFConfig) -> Callable[[int], AxialPositionEmbeddings | PositionEmbeddings]:
    if not config.get_bool("axial_pos_embds", True):
        return partial(PositionEmbeddings, max_length=config.get_int("max_position_embeddings", 4096))
    shape = config.get_ints("axial_pos_shape", None, [64, 64])
    axis_dims = config.get_ints("axial_pos_embds_dim", None, [64, 192])
    return partial(AxialPositionEmbeddings, shape=shape, axis_dims=axis_dims)

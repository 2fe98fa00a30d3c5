"""Reformer's layout (Kitaev et al. 2020): options from its config.json and the map of names."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from memtx.errors import CheckpointError
from memtx.hf.checkpoint import Checkpoint
from memtx.hf.layout import KeyMapping, load_weights
from memtx.hf.options import HFConfig
from memtx.layers.positions.absolute import AxialPositionEmbeddings, PositionEmbeddings
from memtx.layers.reformer import LocalAttention, LSHAttention, ReformerAttention
from memtx.models.reformer import Reformer

KEY_MAPPING = KeyMapping(
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
        # Where both are there, only the first is used.
        "head.bias": ["lm_head.decoder.bias", "lm_head.bias"],
    },
    prefix="reformer.",
    head_prefixes=("lm_head.",),
    extra_patterns=(r"encoder\.layers\.\d+\.attention\.self_attention\.(self_)?mask_value_float(16|32)",),
)


def build_attentions(config: HFConfig) -> list[Callable[[int, int, bool], ReformerAttention]]:
    """Return what makes each layer's attention."""
    shared: dict[str, Any] = {"head_dim": config.get_int("attention_head_size", 64)}

    def chunks(kind: str) -> dict[str, Any]:
        return {
            "chunk_length": config.get_int(f"{kind}_attn_chunk_length", 64),
            "num_chunks_before": config.get_int(f"{kind}_num_chunks_before", 1, min_value=0),
            "num_chunks_after": config.get_int(f"{kind}_num_chunks_after", 0, min_value=0),
            "dropout": config.get_float(f"{kind}_attention_probs_dropout_prob", 0.05 if kind == "local" else 0.0),
        }

    buckets = config.get("num_buckets")
    hashing: dict[str, Any] = {
        "num_hashes": config.get_int("num_hashes", 1),
        "num_buckets": None if buckets is None else config.get_ints("num_buckets", None if _is_list(buckets) else 1),
        "max_length": config.get_int("max_position_embeddings", 4096),
        "seed": config.get("hash_seed"),
    }
    kinds = config.get("attn_layers", ["local", "lsh"] * 3)
    made: list[Callable[[int, int, bool], ReformerAttention]] = []
    for kind in kinds:
        if kind == "local":
            made.append(partial(LocalAttention, **shared, **chunks("local")))
        elif kind == "lsh":
            made.append(partial(LSHAttention, **shared, **chunks("lsh"), **hashing))
        else:
            raise CheckpointError(f"config.json has attn_layers {kinds!r}, known are 'local', 'lsh'.", "Restore it.")
    return made


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def build_positions(config: HFConfig) -> Callable[[int], AxialPositionEmbeddings | PositionEmbeddings]:
    """Return what makes the positions.

    Raises:
        CheckpointError: the grid has fewer points than there are to be positions.
    """
    longest = config.get_int("max_position_embeddings", 4096)
    if not config.get_bool("axial_pos_embds", True):
        return partial(PositionEmbeddings, max_length=longest)
    shape = config.get_ints("axial_pos_shape", None, [64, 64])
    if math.prod(shape) < 1:
        raise CheckpointError(f"config.json has axial_pos_shape {shape}.", "Restore it.")
    return partial(
        AxialPositionEmbeddings, shape=shape, axis_dims=config.get_ints("axial_pos_embds_dim", None, [64, 192])
    )


def build(hf_checkpoint: Checkpoint) -> Reformer:
    """Return the model of a folder.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = HFConfig(hf_checkpoint.config)
    model = Reformer(
        options.get_int("vocab_size", 320),
        options.get_int("hidden_size", 256),
        options.get_int("num_attention_heads", 12),
        build_attentions(options),
        options.get_int("feed_forward_size", 512),
        build_positions(options),
        options.get_bool("is_decoder", False),
        options.get_int("pad_token_id", 0, min_value=0),
        options.get_activation("hidden_act", "relu"),
        options.get_int("chunk_size_feed_forward", 0, min_value=0),
        add_lm_head=any(name.startswith("lm_head.") for name in hf_checkpoint.tensors),
        eps=options.get_float("layer_norm_eps", 1e-12),
        dropout=options.get_float("hidden_dropout_prob", 0.05),
    )
    load_weights(model, hf_checkpoint, KEY_MAPPING)
    return model

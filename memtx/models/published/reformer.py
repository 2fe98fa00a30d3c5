"""Reformer's layout (Kitaev et al. 2020): options from its config.json and the map of names."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from memtx.errors import CheckpointError
from memtx.layers.axial_positions import AxialPositions, TablePositions
from memtx.layers.chunk_attention import ChunkAttention, HashAttention, LocalAttention
from memtx.models.published.content import Content
from memtx.models.published.layout import Layout, load
from memtx.models.published.options import Options
from memtx.models.reformer import Reformer

LAYOUT = Layout(
    parts={
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
    heads=("lm_head.",),
    kept=(r"encoder\.layers\.\d+\.attention\.self_attention\.(self_)?mask_value_float(16|32)",),
)


def attentions(options: Options) -> list[Callable[[int, int, bool], ChunkAttention]]:
    """Return what makes each layer's attention."""
    shared: dict[str, Any] = {"head_dim": options.whole("attention_head_size", 64)}

    def chunks(kind: str) -> dict[str, Any]:
        return {
            "chunk": options.whole(f"{kind}_attn_chunk_length", 64),
            "before": options.whole(f"{kind}_num_chunks_before", 1, least=0),
            "after": options.whole(f"{kind}_num_chunks_after", 0, least=0),
            "dropout": options.number(f"{kind}_attention_probs_dropout_prob", 0.05 if kind == "local" else 0.0),
        }

    buckets = options.value("num_buckets")
    hashing: dict[str, Any] = {
        "rounds": options.whole("num_hashes", 1),
        "buckets": None if buckets is None else options.wholes("num_buckets", None if _is_list(buckets) else 1),
        "longest": options.whole("max_position_embeddings", 4096),
        "seed": options.value("hash_seed"),
    }
    kinds = options.value("attn_layers", ["local", "lsh"] * 3)
    made: list[Callable[[int, int, bool], ChunkAttention]] = []
    for kind in kinds:
        if kind == "local":
            made.append(partial(LocalAttention, **shared, **chunks("local")))
        elif kind == "lsh":
            made.append(partial(HashAttention, **shared, **chunks("lsh"), **hashing))
        else:
            raise CheckpointError(f"config.json has attn_layers {kinds!r}, known are 'local', 'lsh'.", "Restore it.")
    return made


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def positions(options: Options) -> Callable[[int], AxialPositions | TablePositions]:
    """Return what makes the positions.

    Raises:
        CheckpointError: the grid has fewer points than there are to be positions.
    """
    longest = options.whole("max_position_embeddings", 4096)
    if not options.flag("axial_pos_embds", True):
        return partial(TablePositions, longest=longest)
    shape = options.wholes("axial_pos_shape", None, [64, 64])
    if math.prod(shape) < 1:
        raise CheckpointError(f"config.json has axial_pos_shape {shape}.", "Restore it.")
    return partial(AxialPositions, shape=shape, widths=options.wholes("axial_pos_embds_dim", None, [64, 192]))


def build(found: Content) -> Reformer:
    """Return the model of a folder.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = Options(found.config)
    model = Reformer(
        options.whole("vocab_size", 320),
        options.whole("hidden_size", 256),
        options.whole("num_attention_heads", 12),
        attentions(options),
        options.whole("feed_forward_size", 512),
        positions(options),
        options.flag("is_decoder", False),
        options.whole("pad_token_id", 0, least=0),
        options.activation("hidden_act", "relu"),
        options.whole("chunk_size_feed_forward", 0, least=0),
        head=any(name.startswith("lm_head.") for name in found.tensors),
        eps=options.number("layer_norm_eps", 1e-12),
        dropout=options.number("hidden_dropout_prob", 0.05),
    )
    load(model, found, LAYOUT)
    return model

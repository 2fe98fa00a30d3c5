"""Longer inputs for a trained encoder: its full attention is replaced by a sparse one, its positions are repeated.

The conversion of RoBERTa in Longformer (Beltagy et al. 2020, section 5) and Big Bird (Zaheer et al. 2020, appendix E):
texts that fit into the window, up to the old length, are read as before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memtx import class_config
from memtx.errors import MemtxError, check_at_least
from memtx.layers.bigbird import BigBirdAttention
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.encoder_attention import EncoderAttention, FullAttention
from memtx.layers.longformer import LongformerAttention
from memtx.models.encoder import Encoder


def to_longformer(encoder: Encoder, max_length: int, window: int = 512) -> Encoder:
    """Return a copy of an encoder with full attention that has sliding windows and global tokens.

    Args:
        encoder: Encoder with full attention.
        max_length: Maximum tokens of a text.
        window: Neighbors visible besides the token itself, half of them on each side; even.

    Raises:
        MemtxError: The encoder has another attention, ``max_length`` is below its own, or a number is out of range.
    """
    return _lengthen(encoder, max_length, LongformerAttention, {"window": window})


def to_bigbird(encoder: Encoder, max_length: int, block_size: int = 64, num_random_blocks: int = 3) -> Encoder:
    """Return a copy of an encoder with full attention that sees neighboring, global and random blocks.

    Args:
        encoder: Encoder with full attention.
        max_length: Maximum tokens of a text.
        block_size: Tokens of a block.
        num_random_blocks: Random blocks that each block sees.

    Raises:
        MemtxError: The encoder has another attention, ``max_length`` is below its own, or a number is out of range.
    """
    options = {"block_size": block_size, "num_random_blocks": num_random_blocks, "max_length": max_length}
    return _lengthen(encoder, max_length, BigBirdAttention, options)


def _lengthen(
    encoder: Encoder, max_length: int, attention: type[EncoderAttention], options: Mapping[str, Any]
) -> Encoder:
    check_at_least(1, max_length=max_length)
    present = [block.attention for block in encoder._layers()]
    if any(type(layer) is not FullAttention for layer in present):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in present}))
        raise MemtxError(f"The encoder has {kinds}, not full attention.", "Give a BERT or RoBERTa.")
    embeddings = encoder.embedding
    # RoBERTa counts from behind the padding id: these rows are no positions.
    unused = embeddings.pad_token_id + 1 if embeddings.roberta_positions and embeddings.pad_token_id is not None else 0
    old_length = embeddings.position_embeddings.num_embeddings - unused
    if max_length < old_length:
        raise MemtxError(f"max_length is {max_length}, the encoder reads {old_length} tokens.", "Give a larger one.")
    config = copy.deepcopy(encoder.config)
    init_args = config["init_args"]
    init_args["embeddings"] = _with_positions(init_args.get("embeddings"), unused + max_length)
    init_args["attentions"] = [
        {
            "class_path": class_config.to_config(attention)["class_path"],
            "init_args": {**options, "bias": layer.query.bias is not None, "dropout": layer.dropout},
        }
        for layer in present
    ]
    vocab_size = init_args.pop("vocab_size")
    longer: Encoder = class_config.from_config(config)(vocab_size)
    weights = encoder.state_dict()
    positions = weights["embedding.position_embeddings.weight"]
    repeated = positions[unused:].repeat(-(-max_length // old_length), 1)[:max_length]
    weights["embedding.position_embeddings.weight"] = torch.cat([positions[:unused], repeated])
    longer.to(positions.dtype).load_state_dict({**_global_projections(longer, weights), **weights})
    return longer.train(encoder.training)


def _with_positions(embeddings: Any, num_positions: int) -> dict[str, Any]:
    """Return the config of embeddings with another number of positions."""
    config = embeddings or class_config.to_config(TextEmbeddings)
    return {**config, "init_args": {**config.get("init_args", {}), "num_positions": num_positions}}


def _global_projections(longer: Encoder, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of global tokens, which begin as those of all tokens."""
    names = [name for name in longer.state_dict() if ".attention.global_" in name]
    return {name: weights[name.replace(".global_", ".")] for name in names}

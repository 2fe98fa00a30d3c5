"""Layout of Big Bird (Zaheer et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from memtx.errors import CheckpointError
from memtx.hf.bert import BACKBONE_KEYS, DECODER_KEY, EXTRA_PATTERNS, LEGACY_SUFFIXES, MLM_HEAD_KEYS, build_encoder
from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig
from memtx.hf.layout import KeyMapping
from memtx.layers.bigbird import BigBirdAttention
from memtx.layers.encoder_attention import EncoderAttention, FullAttention
from memtx.models.encoder import Encoder

BIGBIRD = KeyMapping(
    hf_keys={**BACKBONE_KEYS, **MLM_HEAD_KEYS, "pooler": ["pooler"]},
    prefix="bert.",
    head_prefixes=("cls.",),
    extra_patterns=EXTRA_PATTERNS,
    legacy_suffixes=LEGACY_SUFFIXES,
)


def build(hf_checkpoint: HFCheckpoint) -> Encoder:
    """Return the Big Bird of a folder; raises CheckpointError if an option or a tensor does not fit."""
    config = HFConfig(hf_checkpoint.config)
    config.require("is_decoder", False, "decoders of this layout")
    return build_encoder(
        hf_checkpoint,
        BIGBIRD,
        DECODER_KEY,
        [_build_attention(config)],
        {"rescale_embeddings": config.get_bool("rescale_embeddings", False), "dropout_before_norm": True},
        vocab_size=50358,
        max_length=4096,
        activation="gelu_new",
    )


def _build_attention(config: HFConfig) -> Callable[[int, int, int], EncoderAttention]:
    bias, dropout = config.get_bool("use_bias", True), config.get_float("attention_probs_dropout_prob", 0.1)
    attention_type = config.get("attention_type", "block_sparse")
    if attention_type == "original_full":
        return partial(FullAttention, bias=bias, dropout=dropout)
    if attention_type != "block_sparse":
        raise CheckpointError(
            f"config.json has attention_type = {attention_type!r}, expected 'block_sparse' or 'original_full'.",
            "Restore config.json.",
        )
    return partial(
        BigBirdAttention,
        block_size=config.get_int("block_size", 64),
        num_random_blocks=config.get_int("num_random_blocks", 3, min_value=0),
        max_length=config.get_int("max_position_embeddings", 4096),
        bias=bias,
        dropout=dropout,
    )

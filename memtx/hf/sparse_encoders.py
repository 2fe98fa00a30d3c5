"""Layouts of encoders with sparse attention: Longformer (Beltagy et al. 2020) and Big Bird (Zaheer et al. 2020)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from memtx.errors import CheckpointError
from memtx.hf.bert import (
    BACKBONE_KEYS,
    DECODER_KEY,
    EMBEDDING_KEY,
    EXTRA_PATTERNS,
    LEGACY_SUFFIXES,
    MLM_HEAD_KEYS,
    ROBERTA_DECODER_KEY,
    ROBERTA_HEAD_KEYS,
    ROBERTA_POOLING,
    EncoderAttentionFactory,
    build_encoder,
)
from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig
from memtx.hf.layout import KeyMapping
from memtx.hf.task_heads import AnswerHead
from memtx.layers.bigbird import BigBirdAttention
from memtx.layers.encoder_attention import FullAttention
from memtx.layers.longformer import LongformerAttention
from memtx.models.encoder import Encoder
from memtx.models.heads import FeedForwardTokenHead, TaskModel

LONGFORMER = KeyMapping(
    hf_keys={
        **BACKBONE_KEYS,
        "embedding.word_embeddings.weight": [EMBEDDING_KEY, ROBERTA_DECODER_KEY],
        "blocks.{}.attention.global_query": ["encoder.layer.{}.attention.self.query_global"],
        "blocks.{}.attention.global_key": ["encoder.layer.{}.attention.self.key_global"],
        "blocks.{}.attention.global_value": ["encoder.layer.{}.attention.self.value_global"],
        **ROBERTA_HEAD_KEYS,
    },
    prefix="longformer.",
    head_prefixes=("lm_head.",),
    extra_patterns=(r"embeddings\.position_ids",),
    legacy_suffixes=LEGACY_SUFFIXES,
)


def get_windows(config: HFConfig, depth: int) -> list[int]:
    """Return the window of each Longformer layer; raises CheckpointError if one is odd."""
    windows = config.get_ints("attention_window", depth, 512, min_value=2)
    if odd_windows := [window for window in windows if window % 2]:
        message = f"config.json has attention_window = {odd_windows[0]}, expected even numbers."
        raise CheckpointError(message, "Restore config.json.")
    return windows


def build_longformer(hf_checkpoint: HFCheckpoint) -> Encoder | TaskModel:
    """Build the Longformer of a folder; raises CheckpointError if an option or a tensor does not fit."""
    config = HFConfig(hf_checkpoint.config)
    depth = config.get_int("num_hidden_layers", 12)
    windows = get_windows(config, depth)
    # Written by the authors' code; transformers does not have dilated windows.
    dilations = config.get_ints("attention_dilation", depth, 1)
    dropout = config.get_float("attention_probs_dropout_prob", 0.1)
    return build_encoder(
        hf_checkpoint,
        LONGFORMER,
        ROBERTA_DECODER_KEY,
        [
            partial(LongformerAttention, window=window, dilation=dilation, dropout=dropout)
            for window, dilation in zip(windows, dilations, strict=True)
        ],
        {"pad_token_id": config.get_int("pad_token_id", 1, min_value=0), "roberta_positions": True},
        mlm_head_activation=nn.GELU,
        pooling=ROBERTA_POOLING,
    )


BIGBIRD = KeyMapping(
    hf_keys={**BACKBONE_KEYS, **MLM_HEAD_KEYS, "pooler": ["pooler"]},
    prefix="bert.",
    head_prefixes=("cls.",),
    extra_patterns=EXTRA_PATTERNS,
    legacy_suffixes=LEGACY_SUFFIXES,
)


BIGBIRD_ANSWER_KEYS = {
    "intermediate": "qa_classifier.intermediate.dense",
    "output": "qa_classifier.output.dense",
    "norm": "qa_classifier.output.LayerNorm",
    "out": "qa_classifier.qa_outputs",
}


def build_bigbird(hf_checkpoint: HFCheckpoint) -> Encoder | TaskModel:
    """Build the Big Bird of a folder; raises CheckpointError if an option or a tensor does not fit."""
    config = HFConfig(hf_checkpoint.config)
    config.require("is_decoder", False, "decoders of this layout")
    activation = config.get_activation("hidden_act", "gelu_new")
    answer_head = partial(
        FeedForwardTokenHead,
        inner_dim=config.get_int("intermediate_size", 3072),
        activation=activation,
        eps=config.get_float("layer_norm_eps", 1e-12),
    )
    return build_encoder(
        hf_checkpoint,
        BIGBIRD,
        DECODER_KEY,
        [
            build_bigbird_attention(
                config, config.get_bool("use_bias", True), config.get_float("attention_probs_dropout_prob", 0.1)
            )
        ],
        {"rescale_embeddings": config.get_bool("rescale_embeddings", False), "dropout_before_norm": True},
        vocab_size=50358,
        max_length=4096,
        activation="gelu_new",
        pooling=replace(ROBERTA_POOLING, activation=activation),
        answer_head=AnswerHead(answer_head, BIGBIRD_ANSWER_KEYS),
    )


def build_bigbird_attention(config: HFConfig, bias: bool, dropout: float) -> EncoderAttentionFactory:
    """Return the factory of a layer's attention; raises CheckpointError for an unknown kind."""
    attention_type = config.get("attention_type", "block_sparse")
    if attention_type == "original_full":
        return partial(FullAttention, bias=bias, dropout=dropout)
    if attention_type != "block_sparse":
        message = f"config.json has attention_type = {attention_type!r}, expected 'block_sparse' or 'original_full'."
        raise CheckpointError(message, "Restore config.json.")
    return partial(
        BigBirdAttention,
        block_size=config.get_int("block_size", 64),
        num_random_blocks=config.get_int("num_random_blocks", 3, min_value=0),
        max_length=config.get_int("max_position_embeddings", 4096),
        bias=bias,
        dropout=dropout,
    )

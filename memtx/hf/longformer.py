"""Layout of Longformer (Beltagy et al. 2020)."""

from __future__ import annotations

from functools import partial

from torch import nn

from memtx.errors import CheckpointError
from memtx.hf.bert import BACKBONE_KEYS, EMBEDDING_KEY, LEGACY_SUFFIXES, build_encoder
from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig
from memtx.hf.layout import KeyMapping
from memtx.layers.longformer import LongformerAttention
from memtx.models.encoder import Encoder

DECODER_KEY = "lm_head.decoder.weight"

LONGFORMER = KeyMapping(
    hf_keys={
        **BACKBONE_KEYS,
        "embedding.word_embeddings.weight": [EMBEDDING_KEY, DECODER_KEY],
        "blocks.{}.attention.global_query": ["encoder.layer.{}.attention.self.query_global"],
        "blocks.{}.attention.global_key": ["encoder.layer.{}.attention.self.key_global"],
        "blocks.{}.attention.global_value": ["encoder.layer.{}.attention.self.value_global"],
        "head.transform": ["lm_head.dense"],
        "head.norm": ["lm_head.layer_norm"],
        "head.weight": [DECODER_KEY],
        "head.bias": ["lm_head.decoder.bias", "lm_head.bias"],
        "pooler": ["pooler.dense"],
    },
    prefix="longformer.",
    head_prefixes=("lm_head.",),
    extra_patterns=(r"embeddings\.position_ids",),
    legacy_suffixes=LEGACY_SUFFIXES,
)


def build(hf_checkpoint: HFCheckpoint) -> Encoder:
    """Return the Longformer of a folder; raises CheckpointError if an option or a tensor does not fit."""
    config = HFConfig(hf_checkpoint.config)
    depth = config.get_int("num_hidden_layers", 12)
    windows = config.get_ints("attention_window", depth, 512, min_value=2)
    if odd_windows := [window for window in windows if window % 2]:
        raise CheckpointError(
            f"config.json has attention_window = {odd_windows[0]}, expected even numbers.", "Restore config.json."
        )
    # Written by the authors' code; transformers has no dilated windows.
    dilations = config.get_ints("attention_dilation", depth, 1)
    dropout = config.get_float("attention_probs_dropout_prob", 0.1)
    return build_encoder(
        hf_checkpoint,
        LONGFORMER,
        DECODER_KEY,
        [
            partial(LongformerAttention, window=window, dilation=dilation, dropout=dropout)
            for window, dilation in zip(windows, dilations, strict=True)
        ],
        {"pad_token_id": config.get_int("pad_token_id", 1, min_value=0), "roberta_positions": True},
        mlm_head_activation=nn.GELU,
    )

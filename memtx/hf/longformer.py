"""Longformer's layout (Beltagy et al. 2020): options from its config.json and the map of names."""

from __future__ import annotations

from functools import partial

from torch import nn

from memtx.errors import CheckpointError
from memtx.hf.bert import BACKBONE_KEYS, LEGACY_NORM_SUFFIXES
from memtx.hf.checkpoint import Checkpoint
from memtx.hf.layout import KeyMapping, has_tied_weights, load_weights
from memtx.hf.options import HFConfig
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.longformer import LongformerAttention
from memtx.models.encoder import Encoder

EMBEDDING_KEY = "embeddings.word_embeddings.weight"
DECODER_KEY = "lm_head.decoder.weight"

KEY_MAPPING = KeyMapping(
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
    legacy_suffixes=LEGACY_NORM_SUFFIXES,
)


def build(hf_checkpoint: Checkpoint) -> Encoder:
    """Return the model of a folder.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = HFConfig(hf_checkpoint.config)
    depth = options.get_int("num_hidden_layers", 12)
    windows = options.get_ints("attention_window", depth, 512, min_value=2)
    if odd := [window for window in windows if window % 2]:
        raise CheckpointError(f"config.json has attention_window {odd[0]}, expected even ones.", "Restore it.")
    # Not an option of the library, which has no dilated windows: the authors' own code writes it.
    dilations = options.get_ints("attention_dilation", depth, 1)
    dropout = options.get_float("attention_probs_dropout_prob", 0.1)
    modern = {KEY_MAPPING.normalize_key(name) for name in hf_checkpoint.tensors}
    model = Encoder(
        options.get_int("vocab_size", 30522),
        options.get_int("hidden_size", 768),
        depth,
        options.get_int("num_attention_heads", 12),
        options.get_int("intermediate_size", 3072),
        [
            partial(LongformerAttention, window=window, dilation=dilation, dropout=dropout)
            for window, dilation in zip(windows, dilations, strict=True)
        ],
        partial(
            TextEmbeddings,
            num_positions=options.get_int("max_position_embeddings", 512),
            type_vocab_size=options.get_int("type_vocab_size", 2),
            pad_token_id=options.get_int("pad_token_id", 1, min_value=0),
            roberta_positions=True,
            eps=options.get_float("layer_norm_eps", 1e-12),
            dropout=options.get_float("hidden_dropout_prob", 0.1),
        ),
        options.get_activation("hidden_act", "gelu"),
        add_mlm_head=any(name.startswith("lm_head.") for name in modern),
        mlm_head_activation=nn.GELU,
        tie_embeddings=has_tied_weights(hf_checkpoint, KEY_MAPPING, DECODER_KEY, EMBEDDING_KEY),
        add_pooling_layer=any(name.startswith("pooler.") for name in modern),
        eps=options.get_float("layer_norm_eps", 1e-12),
        dropout=options.get_float("hidden_dropout_prob", 0.1),
    )
    load_weights(model, hf_checkpoint, KEY_MAPPING)
    return model

"""Big Bird's layout (Zaheer et al. 2020): options from its config.json and the map of names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from memtx.errors import CheckpointError
from memtx.hf.bert import (
    BACKBONE_KEYS,
    DECODER_KEY,
    EMBEDDING_KEY,
    EXTRA_PATTERNS,
    LEGACY_NORM_SUFFIXES,
    MLM_HEAD_KEYS,
)
from memtx.hf.checkpoint import Checkpoint
from memtx.hf.layout import KeyMapping, has_tied_weights, load_weights
from memtx.hf.options import HFConfig
from memtx.layers.bigbird import BigBirdAttention
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.encoder_attention import EncoderAttention, FullAttention
from memtx.models.encoder import Encoder

KEY_MAPPING = KeyMapping(
    hf_keys={**BACKBONE_KEYS, **MLM_HEAD_KEYS, "pooler": ["pooler"]},
    prefix="bert.",
    head_prefixes=("cls.",),
    extra_patterns=EXTRA_PATTERNS,
    legacy_suffixes=LEGACY_NORM_SUFFIXES,
)


def build_attention(config: HFConfig) -> Callable[[int, int, int], EncoderAttention]:
    """Return what makes a layer's attention."""
    bias, dropout = config.get_bool("use_bias", True), config.get_float("attention_probs_dropout_prob", 0.1)
    kind = config.get("attention_type", "block_sparse")
    if kind == "original_full":
        return partial(FullAttention, bias=bias, dropout=dropout)
    if kind != "block_sparse":
        raise CheckpointError(
            f"config.json has attention_type = {kind!r}, expected 'block_sparse' or 'original_full'.", "Restore it."
        )
    return partial(
        BigBirdAttention,
        block_size=config.get_int("block_size", 64),
        num_random_blocks=config.get_int("num_random_blocks", 3, min_value=0),
        max_length=config.get_int("max_position_embeddings", 4096),
        bias=bias,
        dropout=dropout,
    )


def build(hf_checkpoint: Checkpoint) -> Encoder:
    """Return the model of a folder.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = HFConfig(hf_checkpoint.config)
    options.require("is_decoder", False, "a decoder of this layout is not read")
    modern = {KEY_MAPPING.normalize_key(name) for name in hf_checkpoint.tensors}
    model = Encoder(
        options.get_int("vocab_size", 50358),
        options.get_int("hidden_size", 768),
        options.get_int("num_hidden_layers", 12),
        options.get_int("num_attention_heads", 12),
        options.get_int("intermediate_size", 3072),
        [build_attention(options)],
        partial(
            TextEmbeddings,
            num_positions=options.get_int("max_position_embeddings", 4096),
            type_vocab_size=options.get_int("type_vocab_size", 2),
            pad_token_id=options.get("pad_token_id", 0),
            rescale_embeddings=options.get_bool("rescale_embeddings", False),
            eps=options.get_float("layer_norm_eps", 1e-12),
            dropout=options.get_float("hidden_dropout_prob", 0.1),
            dropout_before_norm=True,
        ),
        options.get_activation("hidden_act", "gelu_new"),
        add_mlm_head=any(name.startswith("cls.predictions.") for name in modern),
        tie_embeddings=has_tied_weights(hf_checkpoint, KEY_MAPPING, DECODER_KEY, EMBEDDING_KEY),
        add_pooling_layer=any(name.startswith("pooler.") for name in modern),
        eps=options.get_float("layer_norm_eps", 1e-12),
        dropout=options.get_float("hidden_dropout_prob", 0.1),
    )
    load_weights(model, hf_checkpoint, KEY_MAPPING)
    return model

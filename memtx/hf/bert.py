"""BERT's layout (Devlin et al. 2019): options from its config.json and the map of names."""

from __future__ import annotations

from functools import partial

from memtx.hf.checkpoint import Checkpoint
from memtx.hf.layout import KeyMapping, has_tied_weights, load_weights
from memtx.hf.options import HFConfig
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.encoder_attention import FullAttention
from memtx.models.encoder import Encoder

EMBEDDING_KEY = "embeddings.word_embeddings.weight"
DECODER_KEY = "cls.predictions.decoder.weight"

BACKBONE_KEYS = {
    # The decoder's weights are these where the two are tied.
    "embedding.word_embeddings.weight": [EMBEDDING_KEY, DECODER_KEY],
    "embedding.position_embeddings": ["embeddings.position_embeddings"],
    "embedding.token_type_embeddings": ["embeddings.token_type_embeddings"],
    "embedding.norm": ["embeddings.LayerNorm"],
    "blocks.{}.attention.query": ["encoder.layer.{}.attention.self.query"],
    "blocks.{}.attention.key": ["encoder.layer.{}.attention.self.key"],
    "blocks.{}.attention.value": ["encoder.layer.{}.attention.self.value"],
    "blocks.{}.attention.out": ["encoder.layer.{}.attention.output.dense"],
    "blocks.{}.attention_norm": ["encoder.layer.{}.attention.output.LayerNorm"],
    "blocks.{}.feed_forward.up": ["encoder.layer.{}.intermediate.dense"],
    "blocks.{}.feed_forward.out": ["encoder.layer.{}.output.dense"],
    "blocks.{}.feed_forward_norm": ["encoder.layer.{}.output.LayerNorm"],
}
"""The body, which Longformer's and Big Bird's layouts share."""

MLM_HEAD_KEYS = {
    "head.transform": ["cls.predictions.transform.dense"],
    "head.norm": ["cls.predictions.transform.LayerNorm"],
    "head.weight": [DECODER_KEY],
    "head.bias": ["cls.predictions.decoder.bias", "cls.predictions.bias"],
}
"""The head for masked tokens, which Big Bird's layout shares."""

EXTRA_PATTERNS = (r"embeddings\.position_ids", r"embeddings\.token_type_ids", r"cls\.seq_relationship\.(weight|bias)")
"""Tables of numbers, and the head that tells whether two texts follow each other."""

LEGACY_NORM_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

KEY_MAPPING = KeyMapping(
    hf_keys={
        **BACKBONE_KEYS,
        **MLM_HEAD_KEYS,
        "pooler": ["pooler.dense"],
    },
    prefix="bert.",
    head_prefixes=("cls.",),
    extra_patterns=EXTRA_PATTERNS,
    legacy_suffixes=LEGACY_NORM_SUFFIXES,
)


def build(hf_checkpoint: Checkpoint) -> Encoder:
    """Return the model of a folder.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = HFConfig(hf_checkpoint.config)
    options.require("is_decoder", False, "a decoder of this layout is not read")
    options.require("position_embedding_type", "absolute", "other positions are not read")
    modern = {KEY_MAPPING.normalize_key(name) for name in hf_checkpoint.tensors}
    model = Encoder(
        options.get_int("vocab_size", 30522),
        options.get_int("hidden_size", 768),
        options.get_int("num_hidden_layers", 12),
        options.get_int("num_attention_heads", 12),
        options.get_int("intermediate_size", 3072),
        [partial(FullAttention, dropout=options.get_float("attention_probs_dropout_prob", 0.1))],
        partial(
            TextEmbeddings,
            num_positions=options.get_int("max_position_embeddings", 512),
            type_vocab_size=options.get_int("type_vocab_size", 2),
            pad_token_id=options.get("pad_token_id", 0),
            eps=options.get_float("layer_norm_eps", 1e-12),
            dropout=options.get_float("hidden_dropout_prob", 0.1),
        ),
        options.get_activation("hidden_act", "gelu"),
        add_mlm_head=any(name.startswith("cls.predictions.") for name in modern),
        tie_embeddings=has_tied_weights(hf_checkpoint, KEY_MAPPING, DECODER_KEY, EMBEDDING_KEY),
        add_pooling_layer=any(name.startswith("pooler.") for name in modern),
        eps=options.get_float("layer_norm_eps", 1e-12),
        dropout=options.get_float("hidden_dropout_prob", 0.1),
    )
    load_weights(model, hf_checkpoint, KEY_MAPPING)
    return model

"""DistilBERT's layout (Sanh et al. 2019): options from its config.json and the map of names."""

from __future__ import annotations

from functools import partial

from memtx.hf.checkpoint import Checkpoint
from memtx.hf.layout import KeyMapping, has_tied_weights, load_weights
from memtx.hf.options import HFConfig
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.encoder_attention import FullAttention
from memtx.models.encoder import Encoder

EMBEDDING_KEY = "embeddings.word_embeddings.weight"
DECODER_KEY = "vocab_projector.weight"
LAYER_NORM_EPS = 1e-12
"""Of every norm: the layout has no key for it."""

KEY_MAPPING = KeyMapping(
    hf_keys={
        "embedding.word_embeddings.weight": [EMBEDDING_KEY, DECODER_KEY],
        "embedding.position_embeddings": ["embeddings.position_embeddings"],
        "embedding.norm": ["embeddings.LayerNorm"],
        "blocks.{}.attention.query": ["transformer.layer.{}.attention.q_lin"],
        "blocks.{}.attention.key": ["transformer.layer.{}.attention.k_lin"],
        "blocks.{}.attention.value": ["transformer.layer.{}.attention.v_lin"],
        "blocks.{}.attention.out": ["transformer.layer.{}.attention.out_lin"],
        "blocks.{}.attention_norm": ["transformer.layer.{}.sa_layer_norm"],
        "blocks.{}.feed_forward.up": ["transformer.layer.{}.ffn.lin1"],
        "blocks.{}.feed_forward.out": ["transformer.layer.{}.ffn.lin2"],
        "blocks.{}.feed_forward_norm": ["transformer.layer.{}.output_layer_norm"],
        "head.transform": ["vocab_transform"],
        "head.norm": ["vocab_layer_norm"],
        "head.weight": [DECODER_KEY],
        "head.bias": ["vocab_projector.bias"],
    },
    prefix="distilbert.",
    head_prefixes=("vocab_",),
    extra_patterns=(r"embeddings\.position_ids",),
    legacy_suffixes={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)


def build(hf_checkpoint: Checkpoint) -> Encoder:
    """Return the model of a folder.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = HFConfig(hf_checkpoint.config)
    dropout = options.get_float("dropout", 0.1)
    model = Encoder(
        options.get_int("vocab_size", 30522),
        options.get_int("dim", 768),
        options.get_int("n_layers", 6),
        options.get_int("n_heads", 12),
        options.get_int("hidden_dim", 3072),
        [partial(FullAttention, dropout=options.get_float("attention_dropout", 0.1))],
        partial(
            TextEmbeddings,
            # Sinusoidal positions are kept in the checkpoint as well, so a table is a table.
            num_positions=options.get_int("max_position_embeddings", 512),
            pad_token_id=options.get("pad_token_id", 0),
            eps=LAYER_NORM_EPS,
            dropout=dropout,
        ),
        options.get_activation("activation", "gelu"),
        add_mlm_head=any(name.startswith("vocab_") for name in hf_checkpoint.tensors),
        tie_embeddings=has_tied_weights(hf_checkpoint, KEY_MAPPING, DECODER_KEY, EMBEDDING_KEY),
        eps=LAYER_NORM_EPS,
        dropout=dropout,
    )
    load_weights(model, hf_checkpoint, KEY_MAPPING)
    return model

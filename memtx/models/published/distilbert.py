"""DistilBERT's layout (Sanh et al. 2019): options from its config.json and the map of names."""

from __future__ import annotations

from functools import partial

from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.pattern_attention import FullAttention
from memtx.models.encoder import Encoder
from memtx.models.published.content import Content
from memtx.models.published.layout import Layout, load, tied
from memtx.models.published.options import Options

EMBEDDING = "embeddings.word_embeddings.weight"
DECODER = "vocab_projector.weight"
EPS = 1e-12
"""Of every norm: the layout has no key for it."""

LAYOUT = Layout(
    parts={
        "embedding.tokens.weight": [EMBEDDING, DECODER],
        "embedding.positions": ["embeddings.position_embeddings"],
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
        "head.weight": [DECODER],
        "head.bias": ["vocab_projector.bias"],
    },
    prefix="distilbert.",
    heads=("vocab_",),
    kept=(r"embeddings\.position_ids",),
    spellings={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)


def build(found: Content) -> Encoder:
    """Return the model of a folder.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = Options(found.config)
    dropout = options.number("dropout", 0.1)
    model = Encoder(
        options.whole("vocab_size", 30522),
        options.whole("dim", 768),
        options.whole("n_layers", 6),
        options.whole("n_heads", 12),
        options.whole("hidden_dim", 3072),
        [partial(FullAttention, dropout=options.number("attention_dropout", 0.1))],
        partial(
            TextEmbeddings,
            # Sinusoidal positions are kept in the checkpoint as well, so a table is a table.
            positions=options.whole("max_position_embeddings", 512),
            padding=options.value("pad_token_id", 0),
            eps=EPS,
            dropout=dropout,
        ),
        options.activation("activation", "gelu"),
        masked_head=any(name.startswith("vocab_") for name in found.tensors),
        tie_embeddings=tied(found, LAYOUT, DECODER, EMBEDDING),
        eps=EPS,
        dropout=dropout,
    )
    load(model, found, LAYOUT)
    return model

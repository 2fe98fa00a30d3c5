"""BERT's layout (Devlin et al. 2019): options from its config.json and the map of names."""

from __future__ import annotations

from functools import partial

from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.pattern_attention import FullAttention
from memtx.models.encoder import Encoder
from memtx.models.published.content import Content
from memtx.models.published.layout import Layout, load, tied
from memtx.models.published.options import Options

EMBEDDING = "embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"

BODY = {
    # The decoder's weights are these where the two are tied.
    "embedding.tokens.weight": [EMBEDDING, DECODER],
    "embedding.positions": ["embeddings.position_embeddings"],
    "embedding.types": ["embeddings.token_type_embeddings"],
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

HEAD = {
    "head.transform": ["cls.predictions.transform.dense"],
    "head.norm": ["cls.predictions.transform.LayerNorm"],
    "head.weight": [DECODER],
    "head.bias": ["cls.predictions.decoder.bias", "cls.predictions.bias"],
}
"""The head for masked tokens, which Big Bird's layout shares."""

KEPT = (r"embeddings\.position_ids", r"embeddings\.token_type_ids", r"cls\.seq_relationship\.(weight|bias)")
"""Tables of numbers, and the head that tells whether two texts follow each other."""

OLD_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

LAYOUT = Layout(
    parts={
        **BODY,
        **HEAD,
        "pooler": ["pooler.dense"],
    },
    prefix="bert.",
    heads=("cls.",),
    kept=KEPT,
    spellings=OLD_NORMS,
)


def build(found: Content) -> Encoder:
    """Return the model of a folder.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = Options(found.config)
    options.refuse("is_decoder", False, "a decoder of this layout is not read")
    options.refuse("position_embedding_type", "absolute", "other positions are not read")
    modern = {LAYOUT.modern(name) for name in found.tensors}
    model = Encoder(
        options.whole("vocab_size", 30522),
        options.whole("hidden_size", 768),
        options.whole("num_hidden_layers", 12),
        options.whole("num_attention_heads", 12),
        options.whole("intermediate_size", 3072),
        [partial(FullAttention, dropout=options.number("attention_probs_dropout_prob", 0.1))],
        partial(
            TextEmbeddings,
            positions=options.whole("max_position_embeddings", 512),
            types=options.whole("type_vocab_size", 2),
            padding=options.value("pad_token_id", 0),
            eps=options.number("layer_norm_eps", 1e-12),
            dropout=options.number("hidden_dropout_prob", 0.1),
        ),
        options.activation("hidden_act", "gelu"),
        masked_head=any(name.startswith("cls.predictions.") for name in modern),
        tie_embeddings=tied(found, LAYOUT, DECODER, EMBEDDING),
        pooler=any(name.startswith("pooler.") for name in modern),
        eps=options.number("layer_norm_eps", 1e-12),
        dropout=options.number("hidden_dropout_prob", 0.1),
    )
    load(model, found, LAYOUT)
    return model

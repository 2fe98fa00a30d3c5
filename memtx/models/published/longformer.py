"""Longformer's layout (Beltagy et al. 2020): options from its config.json and the map of names."""

from __future__ import annotations

from functools import partial

from torch import nn

from memtx.errors import CheckpointError
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.window_attention import WindowAttention
from memtx.models.encoder import Encoder
from memtx.models.published.bert import BODY, OLD_NORMS
from memtx.models.published.content import Content
from memtx.models.published.layout import Layout, load, tied
from memtx.models.published.options import Options

EMBEDDING = "embeddings.word_embeddings.weight"
DECODER = "lm_head.decoder.weight"

LAYOUT = Layout(
    parts={
        **BODY,
        "embedding.tokens.weight": [EMBEDDING, DECODER],
        "blocks.{}.attention.global_query": ["encoder.layer.{}.attention.self.query_global"],
        "blocks.{}.attention.global_key": ["encoder.layer.{}.attention.self.key_global"],
        "blocks.{}.attention.global_value": ["encoder.layer.{}.attention.self.value_global"],
        "head.transform": ["lm_head.dense"],
        "head.norm": ["lm_head.layer_norm"],
        "head.weight": [DECODER],
        "head.bias": ["lm_head.decoder.bias", "lm_head.bias"],
        "pooler": ["pooler.dense"],
    },
    prefix="longformer.",
    heads=("lm_head.",),
    kept=(r"embeddings\.position_ids",),
    spellings=OLD_NORMS,
)


def build(found: Content) -> Encoder:
    """Return the model of a folder.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = Options(found.config)
    depth = options.whole("num_hidden_layers", 12)
    windows = options.wholes("attention_window", depth, 512, least=2)
    if odd := [window for window in windows if window % 2]:
        raise CheckpointError(f"config.json has attention_window {odd[0]}, expected even ones.", "Restore it.")
    # Not an option of the library, which has no dilated windows: the authors' own code writes it.
    dilations = options.wholes("attention_dilation", depth, 1)
    dropout = options.number("attention_probs_dropout_prob", 0.1)
    modern = {LAYOUT.modern(name) for name in found.tensors}
    model = Encoder(
        options.whole("vocab_size", 30522),
        options.whole("hidden_size", 768),
        depth,
        options.whole("num_attention_heads", 12),
        options.whole("intermediate_size", 3072),
        [
            partial(WindowAttention, window=window, dilation=dilation, dropout=dropout)
            for window, dilation in zip(windows, dilations, strict=True)
        ],
        partial(
            TextEmbeddings,
            positions=options.whole("max_position_embeddings", 512),
            types=options.whole("type_vocab_size", 2),
            padding=options.whole("pad_token_id", 1, least=0),
            numbered_by_tokens=True,
            eps=options.number("layer_norm_eps", 1e-12),
            dropout=options.number("hidden_dropout_prob", 0.1),
        ),
        options.activation("hidden_act", "gelu"),
        masked_head=any(name.startswith("lm_head.") for name in modern),
        head_activation=nn.GELU,
        tie_embeddings=tied(found, LAYOUT, DECODER, EMBEDDING),
        pooler=any(name.startswith("pooler.") for name in modern),
        eps=options.number("layer_norm_eps", 1e-12),
        dropout=options.number("hidden_dropout_prob", 0.1),
    )
    load(model, found, LAYOUT)
    return model

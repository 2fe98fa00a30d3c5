"""Layouts of BERT (Devlin et al. 2019) and DistilBERT (Sanh et al. 2019), and parts shared with other encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig
from memtx.hf.layout import KeyMapping
from memtx.hf.loader import has_tied_weights, load_weights
from memtx.hf.task_heads import (
    MASKED_LM,
    AnswerHead,
    TaskPooling,
    get_class_name,
    get_task,
    load_task_model,
    unsupported_task_error,
)
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.encoder_attention import EncoderAttention, FullAttention
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel

EncoderAttentionFactory = Callable[[int, int, int], EncoderAttention]

EMBEDDING_KEY = "embeddings.word_embeddings.weight"
DECODER_KEY = "cls.predictions.decoder.weight"

BACKBONE_KEYS = {
    # The MLM head's decoder, if tied, is the embedding.
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
"""Keys of the backbone, shared with Longformer and Big Bird."""

MLM_HEAD_KEYS = {
    "head.transform": ["cls.predictions.transform.dense"],
    "head.norm": ["cls.predictions.transform.LayerNorm"],
    "head.weight": [DECODER_KEY],
    "head.bias": ["cls.predictions.decoder.bias", "cls.predictions.bias"],
}
"""Keys of the MLM head, shared with Big Bird."""

# Index tables, and the head for next-sentence prediction.
EXTRA_PATTERNS = (r"embeddings\.position_ids", r"embeddings\.token_type_ids", r"cls\.seq_relationship\.(weight|bias)")

LEGACY_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

BERT = KeyMapping(
    hf_keys={**BACKBONE_KEYS, **MLM_HEAD_KEYS, "pooler": ["pooler.dense"]},
    prefix="bert.",
    head_prefixes=("cls.",),
    extra_patterns=EXTRA_PATTERNS,
    legacy_suffixes=LEGACY_SUFFIXES,
)

ROBERTA_DECODER_KEY = "lm_head.decoder.weight"

ROBERTA_HEAD_KEYS = {
    "head.transform": ["lm_head.dense"],
    "head.norm": ["lm_head.layer_norm"],
    "head.weight": [ROBERTA_DECODER_KEY],
    "head.bias": ["lm_head.decoder.bias", "lm_head.bias"],
    "pooler": ["pooler.dense"],
}
"""Keys of the MLM head and the pooler, shared with Longformer."""

ROBERTA_POOLING = TaskPooling("classifier.dense", "classifier.out_proj")

ROBERTA = KeyMapping(
    hf_keys={
        **BACKBONE_KEYS,
        **ROBERTA_HEAD_KEYS,
        "embedding.word_embeddings.weight": [EMBEDDING_KEY, ROBERTA_DECODER_KEY],
    },
    prefix="roberta.",
    head_prefixes=("lm_head.",),
    extra_patterns=EXTRA_PATTERNS,
    legacy_suffixes=LEGACY_SUFFIXES,
)

DISTILBERT_DECODER_KEY = "vocab_projector.weight"

DISTILBERT = KeyMapping(
    hf_keys={
        "embedding.word_embeddings.weight": [EMBEDDING_KEY, DISTILBERT_DECODER_KEY],
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
        "head.weight": [DISTILBERT_DECODER_KEY],
        "head.bias": ["vocab_projector.bias"],
    },
    prefix="distilbert.",
    head_prefixes=("vocab_",),
    extra_patterns=(r"embeddings\.position_ids",),
    legacy_suffixes=LEGACY_SUFFIXES,
)


@dataclass(frozen=True)
class EncoderConfigKeys:
    """Names of an encoder's options in config.json; None for an option that the layout lacks."""

    dim: str = "hidden_size"
    depth: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    hidden_dim: str = "intermediate_size"
    activation: str = "hidden_act"
    dropout: str = "hidden_dropout_prob"
    type_vocab_size: str | None = "type_vocab_size"
    eps: str | None = "layer_norm_eps"


def build_encoder(
    hf_checkpoint: HFCheckpoint,
    mapping: KeyMapping,
    decoder_key: str,
    attentions: Sequence[EncoderAttentionFactory],
    embedding_options: dict[str, Any] | None = None,
    *,
    keys: EncoderConfigKeys | None = None,
    vocab_size: int = 30522,
    depth: int = 12,
    max_length: int = 512,
    activation: str = "gelu",
    mlm_head_activation: Callable[[], nn.Module] | None = None,
    pooling: TaskPooling | None = None,
    answer_head: AnswerHead | None = None,
) -> Encoder | TaskModel:
    """Build the encoder of a folder, with its task head; raises CheckpointError if an option or tensor does not fit.

    ``decoder_key`` is the MLM head's output weight, which may be tied to the embeddings; ``attentions`` has one factory
    for all layers or one per layer; ``keys`` defaults to BERT's, ``mlm_head_activation`` to the feed-forward
    activation, ``pooling`` and ``answer_head`` to BERT's. vocab_size, depth, max_length and activation are defaults of
    options that the config omits.
    """
    config, keys = HFConfig(hf_checkpoint.config), keys or EncoderConfigKeys()
    eps = config.get_float(keys.eps, 1e-12) if keys.eps is not None else 1e-12
    dropout = config.get_float(keys.dropout, 0.1)
    embeddings = partial(
        TextEmbeddings,
        num_positions=config.get_int("max_position_embeddings", max_length),
        type_vocab_size=config.get_int(keys.type_vocab_size, 2) if keys.type_vocab_size is not None else 0,
        eps=eps,
        dropout=dropout,
        **{"pad_token_id": config.get("pad_token_id", 0), **(embedding_options or {})},
    )
    encoder_factory = partial(
        Encoder,
        dim=config.get_int(keys.dim, 768),
        depth=config.get_int(keys.depth, depth),
        heads=config.get_int(keys.heads, 12),
        hidden_dim=config.get_int(keys.hidden_dim, 3072),
        attentions=attentions,
        embeddings=embeddings,
        activation=config.get_activation(keys.activation, activation),
    )
    vocab_size = config.get_int("vocab_size", vocab_size)
    if get_class_name(hf_checkpoint.config).endswith("ForMultipleChoice"):
        raise unsupported_task_error(hf_checkpoint.path, hf_checkpoint.config)
    if (task := get_task(hf_checkpoint.config)) is not None and task != MASKED_LM:
        encoder_factory = partial(encoder_factory, add_mlm_head=False, eps=eps, dropout=dropout)
        heads = (pooling or TaskPooling(), answer_head or AnswerHead())
        return load_task_model(hf_checkpoint, mapping, task, encoder_factory, vocab_size, *heads)
    model_factory = partial(
        encoder_factory,
        vocab_size,
        add_mlm_head=mapping.has_any(hf_checkpoint.tensors, *mapping.hf_keys["head.transform"]),
        mlm_head_activation=mlm_head_activation,
        tie_embeddings=has_tied_weights(hf_checkpoint, mapping, decoder_key, EMBEDDING_KEY),
        add_pooling_layer="pooler" in mapping.hf_keys and mapping.has_any(hf_checkpoint.tensors, "pooler."),
        eps=eps,
        dropout=dropout,
    )
    return load_weights(model_factory, hf_checkpoint, mapping)


def build_bert(hf_checkpoint: HFCheckpoint) -> Encoder | TaskModel:
    """Build the BERT of a folder; raises CheckpointError if an option or a tensor does not fit."""
    config = HFConfig(hf_checkpoint.config)
    config.require("is_decoder", False, "decoders of this layout")
    config.require("position_embedding_type", "absolute", "other positions")
    attention = partial(FullAttention, dropout=config.get_float("attention_probs_dropout_prob", 0.1))
    return build_encoder(hf_checkpoint, BERT, DECODER_KEY, [attention])


def build_roberta(hf_checkpoint: HFCheckpoint) -> Encoder | TaskModel:
    """Build the RoBERTa of a folder; raises CheckpointError if an option or a tensor does not fit."""
    config = HFConfig(hf_checkpoint.config)
    config.require("is_decoder", False, "decoders of this layout")
    config.require("position_embedding_type", "absolute", "other positions")
    attention = partial(FullAttention, dropout=config.get_float("attention_probs_dropout_prob", 0.1))
    embeddings = {"pad_token_id": config.get_int("pad_token_id", 1, min_value=0), "roberta_positions": True}
    options: dict[str, Any] = {"vocab_size": 50265, "mlm_head_activation": nn.GELU, "pooling": ROBERTA_POOLING}
    return build_encoder(hf_checkpoint, ROBERTA, ROBERTA_DECODER_KEY, [attention], embeddings, **options)


def build_distilbert(hf_checkpoint: HFCheckpoint) -> Encoder | TaskModel:
    """Build the DistilBERT of a folder; raises CheckpointError if an option or a tensor does not fit."""
    attention = partial(FullAttention, dropout=HFConfig(hf_checkpoint.config).get_float("attention_dropout", 0.1))
    # Sinusoidal positions are stored as a table, like learned ones.
    keys = EncoderConfigKeys("dim", "n_layers", "n_heads", "hidden_dim", "activation", "dropout", None, None)
    options: dict[str, Any] = {
        "keys": keys,
        "depth": 6,
        "pooling": TaskPooling("pre_classifier", "classifier", nn.ReLU),
    }
    return build_encoder(hf_checkpoint, DISTILBERT, DISTILBERT_DECODER_KEY, [attention], **options)

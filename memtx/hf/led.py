"""Layout of LED, the Longformer encoder-decoder (Beltagy et al. 2020, section 7)."""

from __future__ import annotations

from functools import partial

from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig
from memtx.hf.layout import KeyMapping
from memtx.hf.loader import load_weights
from memtx.hf.sparse_encoders import get_windows
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.longformer import LongformerAttention
from memtx.models.encoder import Encoder
from memtx.models.encoder_decoder import EncoderDecoder

_ENCODER, _SELF, _CROSS = "encoder.layers.{}", "decoder.layers.{}.self_attn", "decoder.layers.{}.encoder_attn"
_WINDOW = f"{_ENCODER}.self_attn.longformer_self_attn"
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}

LED = KeyMapping(
    hf_keys={
        "encoder.embedding.word_embeddings.weight": [
            "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"
        ],
        "encoder.embedding.position_embeddings": ["encoder.embed_positions"],
        "encoder.embedding.norm": ["encoder.layernorm_embedding"],
        **{
            f"encoder.blocks.{{}}.attention.{prefix}{name}": [f"{_WINDOW}.{name}{suffix}"]
            for name in ("query", "key", "value")
            for prefix, suffix in (("", ""), ("global_", "_global"))
        },
        "encoder.blocks.{}.attention.out": [f"{_ENCODER}.self_attn.output"],
        "encoder.blocks.{}.attention_norm": [f"{_ENCODER}.self_attn_layer_norm"],
        "encoder.blocks.{}.feed_forward.up": [f"{_ENCODER}.fc1"],
        "encoder.blocks.{}.feed_forward.out": [f"{_ENCODER}.fc2"],
        "encoder.blocks.{}.feed_forward_norm": [f"{_ENCODER}.final_layer_norm"],
        "position_embeddings": ["decoder.embed_positions"],
        "embedding_norm": ["decoder.layernorm_embedding"],
        **{f"blocks.{{}}.attention.{name}": [f"{_SELF}.{key}"] for name, key in _PROJECTIONS.items()},
        "blocks.{}.attention_norm": ["decoder.layers.{}.self_attn_layer_norm"],
        **{f"blocks.{{}}.cross_attention.{name}": [f"{_CROSS}.{key}"] for name, key in _PROJECTIONS.items()},
        "blocks.{}.cross_attention_norm": ["decoder.layers.{}.encoder_attn_layer_norm"],
        "blocks.{}.feed_forward.up": ["decoder.layers.{}.fc1"],
        "blocks.{}.feed_forward.out": ["decoder.layers.{}.fc2"],
        "blocks.{}.feed_forward_norm": ["decoder.layers.{}.final_layer_norm"],
        "logits_bias": ["final_logits_bias"],
    },
    prefix="led.",
    head_prefixes=("lm_head.", "final_logits_bias"),
)  # fmt: skip


def build(hf_checkpoint: HFCheckpoint) -> EncoderDecoder:
    """Build the LED of a folder; raises CheckpointError if an option or a tensor does not fit."""
    config = HFConfig(hf_checkpoint.config)
    config.require("tie_word_embeddings", True, "an output of its own")
    depth = config.get_int("encoder_layers", 12)
    windows = get_windows(config, depth)
    dropout, attention_dropout = config.get_float("dropout", 0.1), config.get_float("attention_dropout", 0.0)
    eps, activation = 1e-5, config.get_activation("activation_function", "gelu")
    dim = config.get_int("d_model", 1024)
    encoder = partial(
        Encoder,
        dim=dim,
        depth=depth,
        heads=config.get_int("encoder_attention_heads", 16),
        hidden_dim=config.get_int("encoder_ffn_dim", 4096),
        attentions=[partial(LongformerAttention, window=window, dropout=attention_dropout) for window in windows],
        embeddings=partial(
            TextEmbeddings,
            num_positions=config.get_int("max_encoder_position_embeddings", 16384),
            pad_token_id=config.get_int("pad_token_id", 1, min_value=0),
            eps=eps,
            dropout=dropout,
        ),
        activation=activation,
        add_mlm_head=False,
        eps=eps,
        dropout=dropout,
    )
    factory = partial(
        EncoderDecoder,
        config.get_int("vocab_size", 50265),
        encoder,
        depth=config.get_int("decoder_layers", 12),
        heads=config.get_int("decoder_attention_heads", 16),
        hidden_dim=config.get_int("decoder_ffn_dim", 4096),
        num_positions=config.get_int("max_decoder_position_embeddings", 1024),
        start_token_id=config.get_int("decoder_start_token_id", 2, min_value=0),
        activation=activation,
        eps=eps,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )
    return load_weights(factory, hf_checkpoint, LED)

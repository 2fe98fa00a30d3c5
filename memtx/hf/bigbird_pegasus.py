"""Layout of BigBird-Pegasus, an encoder-decoder with norms before its parts (Zaheer et al. 2020, section 4)."""

from __future__ import annotations

from functools import partial

from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig
from memtx.hf.layout import KeyMapping
from memtx.hf.led import LED
from memtx.hf.loader import load_weights
from memtx.hf.sparse_encoders import build_bigbird_attention
from memtx.layers.embeddings import TextEmbeddings
from memtx.models.encoder import Encoder
from memtx.models.encoder_decoder import EncoderDecoder

_ENCODER = "encoder.layers.{}.self_attn"

BIGBIRD_PEGASUS = KeyMapping(
    hf_keys={
        **{
            name: keys
            for name, keys in LED.hf_keys.items()
            if ".global_" not in name and name not in ("encoder.embedding.norm", "embedding_norm")
        },
        **{f"encoder.blocks.{{}}.attention.{name}": [f"{_ENCODER}.self.{name}"] for name in ("query", "key", "value")},
        "encoder.blocks.{}.attention.out": [f"{_ENCODER}.output"],
        "encoder.norm": ["encoder.layernorm_embedding"],
        "norm": ["decoder.layernorm_embedding"],
    },
    prefix="model.",
    head_prefixes=("lm_head.", "final_logits_bias"),
)


def build(hf_checkpoint: HFCheckpoint) -> EncoderDecoder:
    """Build the BigBird-Pegasus of a folder; raises CheckpointError if an option or a tensor does not fit."""
    config = HFConfig(hf_checkpoint.config)
    config.require("tie_word_embeddings", True, "an output of its own")
    dropout, bias = config.get_float("dropout", 0.1), config.get_bool("use_bias", False)
    eps, activation = 1e-5, config.get_activation("activation_function", "gelu_new")
    num_positions = config.get_int("max_position_embeddings", 4096)
    make_attention = build_bigbird_attention(config, bias, config.get_float("attention_dropout", 0.0))
    attention = partial(make_attention, **{"out_bias": bias})
    encoder = partial(
        Encoder,
        dim=config.get_int("d_model", 1024),
        depth=config.get_int("encoder_layers", 16),
        heads=config.get_int("encoder_attention_heads", 16),
        hidden_dim=config.get_int("encoder_ffn_dim", 4096),
        attentions=[attention],
        embeddings=partial(
            TextEmbeddings,
            num_positions=num_positions,
            pad_token_id=config.get_int("pad_token_id", 0, min_value=0),
            rescale_embeddings=config.get_bool("scale_embedding", True),
            dropout=dropout,
            normalize=False,
        ),
        activation=activation,
        add_mlm_head=False,
        eps=eps,
        dropout=dropout,
        pre_norm=True,
    )
    factory = partial(
        EncoderDecoder,
        config.get_int("vocab_size", 96103),
        encoder,
        depth=config.get_int("decoder_layers", 16),
        heads=config.get_int("decoder_attention_heads", 16),
        hidden_dim=config.get_int("decoder_ffn_dim", 4096),
        num_positions=num_positions,
        start_token_id=config.get_int("decoder_start_token_id", 2, min_value=0),
        activation=activation,
        eps=eps,
        dropout=dropout,
        attention_dropout=config.get_float("attention_dropout", 0.0),
        attention_bias=bias,
        pre_norm=True,
    )
    return load_weights(factory, hf_checkpoint, BIGBIRD_PEGASUS)

"""Layout of GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig, build_window_memories
from memtx.hf.layout import KeyMapping, WeightEntry
from memtx.hf.loader import has_tied_weights, load_weights
from memtx.layers.feed_forward import FeedForward
from memtx.layers.positions.absolute import LearnedPositions
from memtx.layers.positions.base import NoPositions
from memtx.models.memory_transformer import MemoryTransformer

EMBEDDING_KEY, LM_HEAD_KEY = "wte.weight", "lm_head.weight"

GPT2 = KeyMapping(
    hf_keys={
        "embedding.weight": [EMBEDDING_KEY, LM_HEAD_KEY],
        "absolute_positions.table": ["wpe"],
        "blocks.{}.attention_norm": ["h.{}.ln_1"],
        # Joined with key_value.
        "blocks.{}.attention.query": ["h.{}.attn.c_attn"],
        "blocks.{}.attention.out": ["h.{}.attn.c_proj"],
        "blocks.{}.feed_forward_norm": ["h.{}.ln_2"],
        "blocks.{}.feed_forward.up": ["h.{}.mlp.c_fc"],
        "blocks.{}.feed_forward.out": ["h.{}.mlp.c_proj"],
        "norm": ["ln_f"],
        "head.weight": [LM_HEAD_KEY],
    },
    prefix="transformer.",
    head_prefixes=("lm_head.",),
    # Attention masks in older files.
    extra_patterns=(r"h\.\d+\.attn\.(masked_)?bias",),
)


def build(hf_checkpoint: HFCheckpoint, window: int | None) -> MemoryTransformer:
    """Build the GPT-2 of a folder; window and errors as in :func:`memtx.hf.loader.load`."""
    config = HFConfig(hf_checkpoint.config)
    config.require("add_cross_attention", False, "decoders with an encoder")
    config.require("scale_attn_weights", True, "unscaled attention scores")
    config.require("scale_attn_by_inverse_layer_idx", False, "attention scores scaled by layer")
    dim, depth = config.get_int("n_embd", 768), config.get_int("n_layer", 12)
    num_positions = config.get_int("n_positions", 1024)
    model_factory = partial(
        MemoryTransformer,
        config.get_int("vocab_size", 50257),
        dim,
        depth,
        config.get_int("n_head", 12),
        memories=build_window_memories(window, num_positions, [None] * depth),
        norm=partial(nn.LayerNorm, eps=config.get_float("layer_norm_epsilon", 1e-5)),
        feed_forward=partial(
            FeedForward,
            hidden_dim=config.get_int("n_inner", 4 * dim),
            activation=config.get_activation("activation_function", "gelu_new"),
        ),
        positions=NoPositions,
        bias=True,
        absolute_positions=partial(LearnedPositions, num_positions=num_positions),
        dropout=config.get_float("resid_pdrop", 0.1),
        attention_dropout=config.get_float("attn_pdrop", 0.1),
        tie_embeddings=has_tied_weights(hf_checkpoint, GPT2, LM_HEAD_KEY, EMBEDDING_KEY),
    )
    return load_weights(model_factory, hf_checkpoint, GPT2, _build_entries)


def _build_entries(weights: Mapping[str, Tensor]) -> list[WeightEntry]:
    is_matrix = re.compile(r".*\.(attention|feed_forward)\..*\.weight").fullmatch
    entries = GPT2.entries(weights)
    return [(replace(source, transposed=bool(is_matrix(source.slices[0].name))), keys) for source, keys in entries]

"""GPT-2's layout (Radford et al. 2019): options from its config.json and the map of names."""

from __future__ import annotations

from functools import partial

from torch import nn

from memtx.hf import decoder
from memtx.hf.checkpoint import LazyCheckpoint
from memtx.hf.options import HFConfig
from memtx.hf.weight_transforms import RowSlice, WeightTransform
from memtx.layers.feed_forward import FeedForward
from memtx.layers.positions.absolute import LearnedPositions
from memtx.layers.positions.base import NoPositions
from memtx.models.memory_transformer import MemoryTransformer

PREFIX = "transformer."
EMBEDDING_KEY = "wte.weight"
EXTRA_PATTERNS = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)
"""Masks, which older files hold."""


def build(hf_checkpoint: LazyCheckpoint, window: int | None) -> MemoryTransformer:
    """Return the model of a folder.

    Args:
        hf_checkpoint: the folder.
        window: exact positions seen; None for as many as the model knows.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = HFConfig(hf_checkpoint.config)
    options.require("add_cross_attention", False, "a decoder that reads an encoder is not read")
    options.require("scale_attn_weights", True, "scores that are not scaled are not read")
    options.require("scale_attn_by_inverse_layer_idx", False, "scores scaled by layer are not read")
    dim, depth, longest = (
        options.get_int("n_embd", 768),
        options.get_int("n_layer", 12),
        options.get_int("n_positions", 1024),
    )
    norm = partial(nn.LayerNorm, eps=options.get_float("layer_norm_epsilon", 1e-5))
    make = partial(
        MemoryTransformer,
        options.get_int("vocab_size", 50257),
        dim,
        depth,
        options.get_int("n_head", 12),
        None,
        decoder.build_window_memories(window, longest, [None] * depth),
        norm,
        partial(
            FeedForward,
            hidden_dim=options.get_int("n_inner", 4 * dim),
            activation=options.get_activation("activation_function", "gelu_new"),
        ),
        NoPositions,
        bias=True,
        absolute_positions=partial(LearnedPositions, num_positions=longest),
        dropout=options.get_float("resid_pdrop", 0.1),
        attention_dropout=options.get_float("attn_pdrop", 0.1),
        tie_embeddings=decoder.has_tied_embeddings(hf_checkpoint, True, EMBEDDING_KEY, PREFIX),
    )
    pieces = {
        PREFIX + EMBEDDING_KEY: WeightTransform.from_rows("embedding.weight"),
        PREFIX + "wpe.weight": WeightTransform.from_rows("absolute_positions.table.weight"),
    }
    for layer in range(depth):
        pieces |= _layer_transforms(layer, dim)
    for end in ("weight", "bias"):
        pieces[f"{PREFIX}ln_f.{end}"] = WeightTransform.from_rows(f"norm.{end}")
    pieces[decoder.LM_HEAD_KEY] = WeightTransform.from_rows("head.weight")
    return decoder.build(hf_checkpoint, make, pieces, PREFIX, EXTRA_PATTERNS)


def _layer_transforms(layer: int, dim: int) -> dict[str, WeightTransform]:
    """Return the pieces of a layer, whose matrices are kept (into, out)."""
    own, theirs = f"blocks.{layer}.", f"{PREFIX}h.{layer}."
    pieces: dict[str, WeightTransform] = {}
    for end in ("weight", "bias"):
        turned = end == "weight"

        def whole(part: str, end: str = end, turned: bool = turned) -> WeightTransform:
            return WeightTransform((RowSlice(f"{own}{part}.{end}"),), turned)

        pieces |= {
            f"{theirs}ln_1.{end}": WeightTransform.from_rows(f"{own}attention_norm.{end}"),
            f"{theirs}ln_2.{end}": WeightTransform.from_rows(f"{own}feed_forward_norm.{end}"),
            f"{theirs}attn.c_attn.{end}": WeightTransform(
                (RowSlice(f"{own}attention.query.{end}"), RowSlice(f"{own}attention.key_value.{end}")), turned
            ),
            f"{theirs}attn.c_proj.{end}": whole("attention.out"),
            f"{theirs}mlp.c_fc.{end}": whole("feed_forward.up"),
            f"{theirs}mlp.c_proj.{end}": whole("feed_forward.out"),
        }
    return pieces

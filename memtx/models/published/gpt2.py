"""GPT-2's layout (Radford et al. 2019): options from its config.json and the map of names."""

from __future__ import annotations

from functools import partial

from torch import nn

from memtx.layers.absolute_positions import LearnedPositions
from memtx.layers.feed_forward import FeedForward
from memtx.layers.positions import NoPositions
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.published import decoder
from memtx.models.published.content import Opened
from memtx.models.published.options import Options
from memtx.models.published.pieces import Piece, Rows

PREFIX = "transformer."
EMBEDDING = "wte.weight"
KEPT = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)
"""Masks, which older files hold."""


def build(found: Opened, window: int | None) -> MemoryTransformer:
    """Return the model of a folder.

    Args:
        found: the folder.
        window: exact positions seen; None for as many as the model knows.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = Options(found.config)
    options.refuse("add_cross_attention", False, "a decoder that reads an encoder is not read")
    options.refuse("scale_attn_weights", True, "scores that are not scaled are not read")
    options.refuse("scale_attn_by_inverse_layer_idx", False, "scores scaled by layer are not read")
    dim, depth, longest = options.whole("n_embd", 768), options.whole("n_layer", 12), options.whole("n_positions", 1024)
    norm = partial(nn.LayerNorm, eps=options.number("layer_norm_epsilon", 1e-5))
    make = partial(
        MemoryTransformer,
        options.whole("vocab_size", 50257),
        dim,
        depth,
        options.whole("n_head", 12),
        None,
        decoder.windows(window, longest, [None] * depth),
        norm,
        partial(
            FeedForward,
            hidden=options.whole("n_inner", 4 * dim),
            activation=options.activation("activation_function", "gelu_new"),
        ),
        NoPositions,
        bias=True,
        absolute=partial(LearnedPositions, count=longest),
        dropout=options.number("resid_pdrop", 0.1),
        attention_dropout=options.number("attn_pdrop", 0.1),
        tie_embeddings=decoder.is_tied(found, True, EMBEDDING, PREFIX),
    )
    pieces = {
        PREFIX + EMBEDDING: Piece.of("embedding.weight"),
        PREFIX + "wpe.weight": Piece.of("absolute.table.weight"),
    }
    for layer in range(depth):
        pieces |= _layer(layer, dim)
    for end in ("weight", "bias"):
        pieces[f"{PREFIX}ln_f.{end}"] = Piece.of(f"norm.{end}")
    pieces[decoder.HEAD] = Piece.of("head.weight")
    return decoder.build(found, make, pieces, PREFIX, KEPT)


def _layer(layer: int, dim: int) -> dict[str, Piece]:
    """Return the pieces of a layer, whose matrices are kept (into, out)."""
    own, theirs = f"blocks.{layer}.", f"{PREFIX}h.{layer}."
    pieces: dict[str, Piece] = {}
    for end in ("weight", "bias"):
        turned = end == "weight"

        def whole(part: str, end: str = end, turned: bool = turned) -> Piece:
            return Piece((Rows(f"{own}{part}.{end}"),), turned)

        pieces |= {
            f"{theirs}ln_1.{end}": Piece.of(f"{own}attention_norm.{end}"),
            f"{theirs}ln_2.{end}": Piece.of(f"{own}feed_forward_norm.{end}"),
            f"{theirs}attn.c_attn.{end}": Piece(
                (Rows(f"{own}attention.query.{end}"), Rows(f"{own}attention.key_value.{end}")), turned
            ),
            f"{theirs}attn.c_proj.{end}": whole("attention.out"),
            f"{theirs}mlp.c_fc.{end}": whole("feed_forward.up"),
            f"{theirs}mlp.c_proj.{end}": whole("feed_forward.out"),
        }
    return pieces

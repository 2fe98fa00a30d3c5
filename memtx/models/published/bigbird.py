"""Big Bird's layout (Zaheer et al. 2020): options from its config.json and the map of names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from memtx.errors import CheckpointError
from memtx.layers.block_attention import BlockAttention
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.pattern_attention import FullAttention, PatternAttention
from memtx.models.encoder import Encoder
from memtx.models.published.bert import BODY, DECODER, EMBEDDING, HEAD, KEPT, OLD_NORMS
from memtx.models.published.content import Content
from memtx.models.published.layout import Layout, load, tied
from memtx.models.published.options import Options

LAYOUT = Layout(
    parts={**BODY, **HEAD, "pooler": ["pooler"]}, prefix="bert.", heads=("cls.",), kept=KEPT, spellings=OLD_NORMS
)


def attention(options: Options) -> Callable[[int, int, int], PatternAttention]:
    """Return what makes a layer's attention."""
    bias, dropout = options.flag("use_bias", True), options.number("attention_probs_dropout_prob", 0.1)
    kind = options.value("attention_type", "block_sparse")
    if kind == "original_full":
        return partial(FullAttention, bias=bias, dropout=dropout)
    if kind != "block_sparse":
        raise CheckpointError(
            f"config.json has attention_type = {kind!r}, expected 'block_sparse' or 'original_full'.", "Restore it."
        )
    return partial(
        BlockAttention,
        size=options.whole("block_size", 64),
        random_blocks=options.whole("num_random_blocks", 3, least=0),
        longest=options.whole("max_position_embeddings", 4096),
        bias=bias,
        dropout=dropout,
    )


def build(found: Content) -> Encoder:
    """Return the model of a folder.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = Options(found.config)
    options.refuse("is_decoder", False, "a decoder of this layout is not read")
    modern = {LAYOUT.modern(name) for name in found.tensors}
    model = Encoder(
        options.whole("vocab_size", 50358),
        options.whole("hidden_size", 768),
        options.whole("num_hidden_layers", 12),
        options.whole("num_attention_heads", 12),
        options.whole("intermediate_size", 3072),
        [attention(options)],
        partial(
            TextEmbeddings,
            positions=options.whole("max_position_embeddings", 4096),
            types=options.whole("type_vocab_size", 2),
            padding=options.value("pad_token_id", 0),
            scaled=options.flag("rescale_embeddings", False),
            eps=options.number("layer_norm_eps", 1e-12),
            dropout=options.number("hidden_dropout_prob", 0.1),
            dropout_first=True,
        ),
        options.activation("hidden_act", "gelu_new"),
        masked_head=any(name.startswith("cls.predictions.") for name in modern),
        tie_embeddings=tied(found, LAYOUT, DECODER, EMBEDDING),
        pooler=any(name.startswith("pooler.") for name in modern),
        eps=options.number("layer_norm_eps", 1e-12),
        dropout=options.number("hidden_dropout_prob", 0.1),
    )
    load(model, found, LAYOUT)
    return model

"""Transformer-XL's layout (Dai et al. 2019): options from its config.json and the map of names."""

from __future__ import annotations

from memtx.models.published.content import Content
from memtx.models.published.layout import Layout, load, tied
from memtx.models.published.options import Options
from memtx.models.transformer_xl import TransformerXL

PREFIX = "transformer."
HEADS = ("crit.",)
KEPT = (r"pos_emb\.inv_freq",)

PARTS = {
    # The softmax's own names stand second: they are these where the two are tied.
    "embedding.tables.{}.weight": ["word_emb.emb_layers.{}.weight", "crit.out_layers.{}.weight"],
    "embedding.projections.{}": ["word_emb.emb_projs.{}", "crit.out_projs.{}"],
    "blocks.{}.attention.query_key_value": ["layers.{}.dec_attn.qkv_net"],
    "blocks.{}.attention.distance": ["layers.{}.dec_attn.r_net"],
    "blocks.{}.attention.out": ["layers.{}.dec_attn.o_net"],
    "blocks.{}.attention.content_bias": ["layers.{}.dec_attn.r_w_bias"],
    "blocks.{}.attention.position_bias": ["layers.{}.dec_attn.r_r_bias"],
    "blocks.{}.attention_norm": ["layers.{}.dec_attn.layer_norm"],
    "blocks.{}.feed_forward.up": ["layers.{}.pos_ff.CoreNet.0"],
    "blocks.{}.feed_forward.out": ["layers.{}.pos_ff.CoreNet.3"],
    "blocks.{}.feed_forward_norm": ["layers.{}.pos_ff.layer_norm"],
    "softmax.tables.{}": ["crit.out_layers.{}.weight"],
    "softmax.biases.{}": ["crit.out_layers.{}.bias"],
    "softmax.projections.{}": ["crit.out_projs.{}"],
    "softmax.cluster_weight": ["crit.cluster_weight"],
    "softmax.cluster_bias": ["crit.cluster_bias"],
}


def layout(depth: int, clusters: int, one_table: bool) -> Layout:
    """Return the layout of a model of these numbers."""
    parts = dict(PARTS)
    for own, theirs in (("content_bias", "r_w_bias"), ("position_bias", "r_r_bias")):
        # Biases shared by all layers may be written with each of them as well.
        parts[own] = [theirs, *(f"layers.{layer}.dec_attn.{theirs}" for layer in range(depth))]
    if one_table:
        maps = [f"crit.out_projs.{cluster}" for cluster in range(clusters)]
        parts["embedding.projections.0"] = ["word_emb.emb_projs.0", *maps]
    return Layout(parts=parts, prefix=PREFIX, heads=HEADS, kept=KEPT)


def build(found: Content) -> TransformerXL:
    """Return the model of a folder.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = Options(found.config)
    options.refuse("attn_type", 0, "absolute and learned positions are not read")
    if options.value("sample_softmax", -1) != 0:
        options.refuse("sample_softmax", -1, "a sampled softmax is not read")
    options.refuse("adaptive", True, "a plain softmax is not read; one without clusters has no cutoffs")
    depth, dim = options.whole("n_layer", 18), options.whole("d_model", 1024)
    cutoffs = options.wholes("cutoffs", None, [20000, 40000, 200000])
    shrink, embed = options.whole("div_val", 4), options.whole("d_embed", 1024)
    clusters = len(cutoffs) + 1
    names = layout(depth, clusters, shrink == 1)

    def is_tied(head: str, embedding: str) -> bool:
        return tied(found, names, head, embedding)

    ties = options.value("tie_projs", [False] + [options.flag("proj_share_all_but_first", True)] * len(cutoffs))
    model = TransformerXL(
        options.whole("vocab_size", 267735),
        dim,
        depth,
        options.whole("n_head", 16),
        options.whole("d_head", 64),
        options.whole("d_inner", 4096),
        options.whole("mem_len", 1600, least=0),
        options.flag("same_length", True),
        int(options.value("clamp_len", 1000)),
        embed,
        cutoffs,
        shrink,
        tie_embeddings=all(
            is_tied(f"crit.out_layers.{i}.weight", f"word_emb.emb_layers.{i}.weight")
            for i in range(1 if shrink == 1 else clusters)
        ),
        tie_projections=[
            bool(tie) and is_tied(f"crit.out_projs.{i}", f"word_emb.emb_projs.{0 if shrink == 1 else i}")
            for i, tie in enumerate(ties)
        ],
        share_biases=not options.flag("untie_r", True),
        pre_norm=options.flag("pre_lnorm", False),
        head=any(name.startswith(HEADS) for name in found.tensors),
        eps=options.number("layer_norm_epsilon", 1e-5),
        dropout=options.number("dropout", 0.1),
        attention_dropout=options.number("dropatt", 0.0),
    )
    load(model, found, names)
    return model

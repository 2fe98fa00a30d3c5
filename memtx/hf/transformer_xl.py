"""Transformer-XL's layout (Dai et al. 2019): options from its config.json and the map of names."""

from __future__ import annotations

from memtx.hf.checkpoint import Checkpoint
from memtx.hf.layout import KeyMapping, has_tied_weights, load_weights
from memtx.hf.options import HFConfig
from memtx.models.transformer_xl import TransformerXL

PREFIX = "transformer."
HEAD_PREFIXES = ("crit.",)
EXTRA_PATTERNS = (r"pos_emb\.inv_freq",)

HF_KEYS = {
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


def build_key_mapping(depth: int, num_clusters: int, single_table: bool) -> KeyMapping:
    """Return the layout of a model of these numbers."""
    parts = dict(HF_KEYS)
    for own, theirs in (("content_bias", "r_w_bias"), ("position_bias", "r_r_bias")):
        # Biases shared by all layers may be written with each of them as well.
        parts[own] = [theirs, *(f"layers.{layer}.dec_attn.{theirs}" for layer in range(depth))]
    if single_table:
        maps = [f"crit.out_projs.{cluster}" for cluster in range(num_clusters)]
        parts["embedding.projections.0"] = ["word_emb.emb_projs.0", *maps]
    return KeyMapping(hf_keys=parts, prefix=PREFIX, head_prefixes=HEAD_PREFIXES, extra_patterns=EXTRA_PATTERNS)


def build(hf_checkpoint: Checkpoint) -> TransformerXL:
    """Return the model of a folder.

    Raises:
        CheckpointError: an option or a tensor is not as it must be.
    """
    options = HFConfig(hf_checkpoint.config)
    options.require("attn_type", 0, "absolute and learned positions are not read")
    if options.get("sample_softmax", -1) != 0:
        options.require("sample_softmax", -1, "a sampled softmax is not read")
    options.require("adaptive", True, "a plain softmax is not read; one without clusters has no cutoffs")
    depth, dim = options.get_int("n_layer", 18), options.get_int("d_model", 1024)
    cutoffs = options.get_ints("cutoffs", None, [20000, 40000, 200000])
    shrink, embed = options.get_int("div_val", 4), options.get_int("d_embed", 1024)
    clusters = len(cutoffs) + 1
    names = build_key_mapping(depth, clusters, shrink == 1)

    def is_tied(head: str, embedding: str) -> bool:
        return has_tied_weights(hf_checkpoint, names, head, embedding)

    ties = options.get("tie_projs", [False] + [options.get_bool("proj_share_all_but_first", True)] * len(cutoffs))
    model = TransformerXL(
        options.get_int("vocab_size", 267735),
        dim,
        depth,
        options.get_int("n_head", 16),
        options.get_int("d_head", 64),
        options.get_int("d_inner", 4096),
        options.get_int("mem_len", 1600, min_value=0),
        options.get_bool("same_length", True),
        int(options.get("clamp_len", 1000)),
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
        share_biases=not options.get_bool("untie_r", True),
        pre_norm=options.get_bool("pre_lnorm", False),
        add_lm_head=any(name.startswith(HEAD_PREFIXES) for name in hf_checkpoint.tensors),
        eps=options.get_float("layer_norm_epsilon", 1e-5),
        dropout=options.get_float("dropout", 0.1),
        attention_dropout=options.get_float("dropatt", 0.0),
    )
    load_weights(model, hf_checkpoint, names)
    return model

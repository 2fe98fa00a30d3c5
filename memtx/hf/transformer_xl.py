"""Layout of Transformer-XL (Dai et al. 2019)."""

from __future__ import annotations

from functools import partial

from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig
from memtx.hf.layout import KeyMapping
from memtx.hf.loader import has_tied_weights, load_weights
from memtx.models.transformer_xl import TransformerXL

HEAD_PREFIXES = ("crit.",)

HF_KEYS = {
    # The softmax's names come second: if tied, its weights are the embedding's.
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


def build(hf_checkpoint: HFCheckpoint) -> TransformerXL:
    """Build the Transformer-XL of a folder; raises CheckpointError if an option or a tensor does not fit."""
    config = HFConfig(hf_checkpoint.config)
    config.require("attn_type", 0, "absolute and learned positions")
    if config.get("sample_softmax", -1) != 0:
        config.require("sample_softmax", -1, "sampled softmaxes")
    config.require("adaptive", True, "softmaxes without cutoffs")
    depth = config.get_int("n_layer", 18)
    cutoffs = config.get_ints("cutoffs", None, [20000, 40000, 200000])
    div_value, num_clusters = config.get_int("div_val", 4), len(cutoffs) + 1
    has_single_table = div_value == 1
    mapping = _build_key_mapping(depth, num_clusters, has_single_table)

    def is_tied(head: str, embedding: str) -> bool:
        return has_tied_weights(hf_checkpoint, mapping, head, embedding)

    default_ties = [False] + [config.get_bool("proj_share_all_but_first", True)] * len(cutoffs)
    model_factory = partial(
        TransformerXL,
        config.get_int("vocab_size", 267735),
        config.get_int("d_model", 1024),
        depth,
        config.get_int("n_head", 16),
        config.get_int("d_head", 64),
        config.get_int("d_inner", 4096),
        config.get_int("mem_len", 1600, min_value=0),
        config.get_bool("same_length", True),
        int(config.get("clamp_len", 1000)),
        config.get_int("d_embed", 1024),
        cutoffs,
        div_value,
        tie_embeddings=all(
            is_tied(f"crit.out_layers.{cluster}.weight", f"word_emb.emb_layers.{cluster}.weight")
            for cluster in range(1 if has_single_table else num_clusters)
        ),
        tie_projections=[
            bool(tie)
            and is_tied(f"crit.out_projs.{cluster}", f"word_emb.emb_projs.{0 if has_single_table else cluster}")
            for cluster, tie in enumerate(config.get("tie_projs", default_ties))
        ],
        share_biases=not config.get_bool("untie_r", True),
        pre_norm=config.get_bool("pre_lnorm", False),
        add_lm_head=mapping.has_any(hf_checkpoint.tensors, *HEAD_PREFIXES),
        eps=config.get_float("layer_norm_epsilon", 1e-5),
        dropout=config.get_float("dropout", 0.1),
        attention_dropout=config.get_float("dropatt", 0.0),
    )
    return load_weights(model_factory, hf_checkpoint, mapping)


def _build_key_mapping(depth: int, num_clusters: int, has_single_table: bool) -> KeyMapping:
    hf_keys = dict(HF_KEYS)
    for name, hf_name in (("content_bias", "r_w_bias"), ("position_bias", "r_r_bias")):
        # Biases shared by all layers may also be stored with each layer.
        hf_keys[name] = [hf_name, *(f"layers.{layer}.dec_attn.{hf_name}" for layer in range(depth))]
    if has_single_table:
        projections = [f"crit.out_projs.{cluster}" for cluster in range(num_clusters)]
        hf_keys["embedding.projections.0"] = ["word_emb.emb_projs.0", *projections]
    return KeyMapping(hf_keys, "transformer.", HEAD_PREFIXES, (r"pos_emb\.inv_freq",))

"""Layout of XLNet (Yang et al. 2019)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig
from memtx.hf.layout import KeyMapping, RowSlice, WeightEntry, WeightTransform
from memtx.hf.loader import has_tied_weights, load_weights
from memtx.hf.task_heads import (
    AnswerHead,
    TaskPooling,
    get_class_name,
    get_task,
    load_task_model,
    unsupported_task_error,
)
from memtx.models.heads import CLSPooling, LastPooling, Pooling, TaskModel
from memtx.models.xlnet import XLNet

PROJECTIONS = ("query", "key_value", "distance", "out")
EMBEDDING_KEY, HEAD_KEY = "word_embedding.weight", "lm_loss.weight"


@dataclass(frozen=True)
class XLNetMapping(KeyMapping):
    """Names of XLNet, whose projections are stored by head, most of them as ``(in, out)``."""

    dim: int = 0
    heads: int = 1

    def entries(self, parameter_names: Collection[str]) -> list[WeightEntry]:
        """Return one entry per parameter of the model, or two for keys and values."""
        entries: list[WeightEntry] = []
        for name in parameter_names:
            part, keys = name.removesuffix(".weight").rpartition(".")[2], self.candidate_keys(name)
            if part not in PROJECTIONS or ".attention." not in name:
                entries.append((WeightTransform((RowSlice(name),)), keys))
                continue
            for index, key in enumerate(keys):
                part_slice = RowSlice(name, index * self.dim, self.dim) if len(keys) > 1 else RowSlice(name)
                last_dims = self.heads, self.dim // self.heads
                entries.append((WeightTransform((part_slice,), part != "out", last_dims), [key]))
        return entries


XLNET = XLNetMapping(
    hf_keys={
        # The head's weight, if tied, is the embedding.
        "embedding.weight": [EMBEDDING_KEY, HEAD_KEY],
        "mask_embedding": ["mask_emb"],
        "blocks.{}.attention.query.weight": ["layer.{}.rel_attn.q"],
        "blocks.{}.attention.key_value.weight": ["layer.{}.rel_attn.k", "layer.{}.rel_attn.v"],
        "blocks.{}.attention.distance.weight": ["layer.{}.rel_attn.r"],
        "blocks.{}.attention.out.weight": ["layer.{}.rel_attn.o"],
        "blocks.{}.attention.content_bias": ["layer.{}.rel_attn.r_w_bias"],
        "blocks.{}.attention.position_bias": ["layer.{}.rel_attn.r_r_bias"],
        "blocks.{}.attention.segment_bias": ["layer.{}.rel_attn.r_s_bias"],
        "blocks.{}.attention.segment_embedding": ["layer.{}.rel_attn.seg_embed"],
        "blocks.{}.attention_norm": ["layer.{}.rel_attn.layer_norm"],
        "blocks.{}.feed_forward.up": ["layer.{}.ff.layer_1"],
        "blocks.{}.feed_forward.out": ["layer.{}.ff.layer_2"],
        "blocks.{}.feed_forward_norm": ["layer.{}.ff.layer_norm"],
        "head.weight": [HEAD_KEY],
        "head.bias": ["lm_loss.bias"],
    },
    prefix="transformer.",
    head_prefixes=("lm_loss.",),
)


def build(hf_checkpoint: HFCheckpoint) -> XLNet | TaskModel:
    """Build the XLNet of a folder, with its task head; raises CheckpointError if an option or a tensor does not fit."""
    config = HFConfig(hf_checkpoint.config)
    config.require("untie_r", True, "biases that all layers share")
    is_causal = config.get("attn_type") == "uni"
    if not is_causal:
        config.require("attn_type", "bi", "other kinds of attention")
    dim, heads = config.get_int("d_model", 1024), config.get_int("n_head", 16)
    config.require("d_head", dim // heads, "heads of another width")
    mapping = replace(XLNET, dim=dim, heads=heads)
    factory = partial(
        XLNet,
        dim=dim,
        depth=config.get_int("n_layer", 24),
        heads=heads,
        hidden_dim=config.get_int("d_inner", 4096),
        eps=config.get_float("layer_norm_eps", 1e-12),
        dropout=config.get_float("dropout", 0.1),
        memory_length=_get_length(config, "mem_len", 512),
        reuse_length=_get_length(config, "reuse_len", None),
        causal=is_causal,
        same_length=config.get_bool("same_length", False),
        clamp_length=int(config.get("clamp_len", -1)),
        bi_data=config.get_bool("bi_data", False),
        activation=config.get_activation("ff_activation", "gelu"),
    )
    vocab_size = config.get_int("vocab_size", 32000)
    if get_class_name(hf_checkpoint.config).endswith(("ForMultipleChoice", "ForQuestionAnswering")):
        raise unsupported_task_error(hf_checkpoint.path, hf_checkpoint.config)
    if (task := get_task(hf_checkpoint.config)) is not None:
        backbone, pooling = partial(factory, add_lm_head=False), _parse_pooling(config)
        return load_task_model(hf_checkpoint, mapping, task, backbone, vocab_size, pooling, AnswerHead())
    model_factory = partial(
        factory,
        vocab_size,
        add_lm_head=mapping.has_any(hf_checkpoint.tensors, "lm_loss."),
        tie_embeddings=has_tied_weights(hf_checkpoint, mapping, HEAD_KEY, EMBEDDING_KEY),
    )
    return load_weights(model_factory, hf_checkpoint, mapping)


def _get_length(config: HFConfig, key: str, default: int | None) -> int | None:
    """Return a number of tokens; None for null and 0, by which transformers means all."""
    if key not in config.values:
        return default
    return config.get_int(key, 0, min_value=0) or None


def _parse_pooling(config: HFConfig) -> TaskPooling:
    """Return the modules between the hidden states and the scores of a text."""
    config.require("summary_use_proj", True, "summaries without a projection")
    poolings: dict[str, type[Pooling]] = {"last": LastPooling, "first": CLSPooling}
    if (kind := config.get("summary_type", "last")) not in poolings:
        config.require("summary_type", "last", "other summaries")
    has_activation = config.values.get("summary_activation", "tanh") is not None
    activation = config.get_activation("summary_activation", "tanh") if has_activation else nn.Identity
    return TaskPooling("sequence_summary.summary", "logits_proj", activation, poolings[kind])

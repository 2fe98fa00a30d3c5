"""Decoders of several layouts: the options that they share, and their weights' places in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from memtx.errors import CheckpointError
from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig
from memtx.hf.layout import KeyMapping, RowSlice, WeightEntry, WeightTransform
from memtx.hf.loader import has_tied_weights, load_weights
from memtx.models.memory_transformer import MemoryTransformer

EMBEDDING_KEY, LM_HEAD_KEY = "embed_tokens.weight", "lm_head.weight"

ATTENTION_KEYS = {
    "embedding.weight": [EMBEDDING_KEY, LM_HEAD_KEY],
    "blocks.{}.attention.query": ["layers.{}.self_attn.q_proj"],
    # Two keys, with half of the rows each.
    "blocks.{}.attention.key_value": ["layers.{}.self_attn.k_proj", "layers.{}.self_attn.v_proj"],
    "blocks.{}.attention.out": ["layers.{}.self_attn.o_proj"],
    "blocks.{}.attention.query_norm": ["layers.{}.self_attn.q_norm"],
    "blocks.{}.attention.key_norm": ["layers.{}.self_attn.k_norm"],
    "blocks.{}.feed_forward.gate_up": ["layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"],
    "blocks.{}.feed_forward.out": ["layers.{}.mlp.down_proj"],
    "norm": ["norm"],
    "head.weight": [LM_HEAD_KEY],
}
"""Places of the parts that all these layouts name alike; see :class:`~memtx.hf.layout.KeyMapping`."""

EXTRA_PATTERNS = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", r"mtp\..*")

SpecialEntries = Callable[[str, Tensor], "Iterable[WeightEntry] | None"]
"""Returns the entries of a weight that a layout stores in its own way, given its name; None for other weights."""


class DecoderConfig(HFConfig):
    """The sizes of a decoder in config.json, with a layout's defaults.

    Args:
        values: Content of config.json.
        **defaults: Values of keys that config.json omits.
    """

    def __init__(self, values: Mapping[str, Any], **defaults: Any) -> None:
        super().__init__({**defaults, **values})
        self.dim, self.depth = self.get_int("hidden_size"), self.get_int("num_hidden_layers")
        self.heads = self.get_int("num_attention_heads")
        self.kv_heads = self.get_int("num_key_value_heads", self.heads)
        self.head_dim = self.get_int("head_dim", self.dim // self.heads)

    def layer_types(self, *known: str, default: Sequence[str]) -> list[str]:
        """Return the type of each layer, one of ``known``."""
        types = self.get("layer_types", list(default))
        if not isinstance(types, list) or len(types) != self.depth or set(types) - set(known):
            message = f"config.json has layer_types = {types!r}."
            names = " or ".join(f"'{name}'" for name in known)
            raise CheckpointError(message, f"Name {names} for each of {self.depth} layers.")
        return types


def load_decoder(
    hf_checkpoint: HFCheckpoint,
    mapping: KeyMapping,
    config: DecoderConfig,
    *,
    rotary_dim: int | None = None,
    special_entries: SpecialEntries = lambda name, tensor: None,
    tied_by_default: bool = False,
    **options: Any,
) -> MemoryTransformer:
    """Build a decoder with the config's sizes and other constructor arguments, and load its weights.

    Args:
        hf_checkpoint: Content of the folder.
        mapping: Names of the layout.
        config: Sizes.
        rotary_dim: Channels of a head that are rotated; None for all, 0 for none.
        special_entries: Entries of weights that are stored in a way of their own.
        tied_by_default: Whether the head is the embedding if config.json does not say.
        **options: Further arguments of :class:`MemoryTransformer`.
    """
    tied = has_tied_weights(hf_checkpoint, mapping, LM_HEAD_KEY, EMBEDDING_KEY, default=tied_by_default)
    bias = config.get_bool("attention_bias", False)
    model_factory = partial(
        MemoryTransformer, config.get_int("vocab_size"), config.dim, config.depth, config.heads, config.kv_heads,
        head_dim=config.head_dim, bias=bias, tie_embeddings=tied,
        attention_dropout=config.get_float("attention_dropout", 0.0), **options,
    )  # fmt: skip

    def build_entries(weights: Mapping[str, Tensor]) -> list[WeightEntry]:
        entries: list[WeightEntry] = []
        for name, tensor in weights.items():
            special = special_entries(name, tensor)
            entries += special if special is not None else _standard_entries(name, tensor, mapping, config, rotary_dim)
        return entries

    return load_weights(model_factory, hf_checkpoint, mapping, build_entries)


def _standard_entries(
    name: str, tensor: Tensor, mapping: KeyMapping, config: DecoderConfig, rotary_dim: int | None
) -> list[WeightEntry]:
    """Return the entries of a weight: halves of joined projections apart, rotated heads reordered."""
    keys, half = mapping.candidate_keys(name), tensor.shape[0] // 2

    def rotated(heads: int) -> int:
        return 0 if rotary_dim == 0 else heads

    if ".attention.key_value." in name or ".gate_up." in name:
        heads = rotated(config.kv_heads) if ".key_value." in name else 0
        slices = [RowSlice(name, 0, half, heads, rotary_dim), RowSlice(name, half, half)]
        return [(WeightTransform((part,)), [key]) for part, key in zip(slices, keys, strict=True)]
    heads = 0
    if ".attention.query." in name:
        heads = rotated(config.heads)
    elif ".query_norm." in name or ".key_norm." in name:
        heads = rotated(max(tensor.shape[0] // config.head_dim, 1))
    return [(WeightTransform((RowSlice(name, rotary_heads=heads, rotary_dim=rotary_dim if heads else None),)), keys)]

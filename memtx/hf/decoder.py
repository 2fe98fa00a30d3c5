"""Decoders of several layouts: the options that they share, and their weights' places in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from memtx.errors import CheckpointError
from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.config import HFConfig
from memtx.hf.layout import KeyMapping, RowSlice, WeightEntry, WeightTransform
from memtx.hf.loader import has_tied_weights, load_weights
from memtx.layers.feed_forward import SwiGLU
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

PRE_NORM_KEYS = {
    "blocks.{}.attention_norm": ["layers.{}.input_layernorm"],
    "blocks.{}.feed_forward_norm": ["layers.{}.post_attention_layernorm"],
}

EXTRA_PATTERNS = (
    r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    # Heads that predict several tokens, and the parts for images.
    r"mtp\..*",
    r"(model\.)?(visual|vision_tower|multi_modal_projector)\..*",
)
TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
"""Prefixes of the text part in models of text and images."""

SpecialEntries = Callable[[str, Tensor], "Iterable[WeightEntry] | None"]
"""Returns the entries of a layer's weight that a layout stores in its own way, given its name; None for others."""


def decoder_mapping(hf_keys: Mapping[str, Sequence[str]]) -> KeyMapping:
    """Return the names of a layout with ``ATTENTION_KEYS`` and others."""
    return KeyMapping({**ATTENTION_KEYS, **hf_keys}, "model.", ("lm_head.",), EXTRA_PATTERNS)


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

    def sliding_windows(self, window: int | None, default: Sequence[str]) -> list[int | None]:
        """Return each layer's window by ``layer_types``, None for full attention."""
        types = self.layer_types("full_attention", "sliding_attention", default=default)
        return [window if layer_type == "sliding_attention" else None for layer_type in types]

    def build_feed_forward(
        self, key: str = "hidden_act", default: str = "silu", *, bias: bool = False
    ) -> Callable[[int], SwiGLU]:
        """Return the factory of the gated feed-forward part, with the activation that ``key`` names."""
        activation = self.get_activation(key, default)
        return partial(SwiGLU, hidden_dim=self.get_int("intermediate_size"), bias=bias, activation=activation)


def load_decoder(
    hf_checkpoint: HFCheckpoint,
    mapping: KeyMapping,
    config: DecoderConfig,
    *,
    rotary_dim: int | None = None,
    rotated_layers: Sequence[bool] | None = None,
    special_entries: SpecialEntries = lambda name, tensor: None,
    **options: Any,
) -> MemoryTransformer:
    """Build a decoder with the config's sizes and other constructor arguments, and load its weights.

    Args:
        hf_checkpoint: Content of the folder.
        mapping: Names of the layout.
        config: Sizes.
        rotary_dim: Channels of a head that are rotated. Defaults to all.
        rotated_layers: For each layer, whether its heads are rotated. Defaults to all.
        special_entries: Entries of weights that are stored in a way of their own.
        **options: Further arguments of :class:`MemoryTransformer`.
    """
    prefixes = (prefix for prefix in TEXT_PREFIXES if any(name.startswith(prefix) for name in hf_checkpoint.tensors))
    mapping = replace(mapping, prefix=next(prefixes, mapping.prefix))
    tied = config.get_bool("tie_word_embeddings", False)
    tied = has_tied_weights(hf_checkpoint, mapping, LM_HEAD_KEY, EMBEDDING_KEY, default=tied)
    sizes = config.get_int("vocab_size"), config.dim, config.depth, config.heads, config.kv_heads
    options = {"bias": config.get_bool("attention_bias", False), "head_dim": config.head_dim, **options}
    dropout = config.get_float("attention_dropout", 0.0)
    model_factory = partial(MemoryTransformer, *sizes, attention_dropout=dropout, tie_embeddings=tied, **options)

    def build_entries(weights: Mapping[str, Tensor]) -> list[WeightEntry]:
        entries: list[WeightEntry] = []
        for name, tensor in weights.items():
            is_in_layer = name.startswith("blocks.")
            special = special_entries(name, tensor) if is_in_layer else None
            is_rotated = rotated_layers is None or (is_in_layer and rotated_layers[layer_index(name)])
            rotary = (config if is_rotated else None), rotary_dim
            entries += special if special is not None else _standard_entries(name, tensor, mapping, *rotary)
        return entries

    return load_weights(model_factory, hf_checkpoint, mapping, build_entries)


def _standard_entries(
    name: str, tensor: Tensor, mapping: KeyMapping, rotated: DecoderConfig | None, rotary_dim: int | None
) -> list[WeightEntry]:
    """Return the entries of a weight: halves of joined projections apart, heads that are rotated reordered.

    ``rotated`` has the numbers of heads; None if the layer's are not rotated.
    """
    keys, half = mapping.candidate_keys(name), tensor.shape[0] // 2
    if ".attention.key_value." in name or ".gate_up." in name:
        heads = rotated.kv_heads if rotated and ".key_value." in name else 0
        slices = [RowSlice(name, 0, half, heads, rotary_dim), RowSlice(name, half, half)]
        return [(WeightTransform((part,)), [key]) for part, key in zip(slices, keys, strict=True)]
    heads = 0
    if rotated and ".attention.query." in name:
        heads = rotated.heads
    elif rotated and (".query_norm." in name or ".key_norm." in name):
        heads = max(tensor.shape[0] // rotated.head_dim, 1)
    return [(WeightTransform((RowSlice(name, rotary_heads=heads, rotary_dim=rotary_dim if heads else None),)), keys)]


def layer_index(name: str) -> int:
    """Return the layer of a weight's name, ``blocks.LAYER....``."""
    return int(name.split(".")[1])

"""Small checkpoints in Hugging Face layouts, written without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "hidden_act": "gelu",
    "max_position_embeddings": 30,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Return random weights, large enough to reveal a wrong term; norm weights are near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    return {name: x + 1.0 if "norm" in name.lower() and "weight" in name else x for name, x in tensors.items()}


def bert(config: dict[str, Any] = BERT, prefix: str = "bert.", head: bool = True) -> dict[str, Tensor]:
    """Return BERT's tensors by their names in the layout, with an MLM head tied to the embedding."""
    dim, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embeddings.word_embeddings.weight": (vocab, dim),
        f"{prefix}embeddings.position_embeddings.weight": (config["max_position_embeddings"], dim),
        f"{prefix}embeddings.token_type_embeddings.weight": (config["type_vocab_size"], dim),
        f"{prefix}embeddings.LayerNorm.weight": (dim,),
        f"{prefix}embeddings.LayerNorm.bias": (dim,),
    }
    for layer in range(config["num_hidden_layers"]):
        layer_prefix = f"{prefix}encoder.layer.{layer}."
        for part, (out_dim, in_dim) in {
            "attention.self.query": (dim, dim),
            "attention.self.key": (dim, dim),
            "attention.self.value": (dim, dim),
            "attention.output.dense": (dim, dim),
            "intermediate.dense": (hidden, dim),
            "output.dense": (dim, hidden),
        }.items():
            shapes |= {f"{layer_prefix}{part}.weight": (out_dim, in_dim), f"{layer_prefix}{part}.bias": (out_dim,)}
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer_prefix}{norm}.weight": (dim,), f"{layer_prefix}{norm}.bias": (dim,)}
    if head:
        shapes |= {
            "cls.predictions.transform.dense.weight": (dim, dim),
            "cls.predictions.transform.dense.bias": (dim,),
            "cls.predictions.transform.LayerNorm.weight": (dim,),
            "cls.predictions.transform.LayerNorm.bias": (dim,),
            "cls.predictions.bias": (vocab,),
        }
    return draw(shapes)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write a folder with one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    # Indented differently from ours, since it must be kept verbatim.
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

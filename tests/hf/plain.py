"""Plain float64 reference decoders of the Hugging Face layouts, without any part of memtx."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.hf.folders import draw

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 7}
QWEN2 = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 4, "tie_word_embeddings": True}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 40,
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 64,
    "layer_norm_epsilon": 1e-5,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
}


def llama(config: dict[str, Any]) -> dict[str, Tensor]:
    """Return random tensors for a config of Llama's family."""
    dim, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_dim, kv_dim = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    kind = config["model_type"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], dim)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for part, out in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)):
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (out, dim)
            if kind == "qwen2":
                shapes[f"{prefix}self_attn.{part}_proj.bias"] = (out,)
            if kind == "qwen3" and part != "v":
                shapes[f"{prefix}self_attn.{part}_norm.weight"] = (head_dim,)
        shapes |= {f"{prefix}self_attn.o_proj.weight": (dim, q_dim), f"{prefix}mlp.down_proj.weight": (dim, inner)}
        shapes |= {f"{prefix}mlp.{part}_proj.weight": (inner, dim) for part in ("gate", "up")}
        shapes |= {f"{prefix}{part}_layernorm.weight": (dim,) for part in ("input", "post_attention")}
    shapes["model.norm.weight"] = (dim,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], dim)
    return draw(shapes)


def gpt2(config: dict[str, Any] = GPT2) -> dict[str, Tensor]:
    """Return random tensors for a GPT-2."""
    dim = config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], dim),
        "transformer.wpe.weight": (config["n_positions"], dim),
    }
    parts = {"attn.c_attn": (dim, 3 * dim), "attn.c_proj": (dim, dim)}
    parts |= {"mlp.c_fc": (dim, 4 * dim), "mlp.c_proj": (4 * dim, dim)}
    for layer in range(config["n_layer"]):
        for part, shape in parts.items():
            shapes |= {f"transformer.h.{layer}.{part}.weight": shape, f"transformer.h.{layer}.{part}.bias": shape[1:]}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"transformer.h.{layer}.{norm}.{suffix}": (dim,) for suffix in ("weight", "bias")}
    shapes |= {f"transformer.ln_f.{suffix}": (dim,) for suffix in ("weight", "bias")}
    return draw(shapes)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """Return x divided by its root mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Return causal attention over the newest ``window`` positions, heads ``(heads, n, width)`` concatenated."""
    n = q.shape[1]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    visible = (distance >= 0) & (distance < (window if window is not None else n))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def llama_logits(config: dict[str, Any], tensors: dict[str, Tensor], tokens: Tensor, inv_freq: Tensor) -> Tensor:
    """Return logits ``(n, vocab)`` of tokens ``(n,)``; ``inv_freq`` has each pair's angle per position."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    heads, groups = config["num_attention_heads"], config["num_attention_heads"] // config["num_key_value_heads"]
    angle = torch.arange(len(tokens)).double()[:, None] * inv_freq.double()
    cosine, sine = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], -1) * sine

    def layer_window(layer: int) -> int | None:
        if config["model_type"] == "qwen2" and layer < config["max_window_layers"]:
            return None
        return config.get("sliding_window")

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        normed = rms(x, weights[f"{prefix}input_layernorm.weight"])

        def project(part: str, prefix: str = prefix, normed: Tensor = normed) -> Tensor:
            out = normed @ weights[f"{prefix}self_attn.{part}_proj.weight"].mT
            out = out + weights.get(f"{prefix}self_attn.{part}_proj.bias", 0.0)
            out = out.view(len(tokens), -1, config["head_dim"]).transpose(0, 1)
            norm = weights.get(f"{prefix}self_attn.{part}_norm.weight")
            return out if norm is None else rms(out, norm)

        q, k, v = rotate(project("q")), rotate(project("k")), project("v")
        k, v = (tensor.repeat_interleave(groups, dim=0) for tensor in (k, v))
        assert q.shape[0] == heads
        x = x + causal_attention(q, k, v, layer_window(layer)) @ weights[f"{prefix}self_attn.o_proj.weight"].mT
        normed = rms(x, weights[f"{prefix}post_attention_layernorm.weight"])
        gate, up = (normed @ weights[f"{prefix}mlp.{part}_proj.weight"].mT for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ weights[f"{prefix}mlp.down_proj.weight"].mT
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return rms(x, weights["model.norm.weight"]) @ head.mT


def gpt2_logits(config: dict[str, Any], tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Return logits ``(n, vocab)`` of tokens ``(n,)``."""
    weights = {name.removeprefix("transformer."): tensor.double() for name, tensor in tensors.items()}

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def project(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["wte.weight"][tokens] + weights["wpe.weight"][: len(tokens)]
    for layer in range(config["n_layer"]):
        q, k, v = project(layer_norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").chunk(3, dim=-1)
        by_head = (tensor.view(len(tokens), config["n_head"], -1).transpose(0, 1) for tensor in (q, k, v))
        x = x + project(causal_attention(*by_head, None), f"h.{layer}.attn.c_proj")
        inner = project(layer_norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + project(inner, f"h.{layer}.mlp.c_proj")
    return layer_norm(x, "ln_f") @ weights["wte.weight"].mT

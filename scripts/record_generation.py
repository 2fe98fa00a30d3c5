"""Record what `transformers` computes for tests/inference/recorded: logits processors, and generated texts.

Run it with a Python that has torch, transformers and tokenizers; the tests need none of it.

    python scripts/record_generation.py tests/inference/recorded --book PATH/book.txt
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 48
FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.9},
    {"top_k": 5},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"min_p": 0.2},
    {"typical_p": 0.5},
    {"typical_p": 0.9},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8},
    {"top_p": 0.9, "min_p": 0.15},
    {"top_p": 0.9, "typical_p": 0.7},
    {"min_p": 0.05, "typical_p": 0.7},
    {"repetition_penalty": 1.4, "top_k": 9},
    {"repetition_penalty": 0.8, "logit_bias": {3: 2.5, 7: -3.0}, "top_p": 0.8},
]


def record_filters(path: Path) -> None:
    """Write logits, the ids read so far, and the probabilities after the processors of each setting."""
    from transformers.generation import logits_process

    generator = torch.Generator().manual_seed(0)
    cases = []
    for settings in FILTERS:
        logits = torch.randn(1, VOCAB_SIZE, generator=generator) * 2.5
        ids = torch.randint(0, VOCAB_SIZE, (1, 12), generator=generator)
        scores = logits.clone()
        processors: list[tuple[str, Callable[[Any], Any]]] = [
            (
                "logit_bias",
                lambda bias: logits_process.SequenceBiasLogitsProcessor([[[k], v] for k, v in bias.items()]),
            ),
            ("repetition_penalty", logits_process.RepetitionPenaltyLogitsProcessor),
            ("temperature", logits_process.TemperatureLogitsWarper),
            ("top_k", logits_process.TopKLogitsWarper),
            ("top_p", logits_process.TopPLogitsWarper),
            ("min_p", logits_process.MinPLogitsWarper),
            ("typical_p", logits_process.TypicalLogitsWarper),
        ]
        for name, create in processors:
            if name in settings:
                scores = create(settings[name])(ids, scores)
        cases.append(
            {
                "settings": settings,
                "logits": logits[0].tolist(),
                "ids": ids[0].tolist(),
                "probabilities": scores[0].softmax(0).tolist(),
            }
        )
    path.write_text(json.dumps(cases))


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
# Tied, which keeps the files small.
TIED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True}
HYBRID = {**TIED, "layer_types": ["linear_attention", "full_attention"]}
HYBRID |= {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
HYBRID |= {"linear_key_head_dim": 4, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 96}
LONG_ROPE |= {"short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("byte-fallback", {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128}),
    "mistral": ("unigram", {**SIZES, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 8}),
    "qwen2": ("byte-level", {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128}),
    "qwen3": ("byte-level", {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}),
    "gpt2": ("byte-level", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gemma3_text": (
        "byte-fallback without prefix",
        {
            **TIED,
            "tie_word_embeddings": False,
            "head_dim": 4,
            "sliding_window": 8,
            "query_pre_attn_scalar": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": (
        "byte-fallback",
        {**TIED, "original_max_position_embeddings": 96, "rope_parameters": LONG_ROPE, "partial_rotary_factor": 1.0},
    ),
    "smollm3": ("byte-level with whole words", {**TIED, "tie_word_embeddings": False, "no_rope_layers": [1, 0]}),
    "olmo_hybrid": ("byte-level by words", {**HYBRID, "linear_allow_neg_eigval": True}),
    "qwen3_5_text": ("byte-level by words", {**HYBRID, "head_dim": 8, "rope_parameters": QWEN_ROPE}),
    "qwen3_next": (
        "byte-level by words",
        {
            **HYBRID,
            "head_dim": 8,
            "rope_parameters": QWEN_ROPE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
    ),
}
"""Kind of tokenizer and sizes by model type."""

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
WORDS += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Pattern of the pre-tokenizer that Llama 3, Qwen and OLMo use."""

PROMPTS = ["It was a dark night, and", "“Où est 雪?” she said:\n\n", "the"]
MAX_TOKENS, STOP_STEP = 24, 15


def train_tokenizer(kind: str, texts: list[str]) -> Any:
    """Return a tokenizer of a kind, with the special tokens and post-processor that published ones of it have."""
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    create: Any = transformers.PreTrainedTokenizerFast

    if kind.startswith("byte-level"):
        backend = Tokenizer(models.BPE(ignore_merges=kind.endswith("whole words")))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special, names = ["<|endoftext|>"], {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        if kind.endswith("words"):
            steps = [
                pre_tokenizers.Split(Regex(WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
            backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
            special += ["<|im_start|>", "<|im_end|>"]
            names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        if kind == "byte-level by words":
            backend.normalizer = normalizers.NFC()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special)
        backend.train_from_iterator(texts, trainer)
        return create(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    if kind == "unigram":
        backend = Tokenizer(models.Unigram())
        unigram = trainers.UnigramTrainer(vocab_size=500, special_tokens=special[:3], unk_token="<unk>")
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        backend.train_from_iterator(texts, unigram)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        has_prefix = kind == "byte-fallback"
        replacements = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")][not has_prefix :]
        backend.normalizer = normalizers.Sequence(replacements)
        backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=560, special_tokens=special))
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(parts if has_prefix else parts[:-1])
        description = json.loads(backend.to_str())
        for token in description["added_tokens"][3:]:  # bytes are plain tokens
            description["added_tokens"].remove(token)
        backend = Tokenizer.from_str(json.dumps(description))
    bos_id = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos_id)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return create(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def record_layout(folder: Path, model_type: str, texts: list[str]) -> None:
    """Write a folder, and beside it what the library generates greedily for each prompt, with and without an end."""
    import transformers

    models: Any = transformers.AutoModelForCausalLM

    kind, options = LAYOUTS[model_type]
    torch.manual_seed(len(model_type))
    tokenizer = train_tokenizer(kind, texts)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = transformers.AutoConfig.for_model(model_type, vocab_size=len(tokenizer) + 8, **ids, **options)
    model = models.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
            if "embed_tokens" in name or "wte" in name or "lm_head" in name:
                with torch.no_grad():
                    parameter[len(tokenizer) :] = 0.0  # padded vocabulary: never the most likely
    records = []
    original_length = options.get("original_max_position_embeddings", 0)
    # Prompts of both factors: the library changes from short to long ones at the original length.
    prompts = [*PROMPTS, " ".join(PROMPTS[:1] * 12)] if original_length else PROMPTS
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
        settings = {
            "do_sample": False,
            "max_new_tokens": MAX_TOKENS,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(inputs),
        }
        first = model.generate(inputs, eos_token_id=None, **settings)[0, inputs.shape[1] :].tolist()
        stop = [tokenizer.eos_token_id, first[STOP_STEP]]
        output = model.generate(inputs, eos_token_id=stop, return_dict_in_generate=True, output_logits=True, **settings)
        ids_after = output.sequences[0, inputs.shape[1] :].tolist()
        logprobs = [
            float(step[0].float().log_softmax(0)[token]) for step, token in zip(output.logits, ids_after, strict=True)
        ]
        text_ids = [token for token in ids_after if token not in stop]
        text = tokenizer.decode(inputs[0].tolist() + text_ids, skip_special_tokens=True)
        before = tokenizer.decode(inputs[0].tolist(), skip_special_tokens=True)
        record = {"prompt": prompt, "prompt_ids": inputs[0].tolist(), "stop": stop, "ids": ids_after, "text": text}
        if inputs.shape[1] + MAX_TOKENS <= original_length:
            record["window"] = original_length
        records.append({**record, "prompt_text": before, "logprobs": logprobs, "endless_ids": first})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recorded.json").write_text(json.dumps(records))


def main() -> None:
    """Record everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--book", type=Path, required=True)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    arguments = parser.parse_args()
    record_filters(arguments.output / "filters.json")
    texts = arguments.book.read_text(encoding="utf-8")[:200_000].splitlines(keepends=True)
    for model_type in arguments.layouts:
        record_layout(arguments.output / model_type, model_type, texts)


if __name__ == "__main__":
    main()

"""Hugging Face decoders: equal to a plain float64 reference, in segments, saved unchanged, invalid folders refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import memtx
from memtx.errors import CheckpointError, MemtxError
from memtx.inference.decoder import Decoder
from memtx.models.memory_transformer import MemoryTransformer
from tests.hf import plain
from tests.hf.folders import write
from tests.hf.plain import GPT2, LLAMA, MISTRAL, QWEN2, QWEN3
from tests.hf.test_layout import assert_unchanged, write_pickle, write_shards
from tests.hf.test_parity import folders

TOKENS = torch.randint(0, 40, (1, 31), generator=torch.Generator().manual_seed(0))
CONFIGS = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "gpt2": GPT2}
TOLERANCE = 1e-10  # float64 on both sides, sums in another order


def tensors_of(config: dict[str, Any]) -> dict[str, Tensor]:
    return plain.gpt2(config) if config["model_type"] == "gpt2" else plain.llama(config)


def unscaled(config: dict[str, Any]) -> Tensor:
    pairs = config["head_dim"] // 2
    return torch.tensor([config["rope_theta"] ** (-i / pairs) for i in range(pairs)], dtype=torch.float64)


def expected_logits(config: dict[str, Any], inv_freq: Tensor | None = None) -> Tensor:
    if config["model_type"] == "gpt2":
        return plain.gpt2_logits(config, tensors_of(config), TOKENS[0])
    inv_freq = unscaled(config) if inv_freq is None else inv_freq
    return plain.llama_logits(config, tensors_of(config), TOKENS[0], inv_freq)


def read(folder: Path, **options: Any) -> MemoryTransformer:
    return MemoryTransformer.from_pretrained(folder, **options).double()


def read_segments(model: MemoryTransformer, lengths: list[int], tokens: Tensor = TOKENS) -> Tensor:
    state, parts = None, []
    with torch.no_grad():
        for part in tokens.split(lengths, dim=1):
            out = model(part, state)
            state = out.state
            parts.append(out.logits)
    return torch.cat(parts, dim=1)[0]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("lengths", [[31], [1] * 31, [3, 17, 1, 10]])
def test_any_segmentation_gives_the_reference(tmp_path: Path, kind: str, lengths: list[int]) -> None:
    model = read(write(tmp_path, CONFIGS[kind], tensors_of(CONFIGS[kind])))
    torch.testing.assert_close(read_segments(model, lengths), expected_logits(CONFIGS[kind]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_recorded_folders_match_in_streams(parity: Path, kind: str) -> None:
    for folder in folders(parity, kind):
        io = load_file(folder / "io.safetensors")
        model = MemoryTransformer.from_pretrained(folder)
        ids = io["input_ids"]
        for lengths in ([ids.shape[1]], [1, 40, 7, ids.shape[1] - 48]):
            state, parts = None, []
            for part in ids.split(lengths, dim=1):
                with torch.no_grad():
                    out = model(part, state)
                state = out.state
                parts.append(out.logits)
            # float32, sums in another order
            assert (torch.cat(parts, dim=1) - io["logits"]).abs().max() < 1e-4, f"{folder.name}: {lengths}"


def linear(pair: float, turns: float) -> float:
    return 1 / 4


def llama3(pair: float, turns: float) -> float:
    if turns < 1.5:
        return 1 / 4
    if turns > 4:
        return 1.0
    fraction = (turns - 1.5) / (4 - 1.5)
    return (1 - fraction) / 4 + fraction


def yarn(pair: float, turns: float) -> float:
    def pair_at(turns: float) -> float:  # the pair with that many turns in 32 positions
        return 16 * math.log(32 / (2 * math.pi * turns)) / (2 * math.log(100.0))

    low, high = max(math.floor(pair_at(3.0)), 0), min(math.ceil(pair_at(0.5)), 15)
    ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
    return ramp / 4 + (1 - ramp)


@pytest.mark.parametrize(
    ("scaling", "options"),
    [
        (linear, {"rope_type": "linear"}),
        (llama3, {"rope_type": "llama3", "low_freq_factor": 1.5, "high_freq_factor": 4.0}),
        (yarn, {"rope_type": "yarn", "beta_fast": 3.0, "beta_slow": 0.5, "attention_factor": 1.0}),
    ],
)
@pytest.mark.parametrize("spelling", ["older", "newer"])
def test_scaled_rotary_fits_the_reference(tmp_path: Path, scaling: Any, options: dict[str, Any], spelling: str) -> None:
    config = {**LLAMA, "head_dim": 16}
    tensors = plain.llama(config)
    inv_freq = unscaled(config)
    scaled = [frequency * scaling(i, 32 * frequency.item() / (2 * math.pi)) for i, frequency in enumerate(inv_freq)]
    rope = {**options, "factor": 4.0, "original_max_position_embeddings": 32}
    hf_config = {key: value for key, value in config.items() if key != "rope_theta"}
    if spelling == "older":
        rope["type"] = rope.pop("rope_type")
        hf_config |= {"rope_theta": config["rope_theta"], "rope_scaling": rope}
    else:
        hf_config["rope_parameters"] = {**rope, "rope_theta": config["rope_theta"]}
    model = read(write(tmp_path, hf_config, tensors))
    expected = plain.llama_logits(config, tensors, TOKENS[0], torch.stack(scaled))
    torch.testing.assert_close(read_segments(model, [5, 26]), expected, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(expected, expected_logits(config), atol=1e-3)  # far above TOLERANCE: scaling shows


@pytest.mark.parametrize("kind", CONFIGS)
def test_decoding_in_place_gives_the_reference(tmp_path: Path, kind: str) -> None:
    config = CONFIGS[kind]
    if kind == "llama":
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.3}
        config = {**config, "rope_scaling": rope}
    model = read(write(tmp_path, config, tensors_of(config)))
    expected = read_segments(model, [31])
    with torch.no_grad():
        decoder = Decoder(model, model(TOKENS[:, :12]).state)
        steps = torch.stack([decoder.step(TOKENS[:, index])[0] for index in range(12, 31)])
    torch.testing.assert_close(steps, expected[12:], rtol=0, atol=TOLERANCE)


def test_yarn_has_an_attention_factor(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = {**LLAMA, "rope_parameters": {**rope, "rope_theta": 100.0}}
    positions = read(write(tmp_path, config, plain.llama(LLAMA))).blocks[0].attention.positions
    assert positions.frequencies.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1.0)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_are_saved_byte_for_byte(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    tensors = {name: x.to(dtype) for name, x in tensors_of(CONFIGS[kind]).items()}
    folder = write(tmp_path / "read", CONFIGS[kind], tensors)
    model = memtx.from_pretrained(folder)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    memtx.hf.save(model, tmp_path / "written")
    assert_unchanged(tmp_path / "written", tensors, (folder / "config.json").read_text())
    # Our own format does not need the folder.
    model.save_pretrained(tmp_path / "own")
    reloaded = MemoryTransformer.from_pretrained(tmp_path / "own")
    assert torch.equal(reloaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("form", [write_shards, write_pickle])
def test_every_form_on_disk_gives_one_model(tmp_path: Path, form: Any) -> None:
    tensors = tensors_of(QWEN2)
    expected = read(write(tmp_path / "one", QWEN2, tensors))(TOKENS).logits
    folder = write(tmp_path / "other", QWEN2, tensors)
    form(folder, tensors)
    assert torch.equal(read(folder)(TOKENS).logits, expected)


def test_backbone_with_legacy_tables_and_stored_tied_head(tmp_path: Path) -> None:
    tensors = {name.removeprefix("transformer."): x for name, x in plain.gpt2().items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), "lm_head.weight": tensors["wte.weight"] + 0}
    folder = write(tmp_path / "read", GPT2, tensors)
    model = read(folder)
    torch.testing.assert_close(read_segments(model, [31]), expected_logits(GPT2), rtol=0, atol=TOLERANCE)
    memtx.hf.save(MemoryTransformer.from_pretrained(folder), tmp_path / "written")
    assert_unchanged(tmp_path / "written", tensors, (folder / "config.json").read_text())


def test_mixed_dtypes_load_in_the_widest_and_save_unchanged(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    mixed = {name: x if "norm" in name else x.bfloat16() for name, x in tensors.items()}
    folder = write(tmp_path / "read", LLAMA, mixed)
    model = memtx.from_pretrained(folder)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    memtx.hf.save(model, tmp_path / "written")
    assert_unchanged(tmp_path / "written", mixed, (folder / "config.json").read_text())


def test_window_defaults_to_the_trained_length(tmp_path: Path) -> None:
    def layer_windows(folder: Path, **options: Any) -> list[int]:
        return [block.attention.memory.window for block in read(folder, **options).blocks]

    folder = write(tmp_path / "qwen2", QWEN2, tensors_of(QWEN2))
    assert layer_windows(folder) == [64, 5]
    assert layer_windows(folder, window=9) == [9, 5]
    assert layer_windows(folder, window=3) == [3, 3]
    long = {**LLAMA, "max_position_embeddings": 131072}
    assert layer_windows(write(tmp_path / "long", long, tensors_of(long))) == [131072, 131072]
    assert layer_windows(
        write(
            tmp_path / "long", {**MISTRAL, "sliding_window": None, **long, "model_type": "mistral"}, tensors_of(LLAMA)
        )
    ) == [131072, 131072]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    extended = {**LLAMA, "rope_scaling": yarn}
    assert layer_windows(write(tmp_path / "yarn", extended, tensors_of(extended))) == [256, 256]
    dynamic = {**long, "rope_scaling": {"rope_type": "dynamic", "original_max_position_embeddings": 96, "factor": 2.0}}
    assert layer_windows(write(tmp_path / "dynamic", dynamic, tensors_of(dynamic))) == [96, 96]
    gpt2 = {**GPT2, "n_positions": 77}
    assert layer_windows(write(tmp_path / "gpt2", gpt2, tensors_of(gpt2))) == [77, 77]
    with pytest.raises(MemtxError, match="window is 0"):
        read(folder, window=0)
    read(folder).save_pretrained(tmp_path / "own")
    with pytest.raises(MemtxError, match=r"window \(9\).*not a Hugging Face decoder"):
        MemoryTransformer.from_pretrained(tmp_path / "own", window=9)


def test_gpt2_reads_beyond_its_last_position(tmp_path: Path) -> None:
    model = read(write(tmp_path, GPT2, tensors_of(GPT2)))
    tokens = TOKENS.repeat(1, 6)
    expected = read_segments(model, [tokens.shape[1]], tokens)
    assert expected.isfinite().all()
    torch.testing.assert_close(read_segments(model, [50, 30, 106], tokens), expected, rtol=0, atol=TOLERANCE)


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    tensors = tensors_of(QWEN2)
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3)
    tensors["something.else"] = torch.zeros(1)
    tensors["model.layers.0.self_attn.v_proj.weight"] = torch.zeros(12, 13)
    tensors["model.norm.weight"] = torch.zeros(12, dtype=torch.int64)
    with pytest.raises(CheckpointError) as error:
        memtx.from_pretrained(write(tmp_path, QWEN2, tensors))
    for message in (
        "lacks model.layers.1.self_attn.k_proj.bias",
        "has model.layers.2.mlp.up_proj.weight, unknown",
        "has something.else, unknown",
        "has model.layers.0.self_attn.v_proj.weight of shape (12, 13) instead of (12, 12)",
        "has model.norm.weight as torch.int64",
    ):
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA, {"model_type": "lama"}, "lama.*expected one of.*Did you mean 'llama'"),
        (LLAMA, {"rope_scaling": {"rope_type": "long"}}, "long'.*expected one of"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "factor = None"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"hidden_act": "sillu"}, "Did you mean 'silu'"),
        (LLAMA, {"num_key_value_heads": 3}, r"heads \(\d+\) must be divisible by kv_heads \(3\)"),
        (LLAMA, {"head_dim": 5}, "even width"),
        (LLAMA, {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        (QWEN2, {"layer_types": ["full_attention"]}, "layer_types"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"n_head": 5}, r"dim \(12\) must be divisible by heads \(5\)"),
    ],
)
def test_error_names_the_config_key(
    tmp_path: Path, config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(MemtxError, match=message):
        memtx.from_pretrained(write(tmp_path, {**config, **change}, tensors_of(config)))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, LLAMA, tensors_of(LLAMA))
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match="not a valid safetensors"):
        memtx.from_pretrained(folder)
    save_file({"a": torch.zeros(1).to(torch.float8_e4m3fn)}, weights)
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        memtx.from_pretrained(folder)


MEASURE = """
import sys, torch, memtx
from memtx.models.memory_transformer import MemoryTransformer
from memtx.hf import llama
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
model = MemoryTransformer.from_pretrained(sys.argv[1])
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loading_needs_little_more_memory_than_the_weights(tmp_path: Path, kind: str) -> None:
    # About 200 MB, in shards.
    if kind == "llama":
        config = {**LLAMA, "vocab_size": 16000, "hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
        config |= {"num_hidden_layers": 9, "tie_word_embeddings": True}
    else:
        config = {**GPT2, "vocab_size": 16000, "n_embd": 768, "n_layer": 5, "n_head": 12, "n_positions": 1024}
    tensors = tensors_of(config)
    folder = write(tmp_path, config, tensors)
    write_shards(folder, tensors)
    del tensors
    run = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
    peak_growth, weights = map(int, run.stdout.split())
    assert weights > 150e6
    assert peak_growth < 1.1 * weights, f"{peak_growth / weights:.3f} of the weights"


def test_tokenizer_of_the_folder_is_used(tmp_path: Path) -> None:
    from memtx.checkpoint.load import load_model_and_tokenizer
    from memtx.data.tokenizers import BytePairTokenizer

    trained = BytePairTokenizer(vocab_size=300)
    trained.train(["some words, and some other words. " * 20])
    config = {**LLAMA, "vocab_size": 320}
    folder = write(tmp_path, config, plain.llama(config))
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_model_and_tokenizer(folder)
    model_json = json.loads(trained.to_json())["model"]
    (folder / "tokenizer.json").write_text(json.dumps(model_json))
    model, tokenizer = load_model_and_tokenizer(folder)
    assert model.vocab_size == 320
    assert list(tokenizer.encode("some words")) == list(trained.encode("some words"))

"""Configs "as published" have the hyperparameters of their papers, each with its place there.

A config is one if its first line says so. Its head names the figure to reach, hardware and duration, and differences.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import memtx
from memtx import class_config

CONFIGS = Path(memtx.__file__).parent.parent / "configs"
HEADS = {path.stem: path.read_text().partition("seed_everything")[0] for path in sorted(CONFIGS.glob("*.yaml"))}
PUBLISHED = [name for name, head in HEADS.items() if "as published" in head.splitlines()[0]]

# Options by their path in the YAML file, without init_args: value, and where it is published. "streams" is the number
# of streams on all devices, "parameters" the published number in millions.
XL = "Dai et al. 2019"
Row = tuple[Any, str]


def script(name: str, **options: Any) -> dict[str, Row]:
    """Return options of a script of the original code, as the paper's appendix refers to it."""
    return {path.replace("__", "."): (value, f"kimiyoung/transformer-xl, {name}") for path, value in options.items()}


WORDS = {
    "data.tokenizer.vocab_size": (267735, "WikiText-103's words and <eos>; tf/data_utils.py"),
    "model.model.cutoffs": ([20000, 40000, 200000], "pytorch/train.py, cutoffs of wt103"),
}
ADAM: dict[str, Row] = {
    "model.optimizer.class_path": ("torch.optim.Adam", "scripts, --optim adam"),
    "model.optimizer.lr": (2.5e-4, "scripts, --lr"),
    "model.scheduler.class_path": ("memtx.training.optimizers.WarmupCosine", "train.py, --scheduler"),
    "model.scheduler.min_lr_ratio": (0.0, "train.py, --eta_min"),
    "trainer.gradient_clip_val": (0.25, "train.py, --clip"),
    "model.model.class_path": ("memtx.TransformerXL", XL),
    "data.bptt_segments": (1, f"{XL}, section 3.2: no gradient between segments"),
}
LARGE_CHARACTERS = script(
    "tf/scripts/enwik8_large_tpu.sh", model__model__dim=1024, model__model__depth=24, model__model__heads=8,
    model__model__head_dim=128, model__model__hidden_dim=3072, model__model__dropout=0.15,
    model__model__attention_dropout=0.15, model__model__memory_length=768, data__segment_length=768, streams=64,
    model__scheduler__warmup_steps=4000, trainer__max_steps=400000, model__model__share_biases=True,
    test__segment_length=128, test__eval_memory=3800, test__clamp=1000,
)  # fmt: skip
_LOCAL, _LSH = (
    {"class_path": f"memtx.layers.reformer.{name}",
     "init_args": {"head_dim": 64, "num_chunks_before": 1, "dropout": 0.2, **options}}
    for name, options in (
        ("LocalAttention", {"chunk_length": 128}),
        ("LSHAttention", {"chunk_length": 256, "num_hashes": 2, "num_buckets": 512}),
    )
)  # fmt: skip
REFORMER_LAYERS = [_LOCAL, _LOCAL, _LSH, _LOCAL]
RAE = "Rae et al. 2020"
_MEMORY = "model.model.memories.0"
COMPRESSIVE: dict[str, Row] = {
    "model.model.class_path": ("memtx.MemoryTransformer", RAE),
    "model.model.positions.class_path": ("memtx.RelativePositions", f"{RAE}, section 3: as Transformer-XL"),
    "model.model.norm": ("torch.nn.LayerNorm", f"{RAE}, algorithm 1"),
    "model.model.norm_placement": ("residual", f"{RAE}, algorithm 1, lines 7 and 12"),
    "model.model.feed_forward.activation": ("torch.nn.ReLU", XL),
    f"{_MEMORY}.class_path": ("memtx.CompressedMemory", RAE),
    f"{_MEMORY}.compress_per_segment": (True, f"{RAE}, algorithm 1"),
    f"{_MEMORY}.language_gradient": (False, f"{RAE}, section 3.2"),
    f"{_MEMORY}.compression": ("memtx.memory.compression.StridedConvolution", f"{RAE}, table 5"),
    f"{_MEMORY}.reconstruction": ("memtx.memory.compression.AttentionReconstruction", f"{RAE}, table 5"),
    "model.optimizer.class_path": ("torch.optim.Adam", f"{RAE}, section 5"),
    "model.optimizer.lr": (3e-4, f"{RAE}, section 5"),
    "model.scheduler.class_path": ("memtx.training.optimizers.WarmupCosine", f"{RAE}, section 5"),
    "model.scheduler.min_lr_ratio": (0.0033, f"{RAE}, section 5: 1e-6"),
    "trainer.gradient_clip_val": (0.1, f"{RAE}, section 5"),
    "trainer.callbacks.0.schedule": ({0: 1, 60000: 4}, f"{RAE}, section 5"),
    "data.bptt_segments": (1, f"{RAE}, section 3.2"),
}


def compressive(section: str, **options: Any) -> dict[str, Row]:
    """Return options of a section of the paper on the Compressive Transformer."""
    paths = {"memory": _MEMORY, "model": "model.model", "scheduler": "model.scheduler"}
    options_by_path = {}
    for path, value in options.items():
        part, _, option = path.partition("__")
        options_by_path[f"{paths.get(part, part)}.{option}" if option else part] = (value, f"{RAE}, {section}")
    return options_by_path


XLNET = "Yang et al. 2019"
XLNET_ROWS: dict[str, Row] = {
    f"model.model.{path}": (value, f"{XLNET}, section 3.4: BERT-Base's sizes")
    for path, value in {"dim": 768, "depth": 12, "heads": 12, "hidden_dim": 3072}.items()
} | {
    path.replace("__", "."): (value, f"{XLNET}, table 8")
    for path, value in {
        "model__context_ratio": 6, "model__model__dropout": 0.1, "sequences": 8192, "trainer__max_steps": 500000,
        "model__optimizer__lr": 4e-4, "model__optimizer__eps": 1e-6, "model__optimizer__weight_decay": 0.01,
        "model__scheduler__class_path": "memtx.training.optimizers.WarmupLinear",
        "model__scheduler__warmup_steps": 40000,
    }.items()
} | {
    path.replace("__", "."): (value, "zihangdai/xlnet, README.md, pretraining")
    for path, value in {
        "data__segment_length": 256, "model__model__reuse_length": 256, "model__model__memory_length": 384,
        "model__num_targets": 85, "data__tokenizer__vocab_size": 32000,
    }.items()
} | {
    "model.max_span": (5, f"{XLNET}, section 3.1"), "model.scheduler.min_lr_ratio": (0.001, "train.py, min_lr_ratio"),
    "trainer.gradient_clip_val": (1.0, "train.py, clip"), "parameters": (117, "the published checkpoint"),
    "target": ("85.6", f"{XLNET}, table 6"),
}  # fmt: skip
TABLE: dict[str, dict[str, Row]] = {
    "xlnet": XLNET_ROWS,
    "compressive-enwik8": COMPRESSIVE | compressive(
        "section 5.2", model__depth=24, data__segment_length=768, memory__window=768, memory__num_entries=1152,
        memory__compression_rate=3, scheduler__warmup_steps=4000, scheduler__total_steps=104000,
        trainer__max_steps=104000,
    ) | {
        "model.model.dim": (1024, f"{XL}, 24 layers"), "model.model.heads": (8, f"{XL}, 24 layers"),
        "model.model.feed_forward.hidden_dim": (3072, f"{XL}, 24 layers"), "streams": (64, f"{XL}, 24 layers"),
        "model.model.dropout": (0.15, f"{XL}, 24 layers"), "model.model.attention_dropout": (0.15, f"{XL}, 24 layers"),
        # The count of the paper on Transformer-XL, table 2, and 24 convolutions of 3 x 1024 states to 1024.
        "parameters": (277 + 24 * (3 * 1024 + 1) * 1024 / 1e6, f"{XL}, table 2"),
        "target": ("0.97", f"{RAE}, table 4"),
    },
    "compressive-pg19": COMPRESSIVE | compressive(
        "section 5.1", model__depth=36, data__segment_length=512, memory__window=512, memory__num_entries=512,
        memory__compression_rate=2, scheduler__warmup_steps=16000, scheduler__total_steps=516000, streams=512,
        trainer__max_steps=140000,
    ) | {
        "data.tokenizer.vocab_size": (32000, f"{RAE}, section 5.1"),
        "model.model.dim": (1024, f"{XL}, 18 layers"), "model.model.heads": (16, f"{XL}, 18 layers"),
        "model.model.feed_forward.hidden_dim": (4096, f"{XL}, 18 layers"),
        # Derived: 5 maps of attention, 2 of the feed-forward part and the convolution per layer, and the vocabulary.
        "parameters": ((36 * (5 + 2 * 4 + 2) * 1024**2 + 32000 * 1024) / 1e6, "no count in the paper"),
        "target": ("33.6", f"{RAE}, table 3"),
    },
    "transformer-xl-wt103": ADAM | WORDS | script(
        "pytorch/run_wt103_base.sh", model__model__dim=410, model__model__depth=16, model__model__heads=10,
        model__model__head_dim=41, model__model__hidden_dim=2100, model__model__dropout=0.1,
        model__model__attention_dropout=0.0, model__model__memory_length=150, data__segment_length=150, streams=60,
        model__scheduler__warmup_steps=0, trainer__max_steps=200000, model__model__div_value=1,
        model__model__share_biases=True, test__segment_length=64, test__eval_memory=640, test__clamp=400,
    ) | {"parameters": (151, f"{XL}, table 1"), "target": ("24.0", f"{XL}, table 1")},
    "transformer-xl-wt103-large": ADAM | WORDS | script(
        "tf/scripts/wt103_large_tpu.sh", model__model__dim=1024, model__model__depth=18, model__model__heads=16,
        model__model__head_dim=64, model__model__hidden_dim=4096, model__model__dropout=0.2,
        model__model__attention_dropout=0.2, model__model__memory_length=384, data__segment_length=384, streams=128,
        model__scheduler__warmup_steps=16000, trainer__max_steps=4000000, model__model__div_value=4,
        model__model__share_biases=False, test__segment_length=128, test__eval_memory=1600, test__clamp=1000,
    ) | {
        # The paper's table says 257 M.
        "parameters": (285.2, "the published checkpoint"), "target": ("18.3", f"{XL}, table 1"),
    },
    "transformer-xl-enwik8": ADAM | script(
        "pytorch/run_enwik8_base.sh", model__model__dim=512, model__model__depth=12, model__model__heads=8,
        model__model__head_dim=64, model__model__hidden_dim=2048, model__model__dropout=0.1,
        model__model__attention_dropout=0.0, model__model__memory_length=512, data__segment_length=512, streams=22,
        model__scheduler__warmup_steps=0, trainer__max_steps=400000, model__model__share_biases=True,
        test__segment_length=80, test__eval_memory=2100, test__clamp=820,
    ) | {"parameters": (41, f"{XL}, table 2"), "target": ("1.06", f"{XL}, table 2")},
    "transformer-xl-enwik8-24": ADAM | LARGE_CHARACTERS | {
        "parameters": (277, f"{XL}, table 2"), "target": ("0.99", f"{XL}, table 2"),
    },
    "reformer-enwik8": {
        path.replace("__", "."): (value, "google/trax, trax/supervised/configs/reformer_enwik8.gin")
        for path, value in {
            "model__model__dim": 768, "model__model__heads": 8, "model__model__hidden_dim": 2048,
            "model__model__dropout": 0.2, "model__model__positions__shape": [128, 512],
            "model__model__positions__axis_dims": [256, 512], "data__segment_length": 65536, "streams": 8,
            "model__optimizer__betas": [0.9, 0.98], "model__optimizer__eps": 1e-9,
            "model__optimizer__lr": 7e-4,  # 0.03125 / sqrt(warm-up steps), rounded
            "model__scheduler__class_path": "memtx.training.optimizers.WarmupInverseSqrt",
            "model__scheduler__warmup_steps": 2000, "trainer__max_steps": 100000,
            "model__model__attentions": REFORMER_LAYERS * 3,
        }.items()
    } | {"target": ("1.05", "Kitaev et al. 2020, section 5")},
    "transformer-xl-text8": ADAM | LARGE_CHARACTERS | {
        "parameters": (277, f"{XL}, table 3"), "target": ("1.08", f"{XL}, table 3"),
    },
}  # fmt: skip


def recipe(source: str, **options: Any) -> dict[str, Row]:
    """Return options by their paths, with two underscores for dots."""
    return {path.replace("__", "."): (value, source) for path, value in options.items()}


_LOSSES, _ATTENTIONS = "model.distillation.losses", "model.model.attentions"
_TINY = {"dim": 312, "depth": 4, "heads": 12, "hidden_dim": 1200}
_BASE = recipe("base size", model__model__dim=768, model__model__depth=12, model__model__heads=12,
               model__model__hidden_dim=3072, data__segment_length=4096)  # fmt: skip
TINYBERT = recipe(
    "Jiao et al. 2020, section 4.2, and general_distill.py", sequences=256, data__segment_length=126,  # [CLS], [SEP]
    model__optimizer__lr=1e-4, model__optimizer__weight_decay=0.01, warmup=0.1,
    **{f"model__model__{name}": value for name, value in _TINY.items()},
) | {
    f"{_LOSSES}.0": ("memtx.training.distillation.EmbeddingMSE", "equation 9"),
    f"{_LOSSES}.1.class_path": ("memtx.training.distillation.AttentionMSE", "equation 7"),
    f"{_LOSSES}.1.layers": ("memtx.training.distillation.EveryKthLayer", "section 3.1, g(m) = 3m"),
    f"{_LOSSES}.2.class_path": ("memtx.training.distillation.HiddenMSE", "equation 8"),
    f"{_LOSSES}.2.layers": ("memtx.training.distillation.EveryKthLayer", "section 3.1, g(m) = 3m"),
}  # fmt: skip
LONGFORMER_LM = recipe(
    "Beltagy et al. 2020, table 12", model__model__dim=512, model__model__depth=12, model__model__heads=8,
    model__model__dropout=0.2, model__optimizer__lr=2.5e-4, model__optimizer__weight_decay=0.01,
    data__segment_length=2048, data__batch_size=32, trainer__gradient_clip_val=0.25,
    trainer__callbacks__0__steps=[430000, 50000, 50000, 35000, 5000],
    trainer__callbacks__0__batch_sizes=[32, 32, 16, 16, 16], trainer__callbacks__0__max_segment_length=23040,
)  # fmt: skip
RECIPES: dict[str, dict[str, Row]] = {
    "distilbert": recipe(
        "huggingface/transformers-research-projects, distillation/README.md and train.py", sequences=4000,
        model__model__dim=768, model__model__depth=6, model__model__heads=12, model__model__hidden_dim=3072,
        model__mask_prob=0.15, model__mask_smoothing=0.7, model__optimizer__lr=5e-4, model__optimizer__eps=1e-6,
        model__optimizer__betas=[0.9, 0.98], model__optimizer__weight_decay=0.0, warmup=0.05,
        trainer__gradient_clip_val=5.0, data__segment_length=510,
    ) | {
        "model.distillation.student_init": ("memtx.training.distillation.EvenlySpacedLayers", "scripts/extract.py"),
        f"{_LOSSES}.0.class_path": ("memtx.training.distillation.SoftTargets", "Sanh et al. 2019, section 2"),
        f"{_LOSSES}.0.weight": (5.0, "--alpha_ce"), f"{_LOSSES}.0.temperature": (2.0, "--temperature"),
        f"{_LOSSES}.1.class_path": ("memtx.training.distillation.HardLabels", "Sanh et al. 2019, section 2"),
        f"{_LOSSES}.1.weight": (2.0, "--alpha_mlm"),
        f"{_LOSSES}.2.class_path": ("memtx.training.distillation.HiddenCosine", "Sanh et al. 2019, section 2"),
        f"{_LOSSES}.2.weight": (1.0, "--alpha_cos"),
    },
    "tinybert-general": TINYBERT | recipe("three passes", trainer__max_steps=300000),
    "tinybert-general-long": TINYBERT | recipe("ten times as long", trainer__max_steps=3000000),
    "tinybert-task": recipe(
        "Jiao et al. 2020, section 4.2, and task_distill.py", sequences=32, data__task__max_length=128,
        model__optimizer__lr=5e-5, model__optimizer__weight_decay=0.01, trainer__max_epochs=23,
        model__scheduler__class_path="memtx.training.optimizers.StagedLinear",
        model__scheduler__lr_ratio=0.6,  # 3e-5
        model__scheduler__second_stage=0.87,  # 20 of 23 passes
        **{f"model__backbone__{name}": value for name, value in _TINY.items()},
    ) | {
        f"{_LOSSES}.{index}": (
            {"class_path": f"memtx.training.distillation.{name}", "init_args": options}, "section 3, equations 7 to 10"
        )
        for index, (name, options) in enumerate((
            ("EmbeddingMSE", {"end": 0.87}), ("AttentionMSE", {"end": 0.87}), ("HiddenMSE", {"end": 0.87}),
            ("SoftTargets", {"temperature": 1.0, "begin": 0.87}),
        ))
    },
    "longformer-mlm": _BASE | recipe(
        "Beltagy et al. 2020, section 5", sequences=64, trainer__max_steps=65000, model__mask_prob=0.15,
        **{f"{_ATTENTIONS}.0.window": 512},
    ),
    "bigbird-mlm": _BASE | recipe("Zaheer et al. 2020, table 8", **{
        f"{_ATTENTIONS}.0.block_size": 64, f"{_ATTENTIONS}.0.num_random_blocks": 3,
    }),
    "longformer-lm-enwik8": LONGFORMER_LM,
    "longformer-lm-text8": LONGFORMER_LM,
}  # fmt: skip
"""Configs that follow a paper in these options, and differ or leave a choice in others."""


def lookup(content: Any, path: str) -> Any:
    """Return an option by its path, with or without ``init_args`` on the way; None if it is not there."""
    for key in path.split("."):
        if isinstance(content, list):
            content = content[int(key)]
            continue
        if key not in content and "init_args" in content:
            content = content["init_args"]
        if key not in content:
            return None
        content = content[key]
    return content


def spell_out(config: Any) -> Any:
    """Return a config in which classes without options are not just names."""
    if isinstance(config, list):
        return [spell_out(item) for item in config]
    if isinstance(config, dict):
        return {key: value if key == "class_path" else spell_out(value) for key, value in config.items()}
    return {"class_path": config} if isinstance(config, str) and config.startswith(("memtx.", "torch.")) else config


def find_value(name: str, path: str) -> Any:
    """Return what a config has for a row of the table."""
    content, head = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), HEADS[name]
    trainer = content["trainer"]
    if path == "streams":
        return lookup(content, "data.batch_size") * trainer.get("devices", 1)
    if path == "sequences":
        return find_value(name, "streams") * trainer.get("accumulate_grad_batches", 1)
    if path == "warmup":
        return lookup(content, "model.scheduler.warmup_steps") / trainer["max_steps"]
    if path == "target":
        words = (word.strip(",.:") for word in head.partition("# Target:")[2].split())
        return next((word for word in words if word[0].isdigit()), None)
    if path.startswith("test."):
        option = path.removeprefix("test.")
        words = head.replace("#", " ").split()
        flag = f"--data.{option}" if option == "segment_length" else f"--model.{option}"
        return float(words[words.index(flag) + 1])
    if path == "parameters":
        vocab_size = lookup(content, "data.tokenizer.vocab_size") or 257
        with torch.device("meta"):
            model = class_config.from_config(spell_out(lookup(content, "model.model")))(vocab_size=vocab_size)
        return sum(weight.numel() for weight in model.parameters()) / 1e6
    value = lookup(content, path)
    return 1 if path == "data.bptt_segments" and value is None else value


def test_every_published_config_has_a_table() -> None:
    assert set(PUBLISHED) == set(TABLE)


@pytest.mark.parametrize("name", [*TABLE, *RECIPES])
def test_hyperparameters_are_those_of_the_paper(name: str) -> None:
    for path, (value, reference) in (TABLE | RECIPES)[name].items():
        config_value = find_value(name, path)
        if path == "parameters":
            # Within the digits that papers give.
            assert math.isclose(config_value, value, rel_tol=0.01), (path, config_value, reference)
        else:
            assert config_value == value, (path, config_value, reference)


@pytest.mark.parametrize("name", TABLE)
def test_the_head_says_what_to_expect(name: str) -> None:
    for part in ("# Target: ", "# Differs: ", "`memtx plan`", "GiB", " steps"):
        assert part in HEADS[name], part

"""Tiny configs and books for the commands that train and evaluate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

SPLITS = ("train", "validation", "test")

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "run_dir": "run",
    "data": {
        "root": "books",
        "batch_size": 2,
        "segment_length": 16,
        "eval_batch_size": 3,
        "cache_dir": "cache",
        "num_workers": 1,
    },
    "model": {
        "model": {
            "class_path": "memtx.MemoryTransformer",
            "init_args": {
                "dim": 16,
                "depth": 1,
                "heads": 2,
                "dropout": 0.1,
                "memories": [
                    {
                        "class_path": "memtx.CompressedMemory",
                        "init_args": {
                            "window": 8,
                            "compression_rate": 4,
                            "num_entries": 4,
                            "compression": "memtx.memory.compression.StridedConvolution",
                        },
                    }
                ],
            },
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "scheduler": {"class_path": "memtx.training.optimizers.WarmupCosine", "init_args": {"warmup_steps": 2}},
    },
    "trainer": {
        "max_steps": 4,
        "max_epochs": -1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
    },
}


def changed(path: tuple[str | int, ...], value: Any, config: dict[str, Any] = CONFIG) -> dict[str, Any]:
    """Return the config with one value changed."""
    config = copy.deepcopy(config)
    parent: Any = config
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return config


def renamed(path: tuple[str | int, ...], name: str) -> dict[str, Any]:
    """Return the config with one key renamed."""
    config = copy.deepcopy(CONFIG)
    parent: Any = config
    for key in path[:-1]:
        parent = parent[key]
    parent[name] = parent.pop(path[-1])
    return config


def write(folder: Path, config: dict[str, Any] = CONFIG, name: str = "c.yaml") -> Path:
    (folder / name).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return folder / name


def write_books(root: Path, splits: tuple[str, ...] = SPLITS) -> Path:
    for split in splits:
        (root / split).mkdir(parents=True)
        for number in range(3):
            text = f"Of the {split}, night {number} was dark and störmy.\n" * (5 + number)
            (root / split / f"{number}.txt").write_text(text, encoding="utf-8")
    return root

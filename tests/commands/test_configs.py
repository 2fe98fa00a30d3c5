"""Every shipped config: complete, commented, short, and the model in it is what its comments say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from memtx import specs
from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer
from memtx.inference.loading import chosen_checkpoint
from memtx.models.memory_transformer import MemoryTransformer
from tests.commands.program import HOME, Program
from tests.models.published import plain
from tests.models.published.folders import write

CONFIGS = sorted((HOME / "configs").glob("*.yaml"))
NAMES = [path.name for path in CONFIGS]


def test_there_are_configs() -> None:
    assert {"quickstart.yaml", "pg19.yaml", "pg19-mini.yaml", "enwik8.yaml"} <= set(NAMES)


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_it_is_complete_and_commented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    assert text.count("\n") < 100
    assert all(len(line) <= 120 for line in text.splitlines())
    # Says what it is and the one command, before the first key.
    head = text.partition("seed_everything")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"memtx fit --config configs/{path.name}" in head
    assert {"seed_everything", "run", "data", "model", "trainer"} <= set(content)
    assert content["run"] == f"runs/{path.stem}"
    # Data that must be fetched first is never a guess.
    assert content["data"]["root"] in (None, "embedded")
    assert ("--data.root PATH" in head) == (content["data"]["root"] is None)


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_the_parser_takes_it_and_the_model_has_the_size_it_claims(program: Program, tmp_path: Path, path: Path) -> None:
    # Without the data its own message; the config itself is whole.
    done = program("fit", "--config", str(path), "--data.root", "embedded", "--print_config", at=tmp_path)
    assert done.code == 0, done.err
    content: dict[str, Any] = yaml.safe_load(done.out)
    tokenizer = content["data"]["tokenizer"] or {}
    vocabulary = (tokenizer.get("init_args") or {}).get("vocab_size", ByteTokenizer().vocab_size)
    settings = content["model"]["model"]["init_args"]
    if "folder" in settings:
        # Of a model that the user has: a test of its own.
        assert settings["folder"] is None
        return
    # On the meta device: shapes without memory.
    with torch.device("meta"):
        model = specs.built(content["model"]["model"])(vocab_size=vocabulary)
    count = sum(weight.numel() for weight in model.parameters())
    claimed = re.search(r"about ([\d.]+) M parameters", path.read_text(), re.IGNORECASE)
    assert claimed is not None
    # Two figures are given.
    assert count / 1e6 == pytest.approx(float(claimed[1]), rel=0.02)


@pytest.mark.parametrize("name", ["pg19.yaml", "enwik8.yaml", "pg19-mini.yaml"])
def test_without_its_data_it_says_where_to_get_them(program: Program, tmp_path: Path, name: str) -> None:
    done = program("fit", "--config", str(HOME / "configs" / name), at=tmp_path)
    assert done.code == 2
    assert done.err.count("\n") == 1
    for part in (
        "data.root",
        f"{name}' say which",
        "google-deepmind/pg19",
        "train/ validation/ test/",
        "<id>.txt",
        "--data.root PATH",
    ):
        assert part in done.err
    assert not list(tmp_path.iterdir())


def test_a_published_folder_is_retrofitted_read_and_measured(program: Program, tmp_path: Path) -> None:
    tokenizer = BytePairTokenizer(vocab_size=300)
    tokenizer.fit(["some words, and some other words. " * 50])
    config = {**plain.LLAMA, "vocab_size": 320, "hidden_size": 24, "max_position_embeddings": 64}
    folder = write(tmp_path / "model", config, plain.llama(config))
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_json())["model"]))
    text = tmp_path / "text.txt"
    text.write_text("some words, and some other words. " * 20)
    # As it is: a window, and nothing beyond it.
    session = str(tmp_path / "session")
    done = program("read", str(text), "--checkpoint", str(folder), "--session", session, at=tmp_path)
    assert done.code == 0, done.err
    done = program("generate", "--checkpoint", str(folder), "--session", session, "--max-tokens", "8", at=tmp_path)
    assert done.code == 0, done.err
    config_file = str(HOME / "configs" / "retrofit.yaml")
    asked = ["fit", "--config", config_file, "--data.root", "embedded", "--data.cache", str(tmp_path / "cache")]
    done = program(*asked, at=tmp_path)
    assert done.code == 2
    assert "--model.model.init_args.folder FOLDER" in done.err
    done = program(
        *asked, "--model.model.init_args.folder", str(folder), "--model.distillation=1",
        "--data.tokenizer.init_args.path", str(folder / "tokenizer.json"), "--data.segment=32",
        "--trainer.log_every_n_steps=1",
        "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2",
        "--trainer.num_sanity_val_steps=0", at=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "retrofit"
    assert "train_distillation" in (run / "metrics.csv").read_text()
    before, after = (MemoryTransformer.from_pretrained(place) for place in (folder, chosen_checkpoint(run)))
    kept = after.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.state_dict().items())
    # The run needs the folder no more.
    shutil.rmtree(folder)
    done = program("read", str(text), "--checkpoint", str(run), at=tmp_path)
    assert done.code == 0, done.err


def test_the_quickstart_takes_a_step(program: Program, tmp_path: Path) -> None:
    done = program(
        "fit", "--config", str(HOME / "configs" / "quickstart.yaml"), "--data.cache", str(tmp_path / "cache"),
        "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2",
        "--trainer.num_sanity_val_steps=0", at=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (tmp_path / "runs" / "quickstart" / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "runs" / "quickstart" / "metrics.csv").is_file()

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

from memtx import class_config
from memtx.checkpoint.pretrained import find_checkpoint
from memtx.data.synthetic_tasks.recall import AssociativeRecall
from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer
from memtx.models.memory_transformer import MemoryTransformer
from tests.commands.program import HOME, Program
from tests.hf import plain
from tests.hf.folders import write
from tests.tasks import folder, records, write_lines

CONFIGS = sorted((HOME / "configs").glob("*.yaml"))
NAMES = [path.name for path in CONFIGS]


BOOKS = {"quickstart", "pg19", "pg19-mini", "enwik8", "transformer-xl-wt103", "long-to-memory"}
PRETRAINING = {"longformer-mlm", "bigbird-mlm", "reformer-clm", "distilbert", "tinybert-general"}
DRAWN = {"recall"}
TASKS = {"movie-reviews": "classification", "conll2000": "tagging", "rte": "matching", "squad2": "questions"}
BODIES = {*TASKS, "tinybert-task"}
"""Of tasks, whose model is a body and a head; what needs a teacher is trained in test_distil."""


def settings(part: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the module or the data, whether the config names their class or not."""
    found: dict[str, Any] = part["init_args"] if "class_path" in part else part
    return found


def test_there_are_configs() -> None:
    assert {path.removesuffix(".yaml") for path in NAMES} >= BOOKS | PRETRAINING | BODIES | DRAWN | {"summaries"}


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
    assert {"seed_everything", "run_dir", "data", "model", "trainer"} <= set(content)
    assert content["run_dir"] == f"runs/{path.stem}"
    # Data that must be fetched first is never a guess.
    root = "embedded" if path.stem in DRAWN else settings(content["data"])["root"]
    assert root in (None, "embedded")
    assert ("--data.root PATH" in head) == (root is None)


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_the_parser_takes_it_and_the_model_has_the_size_it_claims(program: Program, tmp_path: Path, path: Path) -> None:
    # Without the data its own message; the config itself is whole.
    texts = () if path.stem in DRAWN else ("--data.root", "embedded")
    done = program("fit", "--config", str(path), *texts, "--print_config", at=tmp_path)
    assert done.code == 0, done.err
    content: dict[str, Any] = yaml.safe_load(done.out)
    tokenizer = settings(content["data"]).get("tokenizer") or {}
    vocabulary = (tokenizer.get("init_args") or {}).get("vocab_size", ByteTokenizer().vocab_size)
    if path.stem in DRAWN:
        vocabulary = AssociativeRecall(**settings(content["data"])["task"]["init_args"]).vocab_size
    own = settings(content["model"])
    whole = own.get("model")
    if whole is not None and "path" in whole["init_args"]:
        # Of a model that the user has: a test of its own.
        assert whole["init_args"]["path"] is None
        return
    # On the meta device: shapes without memory.
    with torch.device("meta"):
        # A head's size goes by the labels, and is nothing beside a body's; a mask is one more token.
        if path.stem in PRETRAINING and "mask_id" in own:
            vocabulary += 1
        model = class_config.from_config(own["backbone" if path.stem in BODIES else "model"])(vocab_size=vocabulary)
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
        f"see the first lines of '{HOME / 'configs' / name}'",
        "google-deepmind/pg19",
        "train/ validation/ test/",
        "<id>.txt",
        "--data.root PATH",
    ):
        assert part in done.err
    assert not list(tmp_path.iterdir())


def published(at: Path) -> tuple[Path, Path]:
    """Write a published folder and a text; return both."""
    tokenizer = BytePairTokenizer(vocab_size=300)
    tokenizer.train(["some words, and some other words. " * 50])
    config = {**plain.LLAMA, "vocab_size": 320, "hidden_size": 24, "max_position_embeddings": 64}
    folder = write(at / "model", config, plain.llama(config))
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_json())["model"]))
    text = at / "text.txt"
    text.write_text("some words, and some other words. " * 20)
    return folder, text


def retrofitting(folder: Path, at: Path) -> list[str]:
    """Return the command that takes two steps with a folder's model."""
    return [
        "fit", "--config", str(HOME / "configs" / "retrofit.yaml"), "--data.root", "embedded",
        "--data.cache_dir", str(at / "cache"), "--model.model.init_args.path", str(folder),
        "--data.tokenizer.init_args.path", str(folder / "tokenizer.json"), "--data.segment_length=32",
        "--trainer.log_every_n_steps=1",
        "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2",
        "--trainer.num_sanity_val_steps=0",
    ]  # fmt: skip


def test_a_published_folder_is_retrofitted_read_and_measured(program: Program, tmp_path: Path) -> None:
    folder, text = published(tmp_path)
    # As it is: a window, and nothing beyond it.
    session = str(tmp_path / "session")
    done = program("read", str(text), "--checkpoint", str(folder), "--session", session, at=tmp_path)
    assert done.code == 0, done.err
    done = program("generate", "--checkpoint", str(folder), "--session", session, "--max-tokens", "8", at=tmp_path)
    assert done.code == 0, done.err
    config_file = str(HOME / "configs" / "retrofit.yaml")
    done = program("fit", "--config", config_file, "--data.root", "embedded", at=tmp_path)
    assert done.code == 2
    assert "--model.model.init_args.path FOLDER" in done.err
    own = "--model.distillation=memtx.training.distillation.SelfDistillation"
    done = program(*retrofitting(folder, tmp_path), own, at=tmp_path)
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "retrofit"
    assert "train_soft_targets" in (run / "metrics.csv").read_text()
    before, after = (MemoryTransformer.from_pretrained(place) for place in (folder, find_checkpoint(run)))
    kept = after.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.state_dict().items())
    # The run needs the folder no more.
    shutil.rmtree(folder)
    done = program("read", str(text), "--checkpoint", str(run), at=tmp_path)
    assert done.code == 0, done.err


def test_a_published_folder_is_adapted_too(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra 'retrofit' is not installed")
    folder, text = published(tmp_path)
    asked = retrofitting(folder, tmp_path)
    done = program(*asked, "--model.lora.target_modules=[attention.kye_value]", at=tmp_path)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "Did you mean 'attention.key_value'?" in done.err
    asked += ["--model.lora.rank=4", "--model.lora.dropout=0.1"]
    done = program(*asked, at=tmp_path)
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "retrofit"
    before, after = (MemoryTransformer.from_pretrained(place).state_dict() for place in (folder, find_checkpoint(run)))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (".query." not in name and ".key_value." not in name), name
    done = program(*asked, "--ckpt_path=last", "--trainer.max_steps=3", at=tmp_path)
    assert done.code == 0, done.err
    done = program("test", "--run_dir", str(run), "--trainer.limit_test_batches=2", at=tmp_path)
    assert done.code == 0, done.err
    shutil.rmtree(folder)
    session = str(tmp_path / "session")
    done = program("read", str(text), "--checkpoint", str(run), "--session", session, at=tmp_path)
    assert done.code == 0, done.err
    done = program("generate", "--checkpoint", str(run), "--session", session, "--max-tokens", "8", at=tmp_path)
    assert done.code == 0, done.err
    few = ["--distances", "1k", "--num-samples", "1", "--num-depths", "2"]
    done = program("evaluate", "--checkpoint", str(run), "--task", "needle", *few, at=tmp_path)
    assert done.code == 0, done.err


def test_the_quickstart_takes_a_step(program: Program, tmp_path: Path) -> None:
    done = program(
        "fit", "--config", str(HOME / "configs" / "quickstart.yaml"), "--data.cache_dir", str(tmp_path / "cache"),
        "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2",
        "--trainer.num_sanity_val_steps=0", at=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (tmp_path / "runs" / "quickstart" / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "runs" / "quickstart" / "metrics.csv").is_file()


SHRUNKEN = {
    "transformer-xl-wt103": [
        "--data.batch_size=2", "--data.segment_length=16", "--data.tokenizer.init_args.vocab_size=300",
        "--model.model.init_args.dim=20", "--model.model.init_args.depth=2", "--model.model.init_args.heads=2",
        "--model.model.init_args.head_dim=10", "--model.model.init_args.hidden_dim=40",
        "--model.model.init_args.memory_length=16", "--model.model.init_args.cutoffs=[100,200]",
    ],
    "reformer-clm": [
        "--data.segment_length=64", "--model.model.init_args.dim=16", "--model.model.init_args.heads=2",
        """--model.model.init_args.attentions=[
            {"class_path": "memtx.layers.reformer.LocalAttention", "init_args": {"chunk_length": 16}},
            {"class_path": "memtx.layers.reformer.LSHAttention",
             "init_args": {"chunk_length": 16, "num_hashes": 2}}]""",
        "--model.model.init_args.positions.init_args.shape=[8,8]",
        "--model.model.init_args.positions.init_args.axis_dims=[8,8]",
        "--model.model.init_args.feed_forward_chunk_size=16",
    ],
    "longformer-mlm": [
        "--model.model.init_args.attentions=[{class_path: memtx.layers.longformer.LongformerAttention, "
        "init_args: {window: 8}}]",
    ],
    "bigbird-mlm": [
        "--model.model.init_args.attentions=[{class_path: memtx.layers.bigbird.BigBirdAttention, "
        "init_args: {block_size: 4, num_random_blocks: 1, max_length: 64}}]",
    ],
}  # fmt: skip
ENCODERS = [
    "--data.batch_size=2", "--data.segment_length=64", "--data.tokenizer.init_args.vocab_size=300",
    "--model.model.init_args.dim=16", "--model.model.init_args.depth=2", "--model.model.init_args.heads=2",
    "--model.model.init_args.hidden_dim=32", "--model.model.init_args.embeddings.init_args.num_positions=64",
    "--trainer.precision=32-true",
]  # fmt: skip


@pytest.mark.parametrize("name", SHRUNKEN)
def test_a_shrunken_one_trains(program: Program, tmp_path: Path, name: str) -> None:
    options = SHRUNKEN[name] + (ENCODERS if name.endswith("-mlm") else [])
    done = program(
        "fit", "--config", str(HOME / "configs" / f"{name}.yaml"), "--data.root", "embedded", "--data.cache_dir",
        str(tmp_path / "cache"), "--data.num_workers=1", *options, "--trainer.max_steps=2",
        "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2", "--trainer.accumulate_grad_batches=1",
        "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", at=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    run = tmp_path / "runs" / name
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert "val_loss" in (run / "metrics.csv").read_text().partition("\n")[0]
    measured = program("test", "--run_dir", str(run), "--trainer.limit_test_batches=2", at=tmp_path)
    assert measured.code == 0, measured.err
    assert "test_loss" in measured.out


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_run_is_all_that_prediction_needs(program: Program, tmp_path: Path, name: str) -> None:
    kind = TASKS[name]
    root = folder(tmp_path / "data", kind, 8)
    done = program(
        "fit", "--config", str(HOME / "configs" / f"{name}.yaml"), "--data.root", str(root), "--trainer.max_steps=2",
        "--trainer.max_epochs=-1", "--model.backbone.init_args.dim=16", "--model.backbone.init_args.depth=1",
        "--model.backbone.init_args.heads=2", "--trainer.accelerator=cpu", at=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    run = str(tmp_path / "runs" / name)
    measured = program("test", "--run_dir", run, at=tmp_path)
    assert measured.code == 0, measured.err
    shutil.rmtree(root)
    given = records(kind, 3)
    write_lines(tmp_path / "in.jsonl", given)
    said = program("predict", "--checkpoint", run, "--input", "in.jsonl", at=tmp_path)
    assert said.code == 0, said.err
    lines = [json.loads(line) for line in said.out.splitlines()]
    wanted = {"classification": "label", "matching": "label", "tagging": "spans", "questions": "answer"}[kind]
    assert len(lines) == 3
    assert all(wanted in line for line in lines)


@pytest.mark.parametrize("name", [*sorted(BODIES), "summaries"])
def test_a_task_without_its_data_says_where_to_get_them(program: Program, tmp_path: Path, name: str) -> None:
    done = program("fit", "--config", str(HOME / "configs" / f"{name}.yaml"), at=tmp_path)
    assert done.code == 2
    assert done.err.count("\n") == 1
    for part in ("data.root", f"see the first lines of '{HOME / 'configs' / name}.yaml'", "train.jsonl"):
        assert part in done.err
    assert not list(tmp_path.iterdir())

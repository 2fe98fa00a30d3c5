"""Every shipped config is complete, commented and short, and its model has the size in its comments."""

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
BOOKS = {"quickstart", "pg19", "pg19-mini", "enwik8", "enwik8-copy", "long-to-memory"}
BOOKS |= {"longformer-lm-enwik8", "longformer-lm-text8"}
BOOKS |= {"memformer"}
TRANSFORMER_XL = {"wt103", "wt103-large", "enwik8", "enwik8-24", "text8"}
PRETRAINING = {"longformer-mlm", "bigbird-mlm", "reformer-clm", "distilbert"}
PRETRAINING |= {"tinybert-general", "tinybert-general-long", "xlnet", "span-corruption"}
SYNTHETIC = {"recall"}
SERIES = {"series"}
TASKS = {"movie-reviews": "classification", "conll2000": "tagging", "rte": "matching", "squad2": "questions"}
TASKS |= {"multiple-choice": "multiple_choice", "multi-label": "multi_label"}
TASKS |= {name: name for name in ("retrieval", "dialogue")}
SUMMARIES = {"summaries", "led-summaries", "dialogue-replies"}
BACKBONES = {*TASKS, "tinybert-task"}
"""Configs of tasks, whose model is a backbone with a head; those with a teacher are trained in test_distil."""


def settings(part: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the module or the data, with or without a class path."""
    options: dict[str, Any] = part["init_args"] if "class_path" in part else part
    return options


def test_all_configs_exist() -> None:
    books = BOOKS | {f"transformer-xl-{name}" for name in TRANSFORMER_XL}
    known = books | PRETRAINING | BACKBONES | SYNTHETIC | SUMMARIES | SERIES
    assert {path.removesuffix(".yaml") for path in NAMES} >= known


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_a_config_is_complete_and_commented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    assert text.count("\n") < 100
    assert all(len(line) <= 120 for line in text.splitlines())
    # A description and the command come before the first key.
    head = text.partition("seed_everything")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"memtx fit --config configs/{path.name}" in head
    assert {"seed_everything", "run_dir", "data", "model", "trainer"} <= set(content)
    assert content["run_dir"] == f"runs/{path.stem}"
    # A config whose data must be downloaded names no folder.
    root = "embedded" if path.stem in SYNTHETIC else settings(content["data"])["root"]
    assert root in (None, "embedded")
    assert ("--data.root PATH" in head) == (root is None)


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_the_parser_accepts_it_and_the_model_has_the_claimed_size(program: Program, tmp_path: Path, path: Path) -> None:
    # Without data there is an error; the config itself is complete.
    texts = () if path.stem in SYNTHETIC else ("--data.root", "embedded")
    result = program("fit", "--config", str(path), *texts, "--print_config", cwd=tmp_path)
    assert result.code == 0, result.err
    content: dict[str, Any] = yaml.safe_load(result.out)
    tokenizer = settings(content["data"]).get("tokenizer") or {}
    # A tokenizer without a size is a published one, of BERT.
    default = 30522 if "HFTokenizer" in tokenizer.get("class_path", "") else ByteTokenizer().vocab_size
    vocabulary = (tokenizer.get("init_args") or {}).get("vocab_size", default)
    if path.stem in SYNTHETIC:
        vocabulary = AssociativeRecall(**settings(content["data"])["task"]["init_args"]).vocab_size
    module = settings(content["model"])
    model_config = module.get("model")
    if model_config is not None and "path" in model_config["init_args"]:
        # The user's own model has a test of its own.
        assert model_config["init_args"]["path"] is None
        return
    # On the meta device: shapes without memory.
    with torch.device("meta"):
        # The size of a head depends on the labels and is negligible; a mask is one more token.
        if path.stem in PRETRAINING and "mask_id" in module:
            vocabulary += 1
        sizes = {"input_dim": 1, "output_dim": 1} if path.stem in SERIES else {"vocab_size": vocabulary}
        model = class_config.from_config(module["backbone" if path.stem in BACKBONES else "model"])(**sizes)
    count = sum(weight.numel() for weight in model.parameters())
    claimed = re.search(r"about ([\d.]+) M parameters", path.read_text(), re.IGNORECASE)
    assert claimed is not None
    # The comments give about two digits.
    assert count / 1e6 == pytest.approx(float(claimed[1]), rel=0.02)


@pytest.mark.parametrize("name", ["pg19.yaml", "enwik8.yaml", "enwik8-copy.yaml", "pg19-mini.yaml"])
def test_without_data_the_error_says_where_to_get_it(program: Program, tmp_path: Path, name: str) -> None:
    result = program("fit", "--config", str(HOME / "configs" / name), cwd=tmp_path)
    assert result.code == 2
    assert result.err.count("\n") == 1
    for part in (
        "data.root",
        f"see the first lines of '{HOME / 'configs' / name}'",
        "google-deepmind/pg19",
        "train/ validation/ test/",
        "<id>.txt",
        "--data.root PATH",
    ):
        assert part in result.err
    assert not list(tmp_path.iterdir())


def test_windows_by_depth_are_one_setting(program: Program, tmp_path: Path) -> None:
    compressed = "{class_path: memtx.CompressedMemory, init_args: {num_entries: 4, entry_bias: -3.0}}"
    result = program(
        "fit", "--config", str(HOME / "configs" / "quickstart.yaml"), "--run_dir", "run", "--trainer.max_steps=1",
        "--trainer.limit_val_batches=1", "--data.cache_dir", "cache", "--model.model.init_args.dim=16",
        "--model.model.init_args.depth=3", "--model.model.init_args.heads=2", "--model.model.init_args.memories="
        "{class_path: memtx.GrowingWindows, init_args: {window: 16, min_window: 4, memories: [" + compressed + "]}}",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.code == 0, result.err
    (path,) = (tmp_path / "run" / "checkpoints").glob("last.ckpt")
    model = MemoryTransformer.from_pretrained(str(path))
    memories = [block.attention.memory for block in model.blocks]
    assert [(type(memory).__name__, memory.window) for memory in memories] == [
        ("RecurrentMemory", 4), ("RecurrentMemory", 8), ("CompressedMemory", 16)
    ]  # fmt: skip


def write_published(folder_parent: Path) -> tuple[Path, Path]:
    """Write a Hugging Face folder and a text; return both."""
    tokenizer = BytePairTokenizer(vocab_size=300)
    tokenizer.train(["some words, and some other words. " * 50])
    config = {**plain.LLAMA, "vocab_size": 320, "hidden_size": 24, "max_position_embeddings": 512}
    folder = write(folder_parent / "model", config, plain.llama(config))
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_json())["model"]))
    text = folder_parent / "text.txt"
    text.write_text("some words, and some other words. " * 120)
    return folder, text


def retrofit_command(folder: Path, workdir: Path) -> list[str]:
    """Return the command that trains the model of a folder for two steps."""
    return [
        "fit", "--config", str(HOME / "configs" / "retrofit.yaml"), "--data.root", "embedded",
        "--data.cache_dir", str(workdir / "cache"), "--model.model.init_args.path", str(folder),
        "--data.tokenizer.init_args.path", str(folder / "tokenizer.json"), "--data.segment_length=32",
        "--trainer.log_every_n_steps=1",
        "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2",
        "--trainer.num_sanity_val_steps=0",
    ]  # fmt: skip


def test_a_published_folder_is_retrofitted_read_and_evaluated(program: Program, tmp_path: Path) -> None:
    folder, text = write_published(tmp_path)
    # The folder's own model: a window without memory.
    session = str(tmp_path / "session")
    result = program("read", str(text), "--checkpoint", str(folder), "--session", session, cwd=tmp_path)
    assert result.code == 0, result.err
    result = program("generate", "--checkpoint", str(folder), "--session", session, "--max-tokens", "8", cwd=tmp_path)
    assert result.code == 0, result.err
    config_file = str(HOME / "configs" / "retrofit.yaml")
    result = program("fit", "--config", config_file, "--data.root", "embedded", cwd=tmp_path)
    assert result.code == 2
    assert "--model.model.init_args.path FOLDER" in result.err
    distillation = "--model.distillation=memtx.training.distillation.SelfDistillation"
    result = program(*retrofit_command(folder, tmp_path), distillation, cwd=tmp_path)
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "retrofit"
    assert "train_soft_targets" in (run / "metrics.csv").read_text()
    before, after = (MemoryTransformer.from_pretrained(path) for path in (folder, find_checkpoint(run)))
    weights = after.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in before.state_dict().items())
    # The run no longer needs the folder.
    shutil.rmtree(folder)
    result = program("read", str(text), "--checkpoint", str(run), cwd=tmp_path)
    assert result.code == 0, result.err


def test_a_published_folder_is_trained_with_lora(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra 'retrofit' is not installed")
    folder, text = write_published(tmp_path)
    command = retrofit_command(folder, tmp_path)
    result = program(*command, "--model.lora.target_modules=[attention.kye_value]", cwd=tmp_path)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "Did you mean 'attention.key_value'?" in result.err
    command += ["--model.lora.rank=4", "--model.lora.dropout=0.1"]
    result = program(*command, cwd=tmp_path)
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "retrofit"
    before, after = (MemoryTransformer.from_pretrained(path).state_dict() for path in (folder, find_checkpoint(run)))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (".query." not in name and ".key_value." not in name), name
    result = program(*command, "--ckpt_path=last", "--trainer.max_steps=3", cwd=tmp_path)
    assert result.code == 0, result.err
    result = program("test", "--run_dir", str(run), "--trainer.limit_test_batches=2", cwd=tmp_path)
    assert result.code == 0, result.err
    shutil.rmtree(folder)
    session = str(tmp_path / "session")
    result = program("read", str(text), "--checkpoint", str(run), "--session", session, cwd=tmp_path)
    assert result.code == 0, result.err
    result = program("generate", "--checkpoint", str(run), "--session", session, "--max-tokens", "8", cwd=tmp_path)
    assert result.code == 0, result.err
    few = ["--distances", "1k", "--num-samples", "1", "--num-depths", "2"]
    result = program("evaluate", "--checkpoint", str(run), "--task", "needle", *few, cwd=tmp_path)
    assert result.code == 0, result.err


def test_the_quickstart_trains(program: Program, tmp_path: Path) -> None:
    result = program(
        "fit", "--config", str(HOME / "configs" / "quickstart.yaml"), "--data.cache_dir", str(tmp_path / "cache"),
        "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2",
        "--trainer.num_sanity_val_steps=0", cwd=tmp_path,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert (tmp_path / "runs" / "quickstart" / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "runs" / "quickstart" / "metrics.csv").is_file()


SMALL_OPTIONS = {
    "memformer": [
        "--data.batch_size=2", "--data.segment_length=8", "--data.tokenizer.init_args.vocab_size=300",
        "--model.model.init_args.dim=16", "--model.model.init_args.encoder_depth=1",
        "--model.model.init_args.decoder_depth=1", "--model.model.init_args.heads=2",
        "--model.model.init_args.hidden_dim=32", "--model.model.init_args.num_slots=4",
        "--model.model.init_args.segment_length=8", "--model.model.init_args.cutoffs=[100,200]",
    ],
    "xlnet": [
        "--data.batch_size=2", "--data.segment_length=16", "--data.tokenizer.init_args.vocab_size=300",
        "--model.num_targets=5", "--model.model.init_args.dim=16", "--model.model.init_args.depth=2",
        "--model.model.init_args.heads=2", "--model.model.init_args.memory_length=20",
        "--model.model.init_args.reuse_length=16", "--trainer.precision=32-true", "--trainer.devices=1",
    ],
    "transformer-xl-wt103": [
        "--data.batch_size=2", "--data.segment_length=16", "--data.tokenizer.init_args.vocab_size=300",
        "--model.model.init_args.dim=20", "--model.model.init_args.depth=2", "--model.model.init_args.heads=2",
        "--model.model.init_args.head_dim=10", "--model.model.init_args.hidden_dim=40",
        "--model.model.init_args.memory_length=16", "--model.model.init_args.cutoffs=[100,200]",
    ],
    "longformer-lm-text8": [
        "--data.batch_size=2", "--data.segment_length=16", "--data.eval_batch_size=2",
        "--model.model.init_args.dim=16", "--model.model.init_args.depth=2", "--model.model.init_args.heads=2",
        "--model.model.init_args.memories.init_args.window=[2,4]",
        "--model.model.init_args.memories.init_args.dilations=[1,[2]]",
        """--trainer.callbacks=[{"class_path": "memtx.training.callbacks.staged_training.StagedTraining",
            "init_args": {"steps": [1, 1], "batch_sizes": [2, 1]}}]""",
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


@pytest.mark.parametrize("name", SMALL_OPTIONS)
def test_a_small_model_of_the_config_trains(program: Program, tmp_path: Path, name: str) -> None:
    options = SMALL_OPTIONS[name] + (ENCODERS if name.endswith("-mlm") else [])
    result = program(
        "fit", "--config", str(HOME / "configs" / f"{name}.yaml"), "--data.root", "embedded", "--data.cache_dir",
        str(tmp_path / "cache"), "--data.num_workers=1", *options, "--trainer.max_steps=2",
        "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2", "--trainer.accumulate_grad_batches=1",
        "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", cwd=tmp_path,
    )  # fmt: skip
    assert result.code == 0, result.err
    run = tmp_path / "runs" / name
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert "val_loss" in (run / "metrics.csv").read_text().partition("\n")[0]
    result = program("test", "--run_dir", str(run), "--trainer.limit_test_batches=2", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "test_loss" in result.out
    if name == "transformer-xl-wt103":
        (tmp_path / "text.txt").write_text("It was a bright cold day in April.")
        arguments = ["--checkpoint", str(run), "--session", str(tmp_path / "session")]
        for command in (["read", "text.txt", *arguments], ["generate", *arguments, "--max-tokens", "8"]):
            result = program(*command, cwd=tmp_path)
            assert result.code == 0, result.err


@pytest.mark.parametrize("name", TASKS)
def test_prediction_needs_only_the_run_of_a_task(program: Program, tmp_path: Path, name: str) -> None:
    kind = TASKS[name]
    root = folder(tmp_path / "data", kind, 24)
    result = program(
        "fit", "--config", str(HOME / "configs" / f"{name}.yaml"), "--data.root", str(root), "--trainer.max_steps=2",
        "--trainer.max_epochs=-1", "--model.backbone.init_args.dim=16", "--model.backbone.init_args.depth=1",
        "--model.backbone.init_args.heads=2", "--trainer.accelerator=cpu", cwd=tmp_path,
    )  # fmt: skip
    assert result.code == 0, result.err
    run = str(tmp_path / "runs" / name)
    result = program("test", "--run_dir", run, cwd=tmp_path)
    assert result.code == 0, result.err
    shutil.rmtree(root)
    write_lines(tmp_path / "in.jsonl", records(kind, 3))
    result = program("predict", "--checkpoint", run, "--input", "in.jsonl", cwd=tmp_path)
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in result.out.splitlines()]
    keys = {"tagging": "spans", "questions": "answer", "multi_label": "labels", "multiple_choice": "choice"}
    key = {**keys, "retrieval": "best"}.get(kind, "label")
    assert len(lines) == 3
    assert all(key in line for line in lines)


@pytest.mark.parametrize("name", [*sorted(BACKBONES), *sorted(SUMMARIES)])
def test_without_examples_the_error_says_where_to_get_them(program: Program, tmp_path: Path, name: str) -> None:
    result = program("fit", "--config", str(HOME / "configs" / f"{name}.yaml"), cwd=tmp_path)
    assert result.code == 2
    assert result.err.count("\n") == 1
    for part in ("data.root", f"see the first lines of '{HOME / 'configs' / name}.yaml'", "train.jsonl"):
        assert part in result.err
    assert not list(tmp_path.iterdir())

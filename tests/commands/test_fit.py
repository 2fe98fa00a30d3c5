"""Files of fit, validate, test and predict, and runs repeated and resumed from them."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from memtx import files
from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.cli.config import add_run_config
from memtx.training.callbacks import predictions
from tests.commands.program import HOME, Done, Program
from tests.commands.runs import CONFIG, changed, write, write_books

USER_MEMORY = '''
from __future__ import annotations

import torch
from memtx.memory.none import NoMemory


class UserMemory(NoMemory):
    """A memory of the user: no state, one weight."""

    def __init__(self, dim: int, strength: float = 1.0) -> None:
        super().__init__(dim)
        self.strength = torch.nn.Parameter(torch.full((1,), strength))
'''


def succeeded(result: Done) -> Done:
    assert result.code == 0, result.err
    return result


def read_metrics(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> list[tuple[str, str]]:
    return [(line["step"], line["train_loss"]) for line in read_metrics(run / "metrics.csv") if line.get("train_loss")]


def table(result: Done) -> dict[str, float]:
    """Return the figures that an evaluation prints."""
    cells = [line.replace("│", " ").split() for line in result.out.splitlines() if line.startswith("│")]
    return {name: float(value) for name, value in cells}


@pytest.fixture(scope="module")
def workdir(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with books, c.yaml and a finished run; no test changes these."""
    path = tmp_path_factory.mktemp("workdir")
    write_books(path / "books")
    write(path)
    succeeded(program("fit", "--config", "c.yaml", cwd=path))
    return path


def test_a_run_is_one_folder(workdir: Path) -> None:
    run = workdir / "run"
    assert (run / "config.yaml").is_file()
    assert list(run.glob("events.out.tfevents.*"))
    assert (run / "checkpoints" / "last.ckpt").is_file()
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert (run / "checkpoints" / best["path"]).is_file()
    scores = [
        float(line["val_bits_per_byte"]) for line in read_metrics(run / "metrics.csv") if line["val_bits_per_byte"]
    ]
    assert len(scores) == 2
    assert best["score"] == min(scores)
    assert [int(step) for step, _ in losses(run)] == [0, 1, 2, 3]
    assert not list(workdir.glob("lightning_logs"))


def test_the_saved_config_gives_the_same_run(program: Program, workdir: Path) -> None:
    succeeded(program("fit", "--config", "run/config.yaml", "--run_dir", "again", cwd=workdir))
    assert losses(workdir / "again") == losses(workdir / "run")
    # As text: the configs differ in the folder only.
    first, second = ((workdir / run / "config.yaml").read_text() for run in ("run", "again"))
    assert first == second.replace("run_dir: again", "run_dir: run")


def test_print_config_is_complete(program: Program, workdir: Path) -> None:
    printed = succeeded(program("fit", "--config", "c.yaml", "--print_config", cwd=workdir)).out
    content = yaml.safe_load(printed)
    for section, settings in CONFIG.items():
        if isinstance(settings, dict):
            assert set(settings) <= set(content[section])
    memory = content["model"]["model"]["init_args"]["memories"][0]
    assert memory["init_args"].keys() >= {"window", "compression_rate", "num_entries", "compression", "reconstruction"}
    (workdir / "printed.yaml").write_text(printed)
    assert succeeded(program("fit", "--config", "printed.yaml", "--print_config", cwd=workdir)).out == printed


def test_resuming_keeps_the_logs(program: Program, workdir: Path) -> None:
    fit = ("fit", "--config", "c.yaml", "--ckpt_path", "last", "--run_dir")
    succeeded(program(*fit, "short", "--trainer.max_steps=2", cwd=workdir))
    # As after a kill: the log has a step that is in no checkpoint.
    with (workdir / "short" / "metrics.csv").open("a") as file:
        csv.DictWriter(file, read_metrics(workdir / "run" / "metrics.csv")[0]).writerow({"step": 2, "train_loss": 99.0})
    succeeded(program(*fit, "short", cwd=workdir))
    assert losses(workdir / "short") == losses(workdir / "run")
    validated = [line["step"] for line in read_metrics(workdir / "short" / "metrics.csv") if line.get("val_loss")]
    assert validated == [line["step"] for line in read_metrics(workdir / "run" / "metrics.csv") if line.get("val_loss")]
    # The saved config has no checkpoint, so that it starts the same run.
    assert yaml.safe_load((workdir / "short" / "config.yaml").read_text())["ckpt_path"] is None


def test_a_run_is_evaluated_without_its_config(program: Program, workdir: Path) -> None:
    before = {path: path.read_bytes() for path in (workdir / "run").rglob("*") if path.is_file()}
    validation = table(succeeded(program("validate", "--run_dir", "run", cwd=workdir)))
    best = json.loads((workdir / "run" / "checkpoints" / "best.json").read_text())
    # The same checkpoint on the same texts, printed in full precision.
    assert validation["val_bits_per_byte"] == pytest.approx(best["score"], abs=1e-6)
    names = {name for name in validation if "memory_gain" not in name}
    # The word perplexity of a model that has not learned words is left out.
    assert names == {"val_bits_per_byte", "val_bits_per_character", "val_loss", "val_perplexity"}
    for checkpoint in ("run", "run/checkpoints", "best"):
        result = succeeded(program("validate", "--config", "c.yaml", "--ckpt_path", checkpoint, cwd=workdir))
        assert table(result) == validation
    test = table(succeeded(program("test", "--ckpt_path", "run/checkpoints/last.ckpt", cwd=workdir)))
    assert test == table(succeeded(program("test", "--run_dir=run", "--ckpt_path=last", cwd=workdir)))
    assert test.keys() == {"test_bits_per_byte", "test_bits_per_character", "test_loss", "test_perplexity"}
    after = {path: path.read_bytes() for path in (workdir / "run").rglob("*") if path.is_file()}
    assert after == before


def test_predictions_cover_every_document_and_token(program: Program, workdir: Path) -> None:
    for target in ("predict-a", "predict-b"):
        (workdir / target).mkdir()
    base = ("predict", "--config", "c.yaml", "--ckpt_path", "run")
    result = succeeded(program(*base, "--run_dir", "predict-a", cwd=workdir))
    assert "predict-a/predictions" in result.out
    lines = (workdir / "predict-a" / "predictions" / predictions.DOCUMENTS_FILE).read_text().splitlines()
    documents: dict[str, dict[str, Any]] = {line["id"]: line for line in map(json.loads, lines)}
    assert sorted(documents) == ["0", "1", "2"]
    surprisal, _ = files.load_tensors(
        workdir / "predict-a" / "predictions" / predictions.SURPRISAL_FILE,
        kind=predictions.FILE_KIND,
        version=predictions.FORMAT_VERSION,
    )
    model, tokenizer = load_model_and_tokenizer(workdir / "run")
    for name, facts in documents.items():
        content = (workdir / "books" / "test" / f"{name}.txt").read_bytes()
        assert (facts["bytes"], facts["tokens"]) == (len(content), len(content))
        assert facts["words"] == len(content.decode().split())
        # Read alone, in one call: batch and segments change the rounding only.
        tokens = torch.tensor([[tokenizer.bos_token_id, *content]])
        with torch.no_grad():
            nll = model(tokens[:, :-1], labels=tokens[:, 1:]).nll[0]
        torch.testing.assert_close(surprisal[name], nll, atol=1e-4, rtol=1e-4)  # float32, other segments
        assert facts["nll"] == pytest.approx(float(nll.double().sum()), rel=1e-5)
        assert facts["bits_per_byte"] == pytest.approx(facts["nll"] / math.log(2) / len(content))
    total = sum(facts["nll"] for facts in documents.values())
    test = table(succeeded(program("test", "--run_dir", "run", cwd=workdir)))
    size = sum(facts["bytes"] for facts in documents.values())
    assert total / math.log(2) / size == pytest.approx(test["test_bits_per_byte"], rel=1e-5)
    # The text of a truncated document was not scored completely.
    succeeded(program(*base, "--run_dir", "predict-b", "--trainer.limit_predict_batches=2", cwd=workdir))
    lines = (workdir / "predict-b" / "predictions" / predictions.DOCUMENTS_FILE).read_text().splitlines()
    assert {json.loads(line)["bits_per_byte"] for line in lines} == {None}
    assert {json.loads(line)["tokens"] for line in lines} == {32}


def test_other_texts_are_read_with_the_checkpoints_tokenizer(program: Program, workdir: Path) -> None:
    trained = changed(
        ("data", "tokenizer"),
        {"class_path": "memtx.data.tokenizers.BytePairTokenizer", "init_args": {"vocab_size": 270}},
    )
    write(workdir, trained, "pairs.yaml")
    succeeded(program("fit", "--config", "pairs.yaml", "--run_dir", "pairs", cwd=workdir))
    # Test texts only: none to train a tokenizer on.
    write_books(workdir / "other", ("test",))
    own_texts = table(succeeded(program("test", "--run_dir", "pairs", cwd=workdir)))
    other_texts = table(succeeded(program("test", "--run_dir", "pairs", "--data.root", "other", cwd=workdir)))
    assert own_texts == other_texts


def test_a_run_uses_a_memory_class_of_the_user(program: Program, workdir: Path) -> None:
    (workdir / "user_memory.py").write_text(USER_MEMORY)
    config = changed(
        ("model", "model", "init_args", "memories"),
        [{"class_path": "user_memory.UserMemory", "init_args": {"strength": 2.5}}],
    )
    write(workdir, config, "own.yaml")
    succeeded(program("fit", "--config", "own.yaml", "--run_dir", "own", cwd=workdir))
    assert table(succeeded(program("test", "--run_dir", "own", cwd=workdir))).keys() >= {"test_loss"}
    book = str(workdir / "books" / "test" / "0.txt")
    result = program("read", book, "--checkpoint", "own", cwd=workdir)
    assert result.code == 2
    assert "user_memory.UserMemory" in result.err
    assert "--import" in result.err
    read = succeeded(program("read", book, "--checkpoint", "own", "--import", "user_memory", "--json", cwd=workdir))
    assert json.loads(read.out)["tokens"] == len(Path(book).read_bytes())
    assert (
        "no_such_module" in program("read", book, "--checkpoint", "own", "--import", "no_such_module", cwd=workdir).err
    )


SLOW = """
from lightning.pytorch import Callback

from memtx.ops.cpu import cpu_info

cpu_info.is_cpu_bf16_fast = lambda: False


class PrintPrecision(Callback):
    def on_train_start(self, trainer, pl_module):
        print("trains in", trainer.precision)
"""


def test_float32_replaces_a_slow_bfloat16(program: Program, workdir: Path) -> None:
    (workdir / "slow.py").write_text(SLOW)
    config = changed(("trainer", "callbacks"), [{"class_path": "slow.PrintPrecision"}])
    config["trainer"]["precision"] = "bf16-mixed"
    write(workdir, config)
    result = program("fit", "--config", "c.yaml", "--run_dir", "slow", cwd=workdir)
    assert result.code == 0, result.err
    assert "trains in 32-true" in result.out
    assert result.err.count("slower in bfloat16: using 32-true instead of bf16-mixed") == 1
    # The saved config keeps the precision for other machines.
    assert yaml.safe_load((workdir / "slow" / "config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.slow
def test_two_processes_train_one_run(workdir: Path) -> None:
    # The second process is started by the first with the same arguments, so this needs the program itself.
    command = [sys.executable, "-m", "memtx", "fit", "--config", "c.yaml", "--run_dir", "ddp"]
    environment = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [
            *command, "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=2",
            "--data.eval_batch_size=1",
        ],
        cwd=workdir, env=environment, check=True, capture_output=True, timeout=280,
    )  # fmt: skip
    assert (workdir / "ddp" / "checkpoints" / "last.ckpt").is_file()
    assert [int(step) for step, _ in losses(workdir / "ddp")] == [0, 1]


def test_lightning_is_the_same_program(workdir: Path) -> None:
    scripts = Path(sys.executable).parent
    if not (scripts / "lightning").exists():
        pytest.skip("memtx is not installed here, only importable")
    for script in ("lightning", "memtx"):
        body = (scripts / script).read_text()
        assert "from memtx.cli.main import main" in body
    help_texts = [
        subprocess.run([scripts / script, "--help"], capture_output=True, text=True, cwd=HOME, check=True).stdout
        for script in ("lightning", "memtx")
    ]
    assert help_texts[0].replace("lightning", "memtx") == help_texts[1]


def test_the_config_of_a_run_is_found(tmp_path: Path) -> None:
    run = tmp_path / "r"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    config = ["--config", str(run / "config.yaml")]
    assert add_run_config(["test", "--run_dir", str(run)]) == ["test", *config, "--run_dir", str(run)]
    assert add_run_config(["test", f"--run_dir={run}"]) == ["test", *config, f"--run_dir={run}"]
    for checkpoint in (run, run / "checkpoints", run / "checkpoints" / "last.ckpt"):
        arguments = ["validate", "--ckpt_path", str(checkpoint)]
        assert add_run_config(arguments) == ["validate", *config, "--run_dir", str(run), *arguments[1:]]
    for arguments in (
        ["fit", "--run_dir", str(run)],
        ["test", "--run_dir", str(run), "--config", "x"],
        ["test", "--run_dir", str(tmp_path)],
        ["test", "--run_dir", str(run), "--help"],
    ):
        assert add_run_config(arguments) == arguments

"""What fit, validate, test and predict leave behind, and that a run can be had again from it."""

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

THEIRS = '''
from __future__ import annotations

import torch
from memtx.memory.none import NoMemory


class Theirs(NoMemory):
    """A third party's memory: nothing is carried, one weight of its own."""

    def __init__(self, dim: int, strength: float = 1.0) -> None:
        super().__init__(dim)
        self.strength = torch.nn.Parameter(torch.full((1,), strength))
'''


def succeeded(done: Done) -> Done:
    assert done.code == 0, done.err
    return done


def rows(metrics: Path) -> list[dict[str, str]]:
    with metrics.open() as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> list[tuple[str, str]]:
    return [(row["step"], row["train_loss"]) for row in rows(run / "metrics.csv") if row.get("train_loss")]


def table(done: Done) -> dict[str, float]:
    """Return the figures that a measurement prints."""
    cells = [line.replace("│", " ").split() for line in done.out.splitlines() if line.startswith("│")]
    return {name: float(value) for name, value in cells}


@pytest.fixture(scope="module")
def place(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with books, c.yaml and a finished run; no test changes these."""
    path = tmp_path_factory.mktemp("place")
    write_books(path / "books")
    write(path)
    succeeded(program("fit", "--config", "c.yaml", at=path))
    return path


def test_a_run_is_one_folder(place: Path) -> None:
    run = place / "run"
    assert (run / "config.yaml").is_file()
    assert list(run.glob("events.out.tfevents.*"))
    assert (run / "checkpoints" / "last.ckpt").is_file()
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert (run / "checkpoints" / best["path"]).is_file()
    scores = [float(row["val_bits_per_byte"]) for row in rows(run / "metrics.csv") if row["val_bits_per_byte"]]
    assert len(scores) == 2
    assert best["score"] == min(scores)
    assert [int(step) for step, _ in losses(run)] == [0, 1, 2, 3]
    assert not list(place.glob("lightning_logs"))


def test_the_saved_config_gives_the_same_run(program: Program, place: Path) -> None:
    succeeded(program("fit", "--config", "run/config.yaml", "--run_dir", "again", at=place))
    assert losses(place / "again") == losses(place / "run")
    # As text: what was saved is all there is to say about a run but its folder.
    one, other = ((place / run / "config.yaml").read_text() for run in ("run", "again"))
    assert one == other.replace("run_dir: again", "run_dir: run")


def test_print_config_is_complete(program: Program, place: Path) -> None:
    printed = succeeded(program("fit", "--config", "c.yaml", "--print_config", at=place)).out
    content = yaml.safe_load(printed)
    for section, settings in CONFIG.items():
        if isinstance(settings, dict):
            assert set(settings) <= set(content[section])
    memory = content["model"]["model"]["init_args"]["memories"][0]
    assert memory["init_args"].keys() >= {"window", "compression_rate", "num_entries", "compression", "reconstruction"}
    (place / "printed.yaml").write_text(printed)
    assert succeeded(program("fit", "--config", "printed.yaml", "--print_config", at=place)).out == printed


def test_going_on_keeps_what_was_logged(program: Program, place: Path) -> None:
    fit = ("fit", "--config", "c.yaml", "--ckpt_path", "last", "--run_dir")
    succeeded(program(*fit, "short", "--trainer.max_steps=2", at=place))
    # As a killed run leaves it: a step was logged that is in no checkpoint.
    with (place / "short" / "metrics.csv").open("a") as file:
        csv.DictWriter(file, rows(place / "run" / "metrics.csv")[0]).writerow({"step": 2, "train_loss": 99.0})
    succeeded(program(*fit, "short", at=place))
    assert losses(place / "short") == losses(place / "run")
    validated = [row["step"] for row in rows(place / "short" / "metrics.csv") if row.get("val_loss")]
    assert validated == [row["step"] for row in rows(place / "run" / "metrics.csv") if row.get("val_loss")]
    # Without the checkpoint in what is saved: the same file begins the same run.
    assert yaml.safe_load((place / "short" / "config.yaml").read_text())["ckpt_path"] is None


def test_a_run_is_measured_without_its_config(program: Program, place: Path) -> None:
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    whole = table(succeeded(program("validate", "--run_dir", "run", at=place)))
    best = json.loads((place / "run" / "checkpoints" / "best.json").read_text())
    # The same checkpoint on the same texts; printed in full precision.
    assert whole["val_bits_per_byte"] == pytest.approx(best["score"], abs=1e-6)
    assert {one for one in whole if "memory_gain" not in one} == {
        "val_bits_per_byte",
        "val_loss",
        "val_word_perplexity",
    }
    for checkpoint in ("run", "run/checkpoints", "best"):
        found = succeeded(program("validate", "--config", "c.yaml", "--ckpt_path", checkpoint, at=place))
        assert table(found) == whole
    test = table(succeeded(program("test", "--ckpt_path", "run/checkpoints/last.ckpt", at=place)))
    assert test == table(succeeded(program("test", "--run_dir=run", "--ckpt_path=last", at=place)))
    assert test.keys() == {"test_bits_per_byte", "test_loss", "test_word_perplexity"}
    after = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    assert after == before


def test_predictions_are_every_document_and_token(program: Program, place: Path) -> None:
    for target in ("predict-a", "predict-b"):
        (place / target).mkdir()
    base = ("predict", "--config", "c.yaml", "--ckpt_path", "run")
    done = succeeded(program(*base, "--run_dir", "predict-a", at=place))
    assert "predict-a/predictions" in done.out
    lines = (place / "predict-a" / "predictions" / predictions.DOCUMENTS_FILE).read_text().splitlines()
    found: dict[str, dict[str, Any]] = {line["id"]: line for line in map(json.loads, lines)}
    assert sorted(found) == ["0", "1", "2"]
    surprise, _ = files.load_tensors(
        place / "predict-a" / "predictions" / predictions.SURPRISAL_FILE,
        kind=predictions.FILE_KIND,
        version=predictions.FORMAT_VERSION,
    )
    model, tokenizer = load_model_and_tokenizer(place / "run")
    for name, facts in found.items():
        content = (place / "books" / "test" / f"{name}.txt").read_bytes()
        assert (facts["bytes"], facts["tokens"]) == (len(content), len(content))
        assert facts["words"] == len(content.decode().split())
        # Read alone, in one call: rows and segments make no difference but rounding.
        tokens = torch.tensor([[tokenizer.bos_token_id, *content]])
        with torch.no_grad():
            nll = model(tokens[:, :-1], labels=tokens[:, 1:]).nll[0]
        torch.testing.assert_close(surprise[name], nll, atol=1e-4, rtol=1e-4)
        assert facts["nll"] == pytest.approx(float(nll.double().sum()), rel=1e-5)
        assert facts["bits_per_byte"] == pytest.approx(facts["nll"] / math.log(2) / len(content))
    total = sum(facts["nll"] for facts in found.values())
    measured = table(succeeded(program("test", "--run_dir", "run", at=place)))
    size = sum(facts["bytes"] for facts in found.values())
    assert total / math.log(2) / size == pytest.approx(measured["test_bits_per_byte"], rel=1e-5)
    # Cut short, a document's text is not what was scored.
    succeeded(program(*base, "--run_dir", "predict-b", "--trainer.limit_predict_batches=2", at=place))
    lines = (place / "predict-b" / "predictions" / predictions.DOCUMENTS_FILE).read_text().splitlines()
    assert {json.loads(line)["bits_per_byte"] for line in lines} == {None}
    assert {json.loads(line)["tokens"] for line in lines} == {32}


def test_other_texts_are_read_with_the_checkpoints_tokenizer(program: Program, place: Path) -> None:
    trained = changed(
        ("data", "tokenizer"),
        {"class_path": "memtx.data.tokenizers.BytePairTokenizer", "init_args": {"vocab_size": 270}},
    )
    write(place, trained, "pairs.yaml")
    succeeded(program("fit", "--config", "pairs.yaml", "--run_dir", "pairs", at=place))
    # Only what is measured is there: no training texts to train a tokenizer on.
    write_books(place / "other", ("test",))
    here = table(succeeded(program("test", "--run_dir", "pairs", at=place)))
    there = table(succeeded(program("test", "--run_dir", "pairs", "--data.root", "other", at=place)))
    assert here == there


def test_a_class_of_ones_own(program: Program, place: Path) -> None:
    (place / "theirs.py").write_text(THEIRS)
    own = changed(
        ("model", "model", "init_args", "memories"),
        [{"class_path": "theirs.Theirs", "init_args": {"strength": 2.5}}],
    )
    write(place, own, "own.yaml")
    succeeded(program("fit", "--config", "own.yaml", "--run_dir", "own", at=place))
    assert table(succeeded(program("test", "--run_dir", "own", at=place))).keys() >= {"test_loss"}
    book = str(place / "books" / "test" / "0.txt")
    refused = program("read", book, "--checkpoint", "own", at=place)
    assert refused.code == 2
    assert "theirs.Theirs" in refused.err
    assert "--import" in refused.err
    read = succeeded(program("read", book, "--checkpoint", "own", "--import", "theirs", "--json", at=place))
    assert json.loads(read.out)["tokens"] == len(Path(book).read_bytes())
    assert "no_such_module" in program("read", book, "--checkpoint", "own", "--import", "no_such_module", at=place).err


SLOW = """
from lightning.pytorch import Callback

from memtx.ops.cpu import cpu_info

cpu_info.is_cpu_bf16_fast = lambda: False


class Told(Callback):
    def on_train_start(self, trainer, pl_module):
        print("trains in", trainer.precision)
"""


def test_float32_stands_in_for_a_slow_bfloat16(program: Program, place: Path) -> None:
    (place / "slow.py").write_text(SLOW)
    config = changed(("trainer", "callbacks"), [{"class_path": "slow.Told"}])
    config["trainer"]["precision"] = "bf16-mixed"
    write(place, config)
    done = program("fit", "--config", "c.yaml", "--run_dir", "slow", at=place)
    assert done.code == 0, done.err
    assert "trains in 32-true" in done.out
    assert done.err.count("slower in bfloat16: using 32-true instead of bf16-mixed") == 1
    # The same file begins the run in what it says on another machine.
    assert yaml.safe_load((place / "slow" / "config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.slow
def test_two_processes_train_one_run(place: Path) -> None:
    # The second process is started by the first with the same arguments, so this needs the program itself.
    command = [sys.executable, "-m", "memtx", "fit", "--config", "c.yaml", "--run_dir", "ddp"]
    environment = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [
            *command, "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=2",
            "--data.eval_batch_size=1",
        ],
        cwd=place, env=environment, check=True, capture_output=True, timeout=280,
    )  # fmt: skip
    assert (place / "ddp" / "checkpoints" / "last.ckpt").is_file()
    assert [int(step) for step, _ in losses(place / "ddp")] == [0, 1]


def test_lightning_is_the_same_program(place: Path) -> None:
    scripts = Path(sys.executable).parent
    if not (scripts / "lightning").exists():
        pytest.skip("memtx is not installed here, only importable")
    for script in ("lightning", "memtx"):
        body = (scripts / script).read_text()
        assert "from memtx.cli.main import main" in body
    said = [
        subprocess.run([scripts / script, "--help"], capture_output=True, text=True, cwd=HOME, check=True).stdout
        for script in ("lightning", "memtx")
    ]
    assert said[0].replace("lightning", "memtx") == said[1]


def test_a_runs_config_is_found(tmp_path: Path) -> None:
    run = tmp_path / "r"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    config = ["--config", str(run / "config.yaml")]
    assert add_run_config(["test", "--run_dir", str(run)]) == ["test", *config, "--run_dir", str(run)]
    assert add_run_config(["test", f"--run_dir={run}"]) == ["test", *config, f"--run_dir={run}"]
    for checkpoint in (run, run / "checkpoints", run / "checkpoints" / "last.ckpt"):
        given = ["validate", "--ckpt_path", str(checkpoint)]
        assert add_run_config(given) == ["validate", *config, "--run_dir", str(run), *given[1:]]
    for left in (
        ["fit", "--run_dir", str(run)],
        ["test", "--run_dir", str(run), "--config", "x"],
        ["test", "--run_dir", str(tmp_path)],
        ["test", "--run_dir", str(run), "--help"],
    ):
        assert add_run_config(left) == left

"""``memtx evaluate``: its table, plot and JSON, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from memtx.checkpoint.pretrained import find_checkpoint
from memtx.cli.evaluate import parse_distances
from memtx.cli.main import main
from memtx.data.synthetic_tasks.recall import AssociativeRecall
from memtx.errors import MemtxError
from memtx.evaluation.accuracy import evaluate_accuracy
from memtx.models.memory_transformer import MemoryTransformer
from tests.commands.program import HOME, Program
from tests.commands.tiny import BOOK, pretrained

PNG = b"\x89PNG"

STORY = "1 Ann is at home.\n2 Where is Ann? \thome\t1\n3 Bob is at sea.\n4 Where is Bob? \tsea\t3\n"


@pytest.fixture(scope="module")
def synthetic_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a model with the vocabulary of AssociativeRecall, but without the options of a task."""
    path = tmp_path_factory.mktemp("synthetic")
    torch.manual_seed(0)
    MemoryTransformer(AssociativeRecall().vocab_size, dim=16, depth=1, heads=2).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a byte-level model."""
    return str(pretrained(tmp_path_factory.mktemp("reader")))


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", *arguments, "--json", "-"]) == 0
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    report: dict[str, Any] = json.loads(output)
    return report


def test_distances_are_parsed_and_sorted() -> None:
    assert parse_distances("8k,1k,64k, 1000") == [1000, 8000, 64000]
    assert parse_distances("2.5K,1M,.1m") == [2500, 100_000, 1_000_000]
    for wrong in ("", "k", "1k,", "-5", "0", "1g", "1e3", "0.0001k", "9" * 20):
        with pytest.raises(MemtxError):
            parse_distances(wrong)


def test_accuracy_is_reported_by_distance(
    synthetic_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--checkpoint", synthetic_model, "--task", "recall", "--num-samples", "4", "--distances", "30,100,24")
    report = evaluate(capsys, *base, "--seed", "3")
    # Rounded to segments, without duplicates.
    assert [result["distance"] for result in report["results"]] == [24, 96]
    model = MemoryTransformer.from_pretrained(synthetic_model)
    for result in report["results"]:
        num_segments = result["distance"] // 24
        accuracy = evaluate_accuracy(model, AssociativeRecall(), num_segments, num_samples=4, seed=3)
        assert (result["accuracy"], result["chance"]) == (accuracy, 1 / 32)
    assert (report["task"], report["num_samples"], report["seed"]) == ("recall", 4, 3)
    plot, figures = tmp_path / "a.png", tmp_path / "a.json"
    assert main(["evaluate", *base, "--plot", str(plot), "--json", str(figures)]) == 0
    table = capsys.readouterr().out
    assert all(part in table for part in ("recall", "accuracy", "chance", "0.031", "24", "96"))
    assert plot.read_bytes().startswith(PNG)
    assert [result["distance"] for result in json.loads(figures.read_text())["results"]] == [24, 96]


@pytest.mark.parametrize(("task", "size"), [("overwrite", "num_overwrites=2"), ("capacity", "num_values=32")])
def test_other_synthetic_tasks_are_evaluated(
    synthetic_model: str, task: str, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--num-samples", "2", "--distances", "48", "--task-arg", size)
    report = evaluate(capsys, "--checkpoint", synthetic_model, "--task", task, *options)
    (result,) = report["results"]
    if task == "capacity":
        assert (result["distance"], result["num_pairs"], result["pairs_per_kib"]) == (2, 0, 0.0)
        assert result["state_bytes"] == MemoryTransformer.from_pretrained(synthetic_model).init_state(1).nbytes
    else:
        assert 0 <= result["accuracy"] <= 1


def test_capacity_has_default_segments(
    synthetic_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "a.png"
    command = ["evaluate", "--checkpoint", synthetic_model, "--task", "capacity", "--num-samples", "2"]
    assert main([*command, "--plot", str(plot)]) == 0
    table = capsys.readouterr().out
    assert all(part in table for part in ("pairs per KiB", " 3 ", " 32 ", "768"))
    assert plot.read_bytes().startswith(PNG)


def test_needles_and_stories_are_evaluated(reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    (tmp_path / "qa1_where_test.txt").write_text(STORY, encoding="utf-8")
    haystack = str(tmp_path / "book.txt")
    base = ("--checkpoint", reader, "--num-samples", "2", "--haystack", haystack, "--distances", "300,40")
    needles = ("--task", "needle", "--num-depths", "2")
    report = evaluate(capsys, *base, *needles, "--distances", "300,200")
    names = ["depth 0%", "depth 100%"] * 2 + ["all", "all"]
    assert [result["name"] for result in report["results"]] == names
    assert {result["chance"] for result in report["results"]} == {0.5}
    assert main(["evaluate", *base, *needles]) == 2
    assert "do not fit into 40 tokens" in capsys.readouterr().err
    # The result does not depend on the segmentation.
    assert evaluate(capsys, *base, *needles, "--distances", "300,200", "--segment-length", "7") == report
    stories = ("--task", "babi", "--babi-dir", str(tmp_path))
    report = evaluate(capsys, *base, *stories)
    assert [(result["name"], result["distance"]) for result in report["results"]] == [
        ("qa1", 40), ("qa1", 300), ("all", 40), ("all", 300),
    ]  # fmt: skip
    plot = tmp_path / "a.png"
    assert main(["evaluate", *base, *stories, "--plot", str(plot)]) == 0
    table = capsys.readouterr().out
    assert all(part in table for part in ("qa1", "300", "0.500"))
    assert plot.read_bytes().startswith(PNG)
    written = ("--task", "babilong", "--babi-dir", str(tmp_path), "--tasks", "qa1", "--distances", "0,300")
    report = evaluate(capsys, *base, *written)
    assert [(result["name"], result["distance"]) for result in report["results"]] == [
        ("qa1", 0), ("qa1", 300), ("all", 0), ("all", 300),
    ]  # fmt: skip


def test_ruler_says_which_tasks_are_left_out(reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["evaluate", "--checkpoint", reader, "--task", "ruler", "--num-samples", "1", "--distances", "300"]
    assert main([*base, "--json", "-"]) == 0
    output = capsys.readouterr()
    assert "qa_1 is left out: it needs --squad FILE" in output.err
    assert "qa_2 is left out: it needs --hotpotqa FILE" in output.err
    names = [result["name"] for result in json.loads(output.out)["results"]]
    assert len(names) == 11 + 1
    assert main([*base, "--tasks", "vt,qa_1"]) == 2
    assert "--squad is not set" in capsys.readouterr().err
    assert main([*base, "--tasks", "vtt"]) == 2
    assert "--tasks has 'vtt'" in capsys.readouterr().err


def test_a_run_is_evaluated_on_the_task_of_its_training(program: Program, tmp_path: Path) -> None:
    content = yaml.safe_load((HOME / "configs" / "recall.yaml").read_text())
    task = content["data"]["init_args"]["task"]["init_args"]
    task.update(segment_length=12, num_pairs=2, num_keys=5, num_values=7, num_noise_tokens=3)
    content["data"]["init_args"]["batch_size"] = 2
    content["trainer"].update(max_steps=3, val_check_interval=2)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    result = program("fit", "--config", "c.yaml", "--run_dir", "run", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "val_accuracy" in (tmp_path / "run" / "metrics.csv").read_text().partition("\n")[0]
    command = ("evaluate", "--checkpoint", "run", "--num-samples", "2", "--distances", "36", "--json", "-")
    result = program(*command, "--task", "recall", cwd=tmp_path)
    assert result.code == 0, result.err
    (recall,) = json.loads(result.out)["results"]
    model = MemoryTransformer.from_pretrained(find_checkpoint(tmp_path / "run"))
    assert recall["accuracy"] == evaluate_accuracy(model, AssociativeRecall(**task), 3, num_samples=2)
    assert (recall["distance"], recall["chance"]) == (36, 1 / 7)
    # The sizes in training also apply to a task with further options.
    assert program(*command, "--task", "overwrite", cwd=tmp_path).code == 0
    result = program(*command, "--task", "needle", cwd=tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "no tokenizer" in result.err
    result = program("test", "--run_dir", "run", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "test_accuracy" in result.out
    more = ("--ckpt_path", "last", "--trainer.max_steps", "5")
    result = program("fit", "--config", "c.yaml", "--run_dir", "run", *more, cwd=tmp_path)
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--task", "recal"], "invalid choice: 'recal'"),
        (["--task", "recall", "--distances", "1x"], "--distances has '1x'"),
        (["--task", "recall", "--num-samples", "0"], "--num-samples: must be at least 1, got 0"),
        (["--task", "recall", "--seed", "-1"], "--seed: must be at least 0, got -1"),
        (["--task", "recall", "--distnace", "1k"], "Did you mean '--distances'?"),
        (["--task", "recall", "--task-arg", "num_pears=3"], "Did you mean 'num_pairs'?"),
        (["--task", "recall", "--task-arg", "num_pairs"], "--task-arg num_pairs has no value"),
        (["--task", "recall", "--task-arg", "num_pairs=99"], "99 pairs do not fit"),
        (["--task", "recall", "--task-arg", "num_keys=31"], "(81) differs from that of recall with these sizes (80)"),
        (["--task", "tracking"], "(81) differs from that of tracking with these sizes (36)"),
        (
            ["--task", "recall", "--plot", "/no/such/folder/a.png"],
            "--plot: the folder '/no/such/folder' does not exist",
        ),
        (["--task", "recall", "--json", "/tmp"], "--json: '/tmp' is a folder"),
        (["--task", "recall", "--device", "nonsense"], "--device nonsense"),
        (["--task", "needle"], "has no tokenizer.json"),
        (["--task", "needle", "--haystack", "/no/such/text"], "'/no/such/text' does not exist"),
        (["--task", "needle", "--task-arg", "num_pairs=3"], "--task-arg does not apply to needle"),
        (["--task", "babi"], "--babi-dir is not set"),
        (["--task", "babi", "--babi-dir", "/no/such/folder"], "'/no/such/folder' is not a folder"),
        ([], "--task"),
    ],
)
def test_errors_are_one_line(
    synthetic_model: str, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = main(["evaluate", "--checkpoint", synthetic_model, *arguments])
    except SystemExit as error:
        code = error.code
    output = capsys.readouterr()
    assert code == 2
    assert expected in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_ctrl_c_writes_nothing(
    synthetic_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("memtx.evaluation.accuracy.evaluate_accuracy", interrupted)
    target = tmp_path / "a.json"
    assert main(["evaluate", "--checkpoint", synthetic_model, "--task", "recall", "--json", str(target)]) == 130
    assert not target.exists()
    assert "interrupted" in capsys.readouterr().err


def test_needles_are_hidden_in_the_embedded_texts_by_default(reader: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate(capsys, "--checkpoint", reader, "--task", "needle", "--num-samples", "1", "--distances", "600")
    assert len(report["results"]) == 9

"""``memtx evaluate``: what it prints and writes of good input, and one line of bad."""

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
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder of a model of AssociativeRecall's vocabulary, of nothing else that says so."""
    path = tmp_path_factory.mktemp("drawn")
    torch.manual_seed(0)
    MemoryTransformer(AssociativeRecall().vocab_size, dim=16, depth=1, heads=2).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder of a model of bytes."""
    return str(pretrained(tmp_path_factory.mktemp("reader")))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", *arguments, "--json", "-"]) == 0
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    found: dict[str, Any] = json.loads(output)
    return found


def test_distances() -> None:
    assert parse_distances("8k,1k,64k, 1000") == [1000, 8000, 64000]
    assert parse_distances("2.5K,1M,.1m") == [2500, 100_000, 1_000_000]
    for wrong in ("", "k", "1k,", "-5", "0", "1g", "1e3", "0.0001k", "9" * 20):
        with pytest.raises(MemtxError):
            parse_distances(wrong)


def test_accuracy_by_distance(drawn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("--checkpoint", drawn, "--task", "recall", "--num-samples", "4", "--distances", "30,100,24")
    found = said(capsys, *base, "--seed", "3")
    # Rounded to whole segments, each once.
    assert [one["distance"] for one in found["results"]] == [24, 96]
    model = MemoryTransformer.from_pretrained(drawn)
    for one in found["results"]:
        assert one["accuracy"] == evaluate_accuracy(
            model, AssociativeRecall(), one["distance"] // 24, num_samples=4, seed=3
        )
        assert one["chance"] == 1 / 32
    assert (found["task"], found["num_samples"], found["seed"]) == ("recall", 4, 3)
    plot, figures = tmp_path / "a.png", tmp_path / "a.json"
    assert main(["evaluate", *base, "--plot", str(plot), "--json", str(figures)]) == 0
    table = capsys.readouterr().out
    assert all(part in table for part in ("recall", "accuracy", "chance", "0.031", "24", "96"))
    assert plot.read_bytes().startswith(PNG)
    assert [one["distance"] for one in json.loads(figures.read_text())["results"]] == [24, 96]


@pytest.mark.parametrize(("task", "size"), [("overwrite", "num_overwrites=2"), ("capacity", "num_values=32")])
def test_other_drawn_tasks(drawn: str, task: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(
        capsys, "--checkpoint", drawn, "--task", task, "--num-samples", "2", "--distances", "48", "--task-arg", size
    )
    (only,) = found["results"]
    if task == "capacity":
        assert (only["distance"], only["num_pairs"], only["pairs_per_kib"]) == (2, 0, 0.0)
        assert only["state_bytes"] == MemoryTransformer.from_pretrained(drawn).init_state(1).nbytes
    else:
        assert 0 <= only["accuracy"] <= 1


def test_capacity_by_default(drawn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "a.png"
    assert (
        main(["evaluate", "--checkpoint", drawn, "--task", "capacity", "--num-samples", "2", "--plot", str(plot)]) == 0
    )
    table = capsys.readouterr().out
    assert all(part in table for part in ("pairs per KiB", " 3 ", " 32 ", "768"))
    assert plot.read_bytes().startswith(PNG)


def test_needles_and_stories(reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    (tmp_path / "qa1_where_test.txt").write_text(STORY, encoding="utf-8")
    base = (
        "--checkpoint",
        reader,
        "--num-samples",
        "2",
        "--haystack",
        str(tmp_path / "book.txt"),
        "--distances",
        "300,40",
    )
    needles = ("--task", "needle", "--num-depths", "2")
    found = said(capsys, *base, *needles, "--distances", "300,200")
    names = ["depth 0%", "depth 100%"] * 2 + ["all", "all"]
    assert [one["name"] for one in found["results"]] == names
    assert {one["chance"] for one in found["results"]} == {0.5}
    assert main(["evaluate", *base, *needles]) == 2
    assert "do not fit into 40 tokens" in capsys.readouterr().err
    # How it is cut does not matter.
    assert said(capsys, *base, *needles, "--distances", "300,200", "--segment-length", "7") == found
    stories = ("--task", "babi", "--babi-dir", str(tmp_path))
    found = said(capsys, *base, *stories)
    assert [(one["name"], one["distance"]) for one in found["results"]] == [
        ("qa1", 40), ("qa1", 300), ("all", 40), ("all", 300),
    ]  # fmt: skip
    plot = tmp_path / "a.png"
    assert main(["evaluate", *base, *stories, "--plot", str(plot)]) == 0
    table = capsys.readouterr().out
    assert all(part in table for part in ("qa1", "300", "0.500"))
    assert plot.read_bytes().startswith(PNG)


def test_a_run_is_asked_what_it_was_trained_on(program: Program, tmp_path: Path) -> None:
    content = yaml.safe_load((HOME / "configs" / "recall.yaml").read_text())
    task = content["data"]["init_args"]["task"]["init_args"]
    task.update(segment_length=12, num_pairs=2, num_keys=5, num_values=7, num_noise_tokens=3)
    content["data"]["init_args"]["batch_size"] = 2
    content["trainer"].update(max_steps=3, val_check_interval=2)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    done = program("fit", "--config", "c.yaml", "--run_dir", "run", at=tmp_path)
    assert done.code == 0, done.err
    assert "val_accuracy" in (tmp_path / "run" / "metrics.csv").read_text().partition("\n")[0]
    asked = ("evaluate", "--checkpoint", "run", "--num-samples", "2", "--distances", "36", "--json", "-")
    done = program(*asked, "--task", "recall", at=tmp_path)
    assert done.code == 0, done.err
    (only,) = json.loads(done.out)["results"]
    model = MemoryTransformer.from_pretrained(find_checkpoint(tmp_path / "run"))
    assert only["accuracy"] == evaluate_accuracy(model, AssociativeRecall(**task), 3, num_samples=2)
    assert (only["distance"], only["chance"]) == (36, 1 / 7)
    # The same sizes serve a task with more of them.
    assert program(*asked, "--task", "overwrite", at=tmp_path).code == 0
    done = program(*asked, "--task", "needle", at=tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "no tokenizer" in done.err
    done = program("test", "--run_dir", "run", at=tmp_path)
    assert done.code == 0, done.err
    assert "test_accuracy" in done.out
    more = ("--ckpt_path", "last", "--trainer.max_steps", "5")
    done = program("fit", "--config", "c.yaml", "--run_dir", "run", *more, at=tmp_path)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
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
        (["--task", "babi", "--babi-dir", "/no/such/folder"], "'/no/such/folder' is no folder"),
        ([], "--task"),
    ],
)
def test_mistakes_are_one_line(drawn: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main(["evaluate", "--checkpoint", drawn, *arguments])
    except SystemExit as stopped:
        code = stopped.code
    output = capsys.readouterr()
    assert code == 2
    assert says in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_ctrl_c_writes_nothing(
    drawn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("memtx.evaluation.accuracy.evaluate_accuracy", interrupted)
    target = tmp_path / "a.json"
    assert main(["evaluate", "--checkpoint", drawn, "--task", "recall", "--json", str(target)]) == 130
    assert not target.exists()
    assert "interrupted" in capsys.readouterr().err


def test_needles_in_the_embedded_texts(reader: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "--checkpoint", reader, "--task", "needle", "--num-samples", "1", "--distances", "600")
    assert len(found["results"]) == 9

"""Scripts for a machine with a GPU: every part runs within its limit, and what was measured is written."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from pathlib import Path

import pytest

from tests.test_scripts import REPO_ROOT, SCRIPTS, run


@pytest.mark.parametrize("reason", ["Stopped after 1 s", "Failed, the rest was not measured: no memory"])
def test_what_was_measured_is_written(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmarking

    files = {name: str(tmp_path / name) for name in ("json", "markdown")}
    arguments, figures = argparse.Namespace(max_seconds=1, **files), []
    with benchmarking.keep_measured(arguments):
        figures.append(1)
        if reason.startswith("Failed"):
            raise RuntimeError("no memory\nat line 7")
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.1)
    with pytest.raises(SystemExit, match=reason):
        benchmarking.write_results(arguments, {"figures": figures}, [f"| {figures} |"])
    results = json.loads((tmp_path / "json").read_text())
    assert results["figures"] == [1]
    assert results["stop_reason"].startswith(reason)
    assert f"| [1] |\n\n{reason}" in (tmp_path / "markdown").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "error"), [("bench_attention.py", "time"), ("bench_stream.py", "time"), ("bench_attention.py", "failure")]
)
def test_a_benchmark_that_is_stopped_writes_what_it_has_measured(name: str, error: str, tmp_path: Path) -> None:
    if name == "bench_stream.py":
        # Decoding is measured first.
        sizes = ("--dim", "16", "--depth", "1", "--vocab-size", "32", "--window", "16", "--memory-length", "4")
        options = ("--tokens", "100000000", "--call-lengths", "1000", "--decode-tokens", "2", "--rounds", "1", *sizes)
    else:
        # A length beyond any memory, or one of many seconds.
        lengths = ("64", "4000000") if error == "time" else ("64", "10000000000000")
        options = ("--dtypes", "fp32", "--backends", "banded", "--window", "16", "--lengths", *lengths)
    files = {option: tmp_path / f"bench.{option[2:]}" for option in ("--json", "--markdown", "--plot")}
    process = run(
        sys.executable, SCRIPTS / name, "--peak-size", "64", "--heads", "2", *options,
        *(part for item in files.items() for part in item), *(("--max-seconds", "4") if error == "time" else ()),
    )  # fmt: skip
    assert process.returncode == 1
    reason = "Stopped after 4 s: the rest was not measured." if error == "time" else "Failed, the rest was not measured"
    results = json.loads(files["--json"].read_text())
    assert results["stop_reason"].startswith(reason)
    assert reason in files["--markdown"].read_text()
    assert reason in process.stderr.splitlines()[-1]
    if name == "bench_stream.py":
        assert results["decoding"]
    else:
        assert {row["num_queries"] for row in results["rows"]} == {512, 64}


def test_the_gpu_script_says_what_it_compares_and_reports_a_missing_gpu(tmp_path: Path) -> None:
    process = run("bash", SCRIPTS / "gpu.sh", tmp_path, MEMTX_PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 2
    assert process.stdout.startswith("tests: Triton, flex and banded attention against the float64 reference")
    assert "CUDA build of torch" in process.stderr


def fake_interpreter(folder: Path, *cases: str) -> Path:
    """Return an interpreter that logs its arguments, with a case of a shell for some of them."""
    interpreter = folder / "python"
    interpreter.write_text(f'#!/bin/sh\necho "$@" >> {folder}/log\ncase "$*" in {" ".join(cases)} esac\n')
    interpreter.chmod(0o755)
    return interpreter


def test_the_gpu_script_runs_every_part_and_reports_failures(tmp_path: Path) -> None:
    table = f"echo table > {tmp_path}/out/step.md"
    interpreter = fake_interpreter(tmp_path, "*bench_attention*) exit 3;;", f"*bench_step*) {table};;")
    process = run("bash", SCRIPTS / "gpu.sh", tmp_path / "out", MEMTX_PYTHON=str(interpreter))
    assert process.returncode == 1
    assert process.stdout.count("FAILED with exit code 3") == 2
    assert process.stdout.endswith("\ntable\n")
    parts = [json.loads(line) for line in (tmp_path / "out" / "parts.jsonl").read_text().splitlines()]
    assert [(part["part"], part["exit_code"]) for part in parts] == [
        ("tests", 0), ("attention-64", 3), ("attention-128", 3), ("step", 0), ("step-350m", 0), ("stream", 0),
    ]  # fmt: skip
    calls = [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("-c")]
    assert calls[0].startswith("-m pytest -m cuda -n 4 ")
    benches = [line.split() for line in calls[1:]]
    assert [call[0] for call in benches] == ["scripts/bench_attention.py"] * 2 + ["scripts/bench_step.py"] * 2 + [
        "scripts/bench_stream.py"
    ]
    # The real scripts accept these options: they fail only at the missing GPU.
    command = (
        "import json, runpy, sys\nsys.path.insert(0, 'scripts')\nfor sys.argv in json.loads(sys.argv[1]):\n"
        "    try:\n        runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    except SystemExit as error:\n        print(error)\n"
    )
    process = run(sys.executable, "-c", command, json.dumps(benches), CUDA_VISIBLE_DEVICES="")
    assert process.stdout.count("torch sees no GPU here") == len(benches), process.stderr


def test_the_gpu_script_runs_its_tests_without_xdist(tmp_path: Path) -> None:
    interpreter = fake_interpreter(tmp_path, "*xdist*) exit 1;;")
    assert run("bash", SCRIPTS / "gpu.sh", tmp_path / "out", MEMTX_PYTHON=str(interpreter)).returncode == 0
    assert "-m pytest -m cuda tests/ops/attention tests/models/test_cuda.py" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(("name", "minutes"), [("gpu.sh", 7), ("gpu_memory.sh", 8)])
def test_the_limits_of_the_gpu_scripts(name: str, minutes: int) -> None:
    text = (SCRIPTS / name).read_text()
    (total,) = re.findall(r"^begin_parts \S+ (\d+)$", text, flags=re.MULTILINE)
    assert int(total) < 60 * minutes
    limits = [int(limit) for limit in re.findall(r"^ *(?:part|bench [\w-]+) (\d+) ", text, flags=re.MULTILINE)]
    assert len(limits) == {"gpu.sh": 6, "gpu_memory.sh": 3}[name]
    assert name != "gpu.sh" or sum(limits) <= int(total)


def test_parts_end_within_the_time_of_all(tmp_path: Path) -> None:
    """A part that ignores its signal is killed, one without time left does not run, and the others are reported."""
    script = tmp_path / "parts.sh"
    script.write_text(
        f"source {SCRIPTS}/gpu_parts.sh\nbegin_parts {tmp_path}/out 7\n"
        "part 1 first sh -c 'trap \"\" TERM; while :; do sleep 0.1; done'\n"
        "part 100 second sleep 100\npart 100 third touch ran\nend_parts\n"
    )
    began = time.monotonic()
    process = run("bash", script)
    assert process.returncode == 1
    assert time.monotonic() - began < 9  # and two seconds for a loaded machine
    parts = [json.loads(line) for line in (tmp_path / "out" / "parts.jsonl").read_text().splitlines()]
    assert [part["exit_code"] for part in parts] == [137, 124, 124]
    assert not (REPO_ROOT / "ran").exists()


STACKS = ("window", "compressed", "hybrid", "dual", "copy")


def test_the_memory_comparison_runs_every_part(tmp_path: Path) -> None:
    interpreter = fake_interpreter(tmp_path, f"*names) echo {' '.join(STACKS)};;", "*train?hybrid*) exit 3;;")
    process = run("bash", SCRIPTS / "gpu_memory.sh", tmp_path, tmp_path / "out", MEMTX_PYTHON=str(interpreter))
    assert process.returncode == 1
    parts = [json.loads(line) for line in (tmp_path / "out" / "parts.jsonl").read_text().splitlines()]
    assert [part["part"] for part in parts] == ["tokens", *STACKS, "tables"]
    assert [part["part"] for part in parts if part["exit_code"]] == ["hybrid"]
    calls = (tmp_path / "log").read_text().splitlines()
    assert calls[1].endswith("plan"), "what is compared is printed first"


def test_the_memory_comparison_has_equal_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import compare_gpu_memories as script

    assert tuple(script.STACKS) == STACKS
    size = script.SIZES["full"]
    counts = {name: script.num_parameters(script.matched_config(name, size), size) for name in STACKS}
    assert min(counts.values()) >= 20e6
    # One step of the feed-forward width in all layers is 8 x 3 x 512 parameters.
    assert max(counts.values()) - min(counts.values()) <= 8 * 3 * 512 <= 0.001 * counts["window"]


def test_the_memory_comparison_shows_stacks_that_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import compare_gpu_memories as script

    for name, num_validations in (("window", 4), ("copy", 4), ("hybrid", 2), ("dual", 0)):
        (tmp_path / name).mkdir()
        validations = [f"{2 * (index + 1)},,{4 - index - 0.5 * (name == 'copy')}" for index in range(num_validations)]
        lines = ["step,tokens_per_second,val_bits_per_byte", "1,1000,", *validations]
        (tmp_path / name / "metrics.csv").write_text("\n".join(lines) + "\n")
    options = {name: str(tmp_path / f"table.{name}") for name in ("json", "markdown", "plot")}
    arguments = argparse.Namespace(output_dir=tmp_path, **options)
    script.write_tables(arguments, script.SIZES["tiny"])
    table = capsys.readouterr().out
    assert re.search(
        r"copy memory \| [\d,]+ \| 1,000 \| 3.5000 \| 2.5000 \| 1.5000 \| 0.5000 \| -0.5000, -50.0%", table
    )
    assert re.search(r"1 window \| [\d,]+ \| 1,000 \| 4.0000 \| 3.0000 \|  \|  \|  \|", table)
    assert "Not trained to the end: 3 windows : 1 compressed memory, 3 Gated DeltaNets" in table
    assert set(json.loads((tmp_path / "table.json").read_text())["figures"]) == {"window", "copy", "hybrid"}
    assert (tmp_path / "table.plot").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_memory_comparison_at_a_tiny_size(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / "books" / split).mkdir(parents=True)
        (tmp_path / "books" / split / "1.txt").write_text(f"A book of {split}, and so on. " * 400)
    process = run(
        "bash", SCRIPTS / "gpu_memory.sh", tmp_path / "books", tmp_path / "out", MEMTX_SIZE="tiny",
        MEMTX_PYTHON=sys.executable,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout
    figures = json.loads((tmp_path / "out" / "memories.json").read_text())["figures"]
    assert sorted(figures) == sorted(STACKS)  # JSON has its keys in order
    assert all(len(row["bits_per_byte"]) == 4 and row["is_complete"] for row in figures.values())

"""Ray as the engine of fit and prepare: the same bytes as without it, also after workers were killed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from memtx.checkpoint.pretrained import read_checkpoint
from memtx.cli import ray_engine
from memtx.cli.lightning_cli import get_launcher_kwargs
from memtx.data.sources.files import FileSource
from memtx.data.tokenized_corpus import tokenize_corpus
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import DataError, MemtxError
from tests.commands.program import Program
from tests.commands.runs import changed, write, write_books
from tests.commands.test_prepare import ENVIRONMENT, corpus, files  # noqa: F401
from tests.test_scripts import SCRIPTS


class FakeRay:
    """Ray's part in :func:`ray_engine.write_jobs`, in this process; its first ``num_deaths`` tries lose a worker."""

    def __init__(self, num_deaths: int = 0) -> None:
        self.num_deaths, self.max_retries, self.max_running = num_deaths, 0, 0
        self.exceptions = SimpleNamespace(WorkerCrashedError=ConnectionError)

    def remote(self, num_cpus: int, max_retries: int) -> Callable[[Any], Any]:
        self.max_retries = max_retries
        return lambda function: SimpleNamespace(remote=lambda *values: partial(function, *values))

    def put(self, value: Any) -> Any:
        return value

    def wait(self, refs: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        self.max_running = max(self.max_running, len(refs))
        return refs[-1:], refs[:-1]

    def get(self, ref: Any) -> Any:
        while self.num_deaths:
            self.num_deaths -= 1
            if not self.max_retries:
                raise ConnectionError
            self.max_retries -= 1
        return ref()

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}


def install(monkeypatch: pytest.MonkeyPatch, ray: FakeRay) -> FakeRay:
    monkeypatch.setattr(ray_engine, "connect", lambda min_cpus: contextlib.nullcontext(ray))
    return ray


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for number in range(5):
        (tmp_path / "texts" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / "train" / f"{number}.txt").write_text("A dark night. " * 60_000)
    return tmp_path / "texts"


def prepare(texts: Path, folder: Path, **options: Any) -> dict[str, bytes]:
    tokenize_corpus(folder, FileSource([str(texts)]).scan(), ByteTokenizer(), num_workers=1, **options)
    return files(folder)


@pytest.mark.parametrize("num_deaths", [0, 3])
def test_tasks_write_the_same_shards(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_deaths: int
) -> None:
    expected = prepare(texts, tmp_path / "local")
    ray = install(monkeypatch, FakeRay(num_deaths))
    assert prepare(texts, tmp_path / "ray", run_jobs=ray_engine.write_jobs) == expected
    assert len(expected) > 6
    assert ray.max_running == 2


def test_a_shard_whose_workers_all_die_ends_the_command(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeRay(4))
    with pytest.raises(DataError, match=r"4 Ray workers died while they wrote shard 1\."):
        prepare(texts, tmp_path / "ray", run_jobs=ray_engine.write_jobs)
    assert not (tmp_path / "ray").exists()


def test_mistakes_in_a_task_keep_their_hint(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeRay())
    (texts / "train" / "2.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"2\.txt"):
        prepare(texts, tmp_path / "ray", run_jobs=ray_engine.write_jobs)


def test_a_user_tokenizer_is_not_sent(texts: Path, tmp_path: Path) -> None:
    class UserTokenizer(ByteTokenizer):
        pass

    with pytest.raises(MemtxError, match="--engine ray cannot send"):
        tokenize_corpus(
            tmp_path / "ray", FileSource([str(texts)]).scan(), UserTokenizer(), run_jobs=ray_engine.write_jobs
        )


def test_workers_get_the_environment_of_torchrun() -> None:
    environments = [ray_engine.worker_environment(rank, 2, 4, ("10.0.0.1", 29500)) for rank in range(4)]
    assert get_launcher_kwargs(environments[3]) == {"devices": 2, "num_nodes": 2}
    assert [environment["LOCAL_RANK"] for environment in environments] == ["0", "1", "0", "1"]
    assert {environment["MASTER_ADDR"] for environment in environments} == {"10.0.0.1"}


def test_a_restart_resumes_from_the_last_checkpoint(tmp_path: Path) -> None:
    argv = ["fit", "--config", "c.yaml", "--ckpt_path", "old.ckpt", "--ckpt_path=other.ckpt", "--engine=local"]
    assert ray_engine.resume_arguments(argv, tmp_path) == argv
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    expected = ["fit", "--config", "c.yaml", "--engine=local", "--ckpt_path=last"]
    assert ray_engine.resume_arguments(argv, tmp_path) == expected


def test_mistakes_are_one_line(program: Program, tmp_path: Path) -> None:
    write_books(tmp_path / "books")
    write(tmp_path)
    for option, value, message in (
        ("--trainer.devices", "auto", "trainer.devices is auto, and engine 'ray' needs the number of workers"),
        ("--max_restarts", "-1", "max_restarts is -1. Give at least 0."),
    ):
        result = program("fit", "--config", "c.yaml", "--engine", "ray", option, value, cwd=tmp_path)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert message in result.err
        assert not (tmp_path / "run").exists()


def test_the_extra_is_named(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MemtxError, match=r"--engine ray needs ray\. Install it: pip install 'memtx\[ray\]'\."):
        prepare(texts, tmp_path / "ray", run_jobs=ray_engine.write_jobs)


# With Ray: it starts on this machine, and takes tens of seconds.


@pytest.fixture
def ray_command(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    pytest.importorskip("ray", reason="ray is not installed (memtx[ray])")
    processes: list[subprocess.Popen[bytes]] = []

    def start(*argv: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, *argv]
        environment = {name: value for name, value in ENVIRONMENT.items() if name != "RAY_ADDRESS"}
        processes.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.wait()


def find_workers(process: subprocess.Popen[bytes], title: str) -> list[psutil.Process]:
    """Return the Ray workers of a command that do a task or are an actor."""
    workers = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            workers += [child] if child.cmdline() and child.cmdline()[0].startswith(f"ray::{title}") else []
        except psutil.Error:
            continue
    return workers


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 500) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


ENGINE = ("-m", "memtx", "fit", "--config", "c.yaml", "--engine", "ray")
RAY_TRAIN = (str(SCRIPTS / "ray_train.py"), "--", "--config", "c.yaml", "--run_dir", "run")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("argv", "title"), [(ENGINE, "FitWorker"), (RAY_TRAIN, "RayTrainWorker")])
def test_a_killed_worker_does_not_change_a_run(
    program: Program,
    tmp_path: Path,
    ray_command: Callable[..., subprocess.Popen[bytes]],
    argv: tuple[str, ...],
    title: str,
) -> None:
    if argv is RAY_TRAIN:
        pytest.importorskip("pandas", reason="Ray Train's packages are not installed (pip install 'ray[train]')")
        pytest.importorskip("pyarrow", reason="Ray Train's packages are not installed (pip install 'ray[train]')")
    write_books(tmp_path / "books")
    config = changed(("trainer", "devices"), 2, changed(("trainer", "max_steps"), 400))
    config = changed(("trainer", "val_check_interval"), 100, {**config, "checkpoint": {"every_n_train_steps": 5}})
    write(tmp_path, config)
    result = program("fit", "--config", "c.yaml", "--run_dir", "torchrun", cwd=tmp_path, ranks=2)
    assert result.code == 0, result.err
    process = ray_command(*argv)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    for _ in range(2):
        earlier = last.stat().st_mtime_ns if last.exists() else 0
        wait_until(lambda: last.exists() and last.stat().st_mtime_ns > earlier, process)  # noqa: B023
        find_workers(process, title)[-1].kill()
        wait_until(lambda: len(find_workers(process, title)) < 2, process)
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err.decode()
    assert argv is RAY_TRAIN or b"restart 2 of 3" in err
    expected, actual = (read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("torchrun", "run"))
    assert actual["global_step"] == expected["global_step"] == 400
    for name, weight in expected["state_dict"].items():
        assert torch.equal(actual["state_dict"][name], weight), name
    num_rows = [(tmp_path / run / "metrics.csv").read_text().count("\n") for run in ("torchrun", "run")]
    assert num_rows[0] - 2 <= num_rows[1] <= num_rows[0]  # a step saved but not yet logged may be missing after a kill


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_worker_does_not_change_the_shards(
    program: Program,
    corpus: Path,  # noqa: F811
    tmp_path: Path,
    ray_command: Callable[..., subprocess.Popen[bytes]],
) -> None:
    result = program("prepare", str(corpus), "--output-dir", "alone", "--num-workers", "1", cwd=tmp_path)
    assert result.code == 0, result.err
    process = ray_command(
        "-m", "memtx", "prepare", str(corpus), "--output-dir", "out", "--num-workers", "2", "--engine", "ray"
    )
    building = tmp_path / ".out.building"
    for count in (1, 4):
        wait_until(lambda: len(list(building.glob("train/*.json"))) >= count, process)  # noqa: B023
        wait_until(lambda: find_workers(process, "_write_job"), process)[0].kill()
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err.decode()
    assert files(tmp_path / "out") == files(tmp_path / "alone")

"""Ray as the engine of ``memtx fit`` and ``memtx prepare``: workers on a cluster that shares its files.

Ray is imported lazily (``pip install 'memtx[ray]'``). A running cluster (``RAY_ADDRESS``, or one started on this
machine) is used as it is; otherwise Ray starts on this machine for the duration of the command.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtx.errors import DataError, MemtxError, check_at_least, missing_package_error

if TYPE_CHECKING:
    from memtx.data.shards import ProgressCallback
    from memtx.data.tokenize import ShardJob
    from memtx.data.tokenizers import Tokenizer

PASSED_VARIABLES = ("OMP_NUM_THREADS", "MEMTX_COMPILE")
"""Environment variables of the command that its workers get; Ray sets the first to 1."""

MAX_TASK_RETRIES = 3
"""Times that the shards of a dead worker are written again by another."""

_OBJECT_STORE_BYTES = 100_000_000  # Nothing but a tokenizer and jobs is sent; Ray would reserve 30% of the memory.
_SECONDS_TO_FAIL = 15.0  # After a worker died, the others notice it within this time, or are ended.
_ERROR_PREFIX = "memtx: error: "


@contextlib.contextmanager
def connect(min_cpus: int = 1) -> Iterator[Any]:
    """Yield the module ``ray``, connected to a running cluster or to a new one with at least ``min_cpus`` CPUs.

    Raises MemtxError if Ray is not installed.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise missing_package_error("--engine ray", error, "ray") from error
    # The driver's path, so that a checkout that is not installed is found.
    path = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    options = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}, "logging_level": "error"}
    try:
        ray.init("auto", **options)
    except ConnectionError:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        num_cpus = max(min_cpus, os.cpu_count() or 1)
        ray.init(
            "local", num_cpus=num_cpus, object_store_memory=_OBJECT_STORE_BYTES, include_dashboard=False, **options
        )
    try:
        yield ray
    finally:
        ray.shutdown()


# Prepare


def write_jobs(
    jobs: Sequence[ShardJob], tokenizer: Tokenizer, num_workers: int, on_progress: ProgressCallback, *, limit: int = 0
) -> None:
    """Do independent jobs as Ray tasks, at most ``limit`` at a time (0: as many as the cluster has CPUs).

    A job whose worker dies is done again by another one. ``on_progress`` is called when a job ends. Raises DataError if
    a job fails, or its worker dies too often, and MemtxError if a job must run in this process.
    """
    from memtx.data.tokenize import needs_this_process

    if needs_this_process(jobs, tokenizer):
        message = "--engine ray cannot send this tokenizer or source to its workers."
        raise MemtxError(message, "Remove --engine ray.")
    if not jobs:
        return
    with connect(limit or num_workers) as ray:
        task = ray.remote(num_cpus=1, max_retries=MAX_TASK_RETRIES)(_write_job)
        tokenizer_ref, folder = ray.put(tokenizer), str(Path.cwd())
        waiting, running = list(jobs)[::-1], dict[Any, "ShardJob"]()
        limit = limit or max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting or running:
            while waiting and len(running) < limit:
                job = waiting.pop()
                running[task.remote(job, tokenizer_ref, folder)] = job
            (ref,), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(ref)
            try:
                error = ray.get(ref)
            except ray.exceptions.WorkerCrashedError as crash:
                message = f"{MAX_TASK_RETRIES + 1} Ray workers died while they wrote shard {job.shard_index}."
                hint = "If they were out of memory, give fewer --num-workers; the same command resumes."
                raise DataError(message, hint) from crash
            if error is not None:
                raise DataError(*error)
            on_progress(sum(part.size for part in job.parts))


def _write_job(job: ShardJob, tokenizer: Tokenizer, folder: str) -> tuple[str, str] | None:
    """Write a job's shards in a Ray worker; return message and hint of a user's mistake."""
    from memtx.data.tokenize import write_job

    os.chdir(folder)  # Paths are relative to the driver's folder.
    try:
        write_job(job, tokenizer, lambda count: None)
    except MemtxError as error:
        return error.message, error.hint
    return None


# Fit


def fit_config(argv: Sequence[str], config: Any) -> int:
    """Run ``memtx fit`` with the workers, restarts and run folder of its config; return the exit code."""
    check_at_least(0, max_restarts=config.max_restarts)
    devices, num_nodes = str(config.trainer.devices), config.trainer.num_nodes
    if not devices.isdecimal() or not int(devices):
        message = f"trainer.devices is {devices}, and engine 'ray' needs the number of workers per node."
        raise MemtxError(message, "Give a number of at least 1.")
    settings: dict[str, Any] = {"devices": int(devices), "num_nodes": num_nodes}
    settings["accelerator"] = str(config.trainer.accelerator)
    return fit(argv, Path(config.run_dir), max_restarts=config.max_restarts, **settings)


def fit(
    argv: Sequence[str], run_dir: Path, *, devices: int, num_nodes: int, accelerator: str, max_restarts: int
) -> int:
    """Run ``memtx fit`` in ``num_nodes * devices`` Ray actors, as torchrun runs it in processes; return the exit code.

    If a worker dies, all start again from the newest checkpoint of the run.

    Args:
        argv: Arguments of the command, subcommand first.
        run_dir: Folder of the run, on a disk that all nodes share.
        devices: Workers per node.
        num_nodes: Number of nodes.
        accelerator: The trainer's. Each worker gets a CPU, and a GPU for "gpu", "cuda", or "auto" if there are enough.
        max_restarts: Restarts after which a dead worker ends the run.

    Raises:
        MemtxError: Ray or the resources are missing, a worker reports a user's mistake, or workers died too often.
    """
    world_size = devices * num_nodes
    with connect(world_size) as ray:
        has_gpus = ray.cluster_resources().get("GPU", 0) >= world_size
        uses_gpus = accelerator in ("gpu", "cuda") or (accelerator == "auto" and has_gpus)
        resources = {"CPU": float(devices), **({"GPU": float(devices)} if uses_gpus else {})}
        group = _reserve(ray, [resources] * num_nodes)
        for restart in range(max_restarts + 1):
            arguments = list(argv) if not restart else resume_arguments(argv, run_dir)
            workers = _start_workers(ray, group, devices, world_size, uses_gpus)
            try:
                code, error = _run_workers(ray, workers, arguments)
            finally:
                for worker in workers:
                    ray.kill(worker)
            if error:
                raise MemtxError(error)
            if code is not None:
                return code
            if restart < max_restarts:
                sys.stderr.write(f"memtx: a Ray worker died; restart {restart + 1} of {max_restarts}.\n")
    hint = "The run resumes with --ckpt_path last; more --max_restarts allow more deaths."
    raise MemtxError(f"Ray workers died {max_restarts + 1} times.", hint)


def resume_arguments(argv: Sequence[str], run_dir: Path) -> list[str]:
    """Return the arguments that resume a run from its last checkpoint, or start it again if it has none."""
    if not any((run_dir / "checkpoints").glob("*.ckpt")):
        return list(argv)
    arguments, option = list[str](), "--ckpt_path"
    for previous, argument in zip(["", *argv], argv, strict=False):
        if option not in (previous, argument.partition("=")[0]):
            arguments.append(argument)
    return [*arguments, f"{option}=last"]


def worker_environment(rank: int, devices: int, world_size: int, master: tuple[str, int]) -> dict[str, str]:
    """Return the environment that torchrun would give a worker."""
    values = {
        "TORCHELASTIC_RUN_ID": "ray",
        "RANK": rank,
        "LOCAL_RANK": rank % devices,
        "GROUP_RANK": rank // devices,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": devices,
        "MASTER_ADDR": master[0],
        "MASTER_PORT": master[1],
    }
    return {name: str(value) for name, value in values.items()}


def _reserve(ray: Any, bundles: list[dict[str, float]]) -> Any:
    placement: Any = importlib.import_module("ray.util.placement_group")
    group = placement.placement_group(bundles, strategy="STRICT_SPREAD" if len(bundles) > 1 else "PACK")
    # Not by group.ready(), a task that waits for a worker to start.
    if not group.wait(60):
        available = {name: ray.available_resources().get(name, 0.0) for name in bundles[0]}
        message = f"The Ray cluster has no {len(bundles)} nodes with {bundles[0]} free, but {available} in all."
        raise MemtxError(message, "Lower trainer.devices, add nodes, or wait for other jobs.")
    return group


def _start_workers(ray: Any, group: Any, devices: int, world_size: int, uses_gpus: bool) -> list[Any]:
    strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
    kind = ray.remote(num_cpus=1, num_gpus=int(uses_gpus), max_restarts=0)(FitWorker)
    workers = [
        kind.options(scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(group, rank // devices)).remote()
        for rank in range(world_size)
    ]
    hosts = ray.get([worker.describe.remote() for worker in workers])
    environments = [worker_environment(rank, devices, world_size, hosts[0][0]) for rank in range(world_size)]
    for rank, environment in enumerate(environments):
        environment |= {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
        if uses_gpus:
            # Ray shows each worker its own GPU; local ranks count those of the node.
            first = rank - rank % devices
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus for _, gpus in hosts[first : first + devices])
    ray.get([worker.configure.remote(values) for worker, values in zip(workers, environments, strict=True)])
    return workers


def _run_workers(ray: Any, workers: Sequence[Any], argv: Sequence[str]) -> tuple[int | None, str]:
    """Return exit code and error line of a run, or (None, "") if a worker died."""
    running = [worker.fit.remote(sys.argv[0], list(argv), str(Path.cwd())) for worker in workers]
    codes, failure, timeout = list[int](), None, None
    while running:
        done, running = ray.wait(running, num_returns=1, timeout=timeout)
        if not done:
            break
        try:
            code, error = ray.get(done[0])
        except ray.exceptions.RayActorError:
            return None, ""
        except ray.exceptions.RayTaskError as task_error:
            failure, timeout = failure or task_error, _SECONDS_TO_FAIL  # A lost connection to a dead worker, or a bug.
            continue
        if error:
            return code, error
        codes.append(code)
    if failure is not None:
        raise failure
    return max(codes), ""


class FitWorker:
    """One process of a distributed run, as a Ray actor, whose methods run in the main thread."""

    def describe(self) -> tuple[tuple[str, int], str]:
        """Return this node's address with a free port, and the ids of this worker's GPUs."""
        ray: Any = importlib.import_module("ray")
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = int(listener.getsockname()[1])
        return (ray.util.get_node_ip_address(), port), ",".join(map(str, ray.get_gpu_ids()))

    def configure(self, environment: Mapping[str, str]) -> None:
        """Set environment variables before torch is imported."""
        os.environ.update(environment)

    def fit(self, program: str, argv: list[str], folder: str) -> tuple[int, str]:
        """Run the command in a folder; return its exit code and the line of its error."""
        from memtx.cli.main import main

        os.chdir(folder)
        sys.argv[0] = program  # named in the command to type next
        with contextlib.redirect_stderr(_ErrorCatcher(sys.stderr)) as stream:
            code = main(argv)
        return code, stream.error


class _ErrorCatcher(io.TextIOBase):
    """A stream that passes all on except the error line, which the driver prints."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.error = stream, ""

    def write(self, text: str) -> int:
        if text.startswith(_ERROR_PREFIX):
            self.error = text.removeprefix(_ERROR_PREFIX).strip()
        else:
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

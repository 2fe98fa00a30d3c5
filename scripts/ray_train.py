"""Run ``memtx fit`` by Ray Train, whose trainer starts, watches and restarts the workers.

    pip install memtx 'ray[default,train]'
    ray start --head --num-cpus 2        # or an existing cluster; without one, Ray starts on this machine
    python scripts/ray_train.py --num-workers 2 --max-failures 3 -- --config configs/quickstart.yaml --run_dir runs/ray

The YAML and all options after ``--`` are those of ``memtx fit``. Each worker runs the command as torchrun would run it
in one of ``--num-workers`` processes. If one dies, Ray Train starts all of them again, and they resume from the newest
checkpoint of the run, which lies on a disk that all nodes share. ``memtx fit --engine ray`` does the same without Ray
Train and its packages; this is for those who submit a trainer, for instance under Ray Tune or KubeRay.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer

from memtx.cli.main import main as run_command
from memtx.cli.ray_engine import resume_arguments, worker_environment


def train_worker(config: dict[str, Any]) -> None:
    """Run the command in one worker of Ray Train, which has already set up the process group.

    Raises:
        SystemExit: The command failed; its last line says why.
    """
    os.chdir(config["folder"])  # Paths are relative to the driver's folder.
    sys.argv[0] = "memtx"  # named in the command to type next
    context = get_context()
    master = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    size = context.get_local_world_size()
    os.environ.update(worker_environment(context.get_world_rank(), size, context.get_world_size(), master))
    arguments = resume_arguments(["fit", *config["arguments"]], Path(config["run_dir"]))
    if run_command(arguments):
        raise SystemExit(f"memtx {' '.join(arguments)} failed.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run memtx fit by Ray Train.")
    parser.add_argument("--num-workers", type=int, default=2, help="processes, each with a CPU (and a GPU)")
    parser.add_argument("--max-failures", type=int, default=3, help="deaths of a worker before the run ends")
    parser.add_argument("--gpus", action="store_true", help="give each worker a GPU")
    parser.add_argument("arguments", nargs="+", help="options of memtx fit, after --")
    options = parser.parse_args()
    run_dir = run_folder(options.arguments)
    path = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)  # a checkout that is not installed
    environment = {"env_vars": {"PYTHONPATH": path}}
    try:
        ray.init("auto", runtime_env=environment)
    except ConnectionError:
        ray.init("local", num_cpus=options.num_workers, runtime_env=environment)
    failures = FailureConfig(max_failures=options.max_failures)
    TorchTrainer(
        train_worker,
        train_loop_config={"arguments": options.arguments, "run_dir": run_dir, "folder": str(Path.cwd())},
        scaling_config=ScalingConfig(num_workers=options.num_workers, use_gpu=options.gpus),
        run_config=RunConfig(name="ray_train", storage_path=run_dir, failure_config=failures),
    ).fit()


def run_folder(arguments: list[str]) -> str:
    """Return the absolute path that ``--run_dir`` names."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--run_dir", required=True)
    known, _ = parser.parse_known_args(arguments)
    return str(Path(known.run_dir).absolute())


if __name__ == "__main__":
    main()

"""Number of processes of a run that torchrun or SLURM's srun started."""

from __future__ import annotations

from collections.abc import Mapping


def get_trainer_kwargs(environment: Mapping[str, str]) -> dict[str, int]:
    """Return the trainer's ``devices`` (per node) and ``num_nodes`` under a launcher, else nothing.

    Lightning reads ranks and addresses from the launcher by itself, but not these two numbers.

    Args:
        environment: Environment of the process.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        devices = _read_int(environment, "LOCAL_WORLD_SIZE")
        return {"devices": devices, "num_nodes": max(1, _read_int(environment, "WORLD_SIZE") // devices)}
    # As in Lightning, where these two job names stand for an interactive shell.
    if "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = _read_int(environment, "SLURM_NNODES")
        return {"devices": max(1, _read_int(environment, "SLURM_NTASKS") // nodes), "num_nodes": nodes}
    return {}


def _read_int(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() and int(text) else 1

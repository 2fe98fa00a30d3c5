"""How many processes a run has where something else started them: torchrun, or SLURM's srun."""

from __future__ import annotations

from collections.abc import Mapping


def get_trainer_kwargs(environment: Mapping[str, str]) -> dict[str, int]:
    """Return the trainer's ``devices`` (of a node) and ``num_nodes`` as the launcher tells them; nothing without one.

    Lightning takes ranks and addresses from the launcher by itself, but wants these two numbers said once more.

    Args:
        environment: the process's.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        local = _read_int(environment, "LOCAL_WORLD_SIZE")
        return {"devices": local, "num_nodes": max(1, _read_int(environment, "WORLD_SIZE") // local)}
    # As Lightning does, which takes these two names for a shell that was asked for, not for a job.
    if "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = _read_int(environment, "SLURM_NNODES")
        return {"devices": max(1, _read_int(environment, "SLURM_NTASKS") // nodes), "num_nodes": nodes}
    return {}


def _read_int(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() and int(text) else 1

"""A job that SLURM is about to end, put back into its queue."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping

from memtx.errors import MemtxError

_JOB_ID = re.compile(r"\d+(_\d+)?")


def get_job_id(environment: Mapping[str, str]) -> str | None:
    """Return the number of the SLURM job that this process is of, such as 12 or, of an array, 12_3; None without."""
    number = environment.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in environment:
        number = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    return number if number is not None and _JOB_ID.fullmatch(number) else None


def requeue(job_id: str) -> None:
    """Put a job back into the queue; SLURM ends it, and begins it anew with the same command.

    Raises:
        MemtxError: SLURM refused.
    """
    try:
        done = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True, check=False)
        why = done.stderr.strip() or done.stdout.strip() if done.returncode else ""
    except OSError as error:
        why = error.strerror or str(error)
    else:
        if not done.returncode:
            return
    raise MemtxError(
        f"The checkpoint is written, but `scontrol requeue {job_id}` failed: {why or 'no reason given'}.",
        "Submit the job again: with --ckpt_path last it goes on.",
    )

"""Requeueing of a SLURM job that is about to end."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping

from memtx.errors import MemtxError

_JOB_ID = re.compile(r"\d+(_\d+)?")


def get_job_id(environment: Mapping[str, str]) -> str | None:
    """Return the ID of this process's SLURM job, such as 12 or, in an array, 12_3; None outside of SLURM."""
    job_id = environment.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in environment:
        job_id = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    return job_id if job_id is not None and _JOB_ID.fullmatch(job_id) else None


def requeue(job_id: str) -> None:
    """Requeue a job, which SLURM ends and starts again with the same command; raises MemtxError if it refuses."""
    try:
        result = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True, check=False)
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        if not result.returncode:
            return
        reason = result.stderr.strip() or result.stdout.strip()
    raise MemtxError(
        f"The checkpoint is written, but `scontrol requeue {job_id}` failed: {reason or 'no reason given'}.",
        "Submit the job again: it resumes with --ckpt_path last.",
    )

"""Random states of a process, as what a checkpoint can hold without pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch


def get_rng_state() -> dict[str, Any]:
    """Return the states of torch's, CUDA's, numpy's and Python's generators as tensors and texts."""
    version, keys, gauss = random.getstate()
    name, words, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": json.dumps([name, numpy.asarray(words).tolist(), *rest]),
        "python": json.dumps([version, list(keys), gauss]),
    }


def set_rng_state(states: Mapping[str, Any]) -> None:
    """Put back what :func:`get_rng_state` returned."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, words, *rest = json.loads(states["numpy"])
    numpy.random.set_state((name, numpy.asarray(words, dtype=numpy.uint32), *rest))
    version, keys, gauss = json.loads(states["python"])
    random.setstate((version, tuple(keys), gauss))


def reseed_for_rank(rank: int) -> None:
    """Seed the generators from what they are about to draw and a number, so that equal states go apart."""
    drawn = int(torch.randint(2**62, ()))
    seed = int(numpy.random.SeedSequence([drawn, rank]).generate_state(1)[0])
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)

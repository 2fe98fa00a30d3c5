"""Random states of a process in a form that a checkpoint can hold without pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch


def get_rng_state() -> dict[str, Any]:
    """Return the states of the generators of torch, CUDA, numpy and Python as tensors and strings."""
    version, keys, gauss = random.getstate()
    name, words, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": json.dumps([name, numpy.asarray(words).tolist(), *rest]),
        "python": json.dumps([version, list(keys), gauss]),
    }


def set_rng_state(states: Mapping[str, Any]) -> None:
    """Restore the states returned by :func:`get_rng_state`."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, words, *rest = json.loads(states["numpy"])
    numpy.random.set_state((name, numpy.asarray(words, dtype=numpy.uint32), *rest))
    version, keys, gauss = json.loads(states["python"])
    random.setstate((version, tuple(keys), gauss))


def reseed_for_rank(rank: int) -> None:
    """Reseed all generators from torch's next number and ``rank``, so that equal states diverge."""
    entropy = int(torch.randint(2**62, ()))
    seed = int(numpy.random.SeedSequence([entropy, rank]).generate_state(1)[0])
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)

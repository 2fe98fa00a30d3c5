"""The learning rate of Vaswani et al. 2017."""

from __future__ import annotations

import math

import pytest
import torch

from memtx import MemtxError
from memtx.training.optimizers import WarmupInverseSqrt


def test_the_rate_grows_to_its_peak_and_falls_with_the_square_root() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = WarmupInverseSqrt(optimizer, warmup_steps=10)
    for step in range(1, 50):
        # The paper's formula, divided by its value at the end of the warm-up.
        expected = 2.0 * min(step**-0.5, step * 10**-1.5) / 10**-0.5
        assert math.isclose(optimizer.param_groups[0]["lr"], expected), step
        optimizer.step()
        scheduler.step()
    resumed = WarmupInverseSqrt(optimizer, warmup_steps=20)
    resumed.load_state_dict(scheduler.state_dict())
    assert (resumed.warmup_steps, resumed.last_epoch) == (20, 49)
    with pytest.raises(MemtxError, match="warmup_steps"):
        WarmupInverseSqrt(optimizer, warmup_steps=0)

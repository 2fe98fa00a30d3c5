"""Precision on machines that are slow in bfloat16, and on those that are not."""

from __future__ import annotations

import pytest
import torch

from memtx.ops.cpu import bf16

KEPT = ("32-true", "64-true", "16-mixed", "bf16-true")


@pytest.mark.parametrize("fast", [False, True])
def test_float32_stands_in_on_slow_cpus_alone(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "is_cpu_bf16_fast", lambda: fast)
    for gpu in (False, True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda gpu=gpu: gpu)
        for name, on_cpu in (("cpu", True), ("auto", not gpu), ("cuda", False)):
            slow = on_cpu and not fast
            assert bf16.is_bf16_slow(name) == slow
            for asked in ("bf16-mixed", "bf16"):
                assert bf16.choose_precision(asked, name) == ("32-true" if slow else asked)
            # What else is asked for stays: float16 needs its scaler, and weights of bfloat16 half the memory.
            assert [bf16.choose_precision(one, name) for one in KEPT] == list(KEPT)

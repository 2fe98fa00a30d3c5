"""Choice of precision on machines with slow or fast bfloat16."""

from __future__ import annotations

import pytest
import torch

from memtx.ops.cpu import cpu_info

OTHER_PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-true")


@pytest.mark.parametrize("fast", [False, True])
def test_float32_replaces_bf16_mixed_on_slow_cpus_only(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_info, "is_cpu_bf16_fast", lambda: fast)
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda has_gpu=has_gpu: has_gpu)
        for accelerator, on_cpu in (("cpu", True), ("auto", not has_gpu), ("cuda", False)):
            slow = on_cpu and not fast
            assert cpu_info.is_bf16_slow(accelerator) == slow
            for precision in ("bf16-mixed", "bf16"):
                assert cpu_info.choose_precision(precision, accelerator) == ("32-true" if slow else precision)
            # Others stay: float16 needs its scaler, and bfloat16 weights halve the memory.
            chosen = [cpu_info.choose_precision(precision, accelerator) for precision in OTHER_PRECISIONS]
            assert chosen == list(OTHER_PRECISIONS)

"""Inductor's code generation for an H100 that exists in name only; the kernels it writes are not compiled."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import config as functorch_config
from torch._inductor import async_compile, config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.utils._triton import has_triton

from tests.gpu.aot import activate_target

H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip


class UncompiledKernel:
    """A kernel that does nothing."""

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Return at once."""


@contextlib.contextmanager
def h100_in_name() -> Iterator[None]:
    """Answer Inductor's questions about the device."""
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0),
        "get_device_properties": H100, "_exchange_device": 0, "_maybe_exchange_device": 0, "synchronize": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8, device="cpu"), "set_rng_state": None,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        for name, answer in (("get_device_properties", H100), ("get_compute_capability", 90), ("is_available", True)):
            stack.enter_context(patch.object(CudaInterface, name, lambda *_, answer=answer, **__: answer))
        stack.enter_context(patch.object(CudaInterface, "is_bf16_supported", lambda *_, **__: True))
        stack.enter_context(patch.object(CudaInterface.Worker, "get_device_properties", lambda *_: H100))
        stack.enter_context(patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True))
        stack.enter_context(patch.object(torch._C, "_cuda_setDevice", lambda _: None, create=True))
        stack.enter_context(patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(patch.object(async_compile.AsyncCompile, "triton", lambda *_, **__: UncompiledKernel()))
        # Constant folding and padding of products run operators, of which a device in name has none.
        options = {"joint_graph_constant_folding": False, "shape_padding": False}
        stack.enter_context(config.patch(fx_graph_cache=False, compile_threads=1, **options))
        has_triton.cache_clear()
        yield
    has_triton.cache_clear()


class InductorTimer:
    """A backend of ``torch.compile`` that generates code for its first graph only, and runs all graphs uncompiled.

    Attributes:
        num_graphs: Number of graphs.
        seconds: Processor time of the code generation, forward and backward.
    """

    def __init__(self) -> None:
        self.num_graphs, self.seconds = 0, list[float]()
        activate_target(90)

    def _compile_graph(self, graph: Any, inputs: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        with h100_in_name():
            compiled = compile_fx_inner(graph, inputs, **kwargs)
        self.seconds.append(time.process_time() - began)
        return compiled

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.num_graphs += 1
        if self.num_graphs == 1:
            options = {"joint_graph_constant_folding": False, "shape_padding": False}
            with config.patch(options), functorch_config.patch(force_non_lazy_backward_lowering=True):
                compile_fx(graph, inputs, inner_compile=self._compile_graph)
        return graph.forward

"""The Triton kernels compile as launched, without a GPU, and fit the chips: shared memory, registers, tensor cores."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from memtx.memory.compressed import CompressedMemory
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.segment import Segment

pytest.importorskip("triton", reason="the package triton is not installed")
triton_window = pytest.importorskip("memtx.ops.attention.triton_window")
triton_decode = pytest.importorskip("memtx.ops.attention.triton_decode")
if triton_window.IS_INTERPRETED:
    pytest.skip("Triton's interpreter is on: nothing is compiled", allow_module_level=True)

from tests.gpu.aot import MAX_SHARED_MEMORY, Launch, read_ptxas_log, record_launches  # noqa: E402

# Bytes that float32 kernels store and load. Half as many queries in a tile would load keys twice as often.
MAX_SPILLED = {(89, "_backward_keys", 64): 16}


def launch_window(dtype: torch.dtype, head_dim: int, segment: int = 128, batch_size: int = 2) -> None:
    """Launch the kernels of a layer of [bank | window], forward and backward, with its projections' layouts."""
    memory = CompressedMemory(64, window=128, compression_rate=4, num_entries=64)
    positions = Segment.from_document_starts(torch.full((batch_size,), 100_000), segment)
    visibility = memory._bank_plan(positions, memory._evicted_blocks(positions)).entry_positions.visibility
    q = torch.zeros(batch_size, segment, 8, head_dim, dtype=dtype).transpose(1, 2).requires_grad_()
    k = torch.zeros(batch_size, visibility.num_keys, 4, head_dim, dtype=dtype).transpose(1, 2).requires_grad_()
    joint = torch.zeros(batch_size, visibility.num_keys, 2, 4, head_dim, dtype=dtype, requires_grad=True)
    out, lse = triton_window.attend(q, k, joint.unbind(-3)[1].transpose(1, 2), visibility, scale=head_dim**-0.5)
    (out.float().sum() + lse.sum()).backward()


def launch_decode(dtype: torch.dtype, head_dim: int, num_slots: int = 1027, batch_size: int = 1) -> None:
    """Launch the kernels of one token per stream."""
    q, k = (torch.zeros(batch_size, heads, head_dim, dtype=dtype) for heads in (8, 4))
    hidden = torch.zeros(batch_size, num_slots, 64, dtype=dtype)
    key_value = torch.zeros(batch_size, num_slots, 2, 4, head_dim, dtype=dtype)
    slot, visible = torch.zeros(batch_size, dtype=torch.int64), torch.ones(batch_size, num_slots, dtype=torch.bool)
    angles = torch.zeros(batch_size, head_dim // 2, 2)
    triton_decode.attend_ring(q, k, k, angles, hidden[:, 0], hidden, key_value, slot, visible, head_dim**-0.5)


def check_fit(launches: list[Launch], arch: int, dtype: torch.dtype, head_dim: int, *, uses_tensor_cores: bool) -> None:
    for launch in launches:
        name = f"{launch.kernel} in {dtype} with heads of {head_dim} on sm_{arch}"
        assert launch.compiled.metadata.shared <= MAX_SHARED_MEMORY[arch], name
        facts = read_ptxas_log(launch.compiled, arch)
        max_spilled = MAX_SPILLED.get((arch, launch.kernel, head_dim), 0) if dtype == torch.float32 else 0
        assert facts["spilled"] <= max_spilled, f"{name}: {facts}"
        instruction = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(arch, "mma.sync")
        if uses_tensor_cores:
            assert instruction in launch.compiled.asm["ptx"], name


FAST = {(80, "bf16", 64), (89, "bf16", 128), (90, "bf16", 64), (90, "bf16", 128), (90, "fp32", 64), (100, "bf16", 64)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in [(arch, dtype, dim) for arch in (80, 89, 90, 100) for dtype in DTYPES for dim in (32, 64, 128)]
    ],
)
def test_window_kernels_fit(arch: int, dtype: str, head_dim: int) -> None:
    with record_launches(arch, triton_window) as launches:
        launch_window(DTYPES[dtype], head_dim)
    assert [launch.kernel for launch in launches] == ["_forward", "_backward_queries", "_backward_keys"]
    # The smallest product of float16 and bfloat16 on tensor memory is wider than a head of 32.
    uses_tensor_cores = dtype != "fp32" and (arch, head_dim) != (100, 32)
    check_fit(launches, arch, DTYPES[dtype], head_dim, uses_tensor_cores=uses_tensor_cores)


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 89, 100))])
def test_decode_kernels_fit(arch: int) -> None:
    with record_launches(arch, triton_decode) as launches:
        launch_decode(torch.bfloat16, 64)
    assert [launch.kernel for launch in launches] == ["_attend_slots", "_merge_parts"]
    check_fit(launches, arch, torch.bfloat16, 64, uses_tensor_cores=False)


def count_kernels(module: ModuleType, launch: Any, shapes: list[tuple[int, int]]) -> int:
    with record_launches(90, module) as launches:
        for size, batch_size in shapes:
            launch(torch.bfloat16, 64, size, batch_size)
    return len({(item.kernel, id(item.compiled)) for item in launches})


def test_a_kernel_serves_all_lengths() -> None:
    shapes = [(17, 1), (64, 2), (100, 3), (128, 16)]
    assert count_kernels(triton_window, launch_window, shapes) == 3


def test_a_decode_kernel_serves_all_batch_sizes() -> None:
    # Attention compiles for one part and for several, which are float32; merging for each power of two of parts.
    assert count_kernels(triton_decode, launch_decode, [(1027, 1), (1024, 3), (640, 4), (515, 64), (700, 99)]) <= 5


def test_more_streams_than_an_axis_of_the_grid_has() -> None:
    batch_size = 70_000
    offset = torch.zeros(1, 2, dtype=torch.int64)
    visibility = Visibility(offset, offset + 2, 2, (KeyRange(2),))
    q = torch.zeros(batch_size, 1, 2, 32, dtype=torch.bfloat16, requires_grad=True)
    with record_launches(90, triton_window) as launches:
        triton_window.attend(q, q, q, visibility, scale=1.0)[0].sum().backward()
    for launch in launches:
        assert launch.grid[0] == batch_size
        assert all(size <= 65_535 for size in launch.grid[1:])


def test_precision_set_by_backend() -> None:
    """``torch.get_float32_matmul_precision`` raises once a user has set the backend's own option."""
    matmul = torch.backends.cuda.matmul
    original = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with record_launches(90, triton_window) as launches:
            launch_window(torch.float32, 32)
        assert triton_window.get_dot_precision(torch.float32) == "tf32"
    finally:
        matmul.fp32_precision = original
    assert len(launches) == 3

"""Cases that test_triton_window.py runs in a separate process, with Triton's interpreter in place of a GPU."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from hypothesis import given, settings
from torch import Tensor, nn

from memtx import CompressedMemory, MemoryTransformer, RecurrentMemory
from memtx.inference.decoder import Decoder
from memtx.layers.positions.base import NoPositions
from memtx.layers.positions.rotary import Rotary
from memtx.ops.attention import reference
from memtx.ops.attention.dispatch import segment_attention
from memtx.ops.attention.mask import KeyRange, Visibility
from tests.ops.attention.strategies import Problem, problems
from tests.ops.attention.test_backends import max_error, solve


def attend(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, bias: Any, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Call the kernel through the public function."""
    return segment_attention(q, k, v, visibility, bias=bias, scale=scale, backend="triton", return_lse=True)


def check_gradients(dtype: torch.dtype, tolerance: float, examples: int) -> None:
    """Compare outputs, log-sum-exp and all gradients with the float64 reference."""

    @given(problems(max_queries=40, biases=("none",), head_dims=(32, 64)))
    @settings(deadline=None, max_examples=examples, derandomize=True, database=None)
    def compare(problem: Problem) -> None:
        expected = solve(reference.attend, problem, torch.float64)
        error = max_error(solve(attend, problem, dtype), expected)
        assert error <= tolerance, f"off by {error}"

    compare()


def check_strides() -> None:
    """Compare with heads after tokens, as projections return them, and an inner stride that is not 1."""
    torch.manual_seed(0)
    offset = torch.arange(20)[None]
    visibility = Visibility(offset, offset + 8, 20, (KeyRange(20, 0, 1, 8),))
    q = torch.randn(2, 20, 4, 32).transpose(1, 2)
    k = torch.randn(2, 20, 2, 64).transpose(1, 2)[..., ::2]
    out, _ = segment_attention(q, k, k, visibility, backend="triton")
    expected, _ = segment_attention(q, k, k, visibility, backend="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def check_decoding(memory: Any, dtype: torch.dtype, tolerance: float, **options: Any) -> None:
    """Compare steps of the decoding kernel, and the rings that it writes, with those of the plain operators."""
    decoders = []
    for backend in ("auto", "triton"):
        torch.manual_seed(0)
        arguments = {"dim": 64, "depth": 1, "heads": 4, "memories": [memory], "attention_backend": backend} | options
        model = MemoryTransformer(50, **arguments).to(dtype).eval()
        tokens = torch.randint(0, 50, (25, 2), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            # The kernel of segments supports fewer widths of heads.
            state = decoders[0].state if decoders else model(tokens[:20].T).state
        decoders.append(Decoder(model, state))
    for token in tokens[20:]:
        plain, fused = (decoder.step(token) for decoder in decoders)
        torch.testing.assert_close(fused, plain, rtol=0, atol=tolerance)
    assert decoders[0].state.equals(decoders[1].state, atol=tolerance)


def check_all_decoding() -> None:
    """Cover evicted blocks, grouped heads, odd widths, norms and gates, no and partial rotation, many parts."""
    compressed = partial(CompressedMemory, window=12, compression_rate=4, num_entries=5)
    check_decoding(compressed, torch.float32, 1e-5)
    check_decoding(compressed, torch.float32, 1e-5, kv_heads=2, qk_norm=nn.RMSNorm, output_gate=True)
    check_decoding(partial(RecurrentMemory, window=70), torch.float32, 1e-5, kv_heads=1, head_dim=20)
    check_decoding(partial(RecurrentMemory, window=7), torch.float32, 1e-5, positions=NoPositions)
    # Products are rounded to 11 bits in another order.
    window = partial(RecurrentMemory, window=130)
    check_decoding(window, torch.float16, 1e-2, positions=partial(Rotary, rotary_dim=8))


if __name__ == "__main__":
    check_strides()
    check_all_decoding()
    check_gradients(torch.float32, 1e-5, int(sys.argv[1]))
    # Inputs are rounded to 11 bits, weights and gradients again.
    check_gradients(torch.float16, 1e-2, int(sys.argv[1]))

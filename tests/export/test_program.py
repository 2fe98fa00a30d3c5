"""A program of torch.export computes what the model does, with the state as named inputs and outputs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memtx.errors import MemtxError
from memtx.export.decompositions import ONNX_DECOMPOSITIONS
from memtx.export.program import export_step
from memtx.layers.mixture_of_experts import MixtureOfExperts
from memtx.memory.base import View
from memtx.models.encoder import Encoder
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.transformer_xl import TransformerXL
from tests.export.models import max_difference, model_of
from tests.memory_zoo import KINDS
from tests.third_party_memory import RunningMean

FAST = [("compressed-convolution", "associative-gated", "copy"), ("gated-delta-net", "slots", "sinks-with-positions")]
CUTTING = ("tokens", "rmt", "armt", "ernie-doc")
REST = [kind for kind in KINDS if kind not in {*FAST[0], *FAST[1], *CUTTING}]
SLOW = [tuple(REST[start : start + 4]) for start in range(0, len(REST), 4)]


@pytest.mark.parametrize("kinds", [*FAST, *(pytest.param(kinds, marks=pytest.mark.slow) for kinds in SLOW)])
def test_program_equals_the_model(kinds: tuple[str, ...]) -> None:
    model = model_of(*kinds)
    program = export_step(model, 8, batch_size=2)
    # float32: kernels of the CPU, which no program holds, sum in another order, and some states are near 100.
    assert max_difference(program.module(), model, 8) < 1e-4


def test_program_is_saved_and_loaded(tmp_path: Path) -> None:
    model = model_of("recurrent")
    torch.export.save(export_step(model, 1), tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2")
    assert max_difference(loaded.module(), model, 1, batch_size=1) < 1e-6
    names = {str(node.target) for node in loaded.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if "memtx" in name or "mkldnn" in name]


def test_transformer_xl_with_clusters_is_exported() -> None:
    torch.manual_seed(0)
    model = TransformerXL(30, dim=8, depth=2, heads=2, memory_length=6, cutoffs=[8, 20], div_value=2).eval()
    assert max_difference(export_step(model, 7, 2).module(), model, 7) < 1e-5


def test_experts_are_exported() -> None:
    torch.manual_seed(0)
    model = MemoryTransformer(
        11, dim=8, depth=1, heads=2, memories=[KINDS["recurrent"](6, 3, 4)],
        feed_forward=partial(MixtureOfExperts, hidden_dim=6, num_experts=4, top_k=2),
    ).eval()  # fmt: skip
    assert max_difference(export_step(model, 7, 2).module(), model, 7) < 1e-5


@pytest.mark.parametrize("kind", CUTTING)
def test_memories_that_cut_segments_are_exported_for_single_tokens(kind: str) -> None:
    model = model_of(kind)
    name = type(model.blocks[0].attention.memories[-1]).__name__
    with pytest.raises(MemtxError, match=f"{name} cuts segments.*1 token"):
        export_step(model, 4)
    assert max_difference(export_step(model, 1, 2).module(), model, 1) < 1e-5


class DecidesByValue(RunningMean):
    def read(self, state: Any, x: Tensor, segment: Any, attention: Any) -> View:
        return super().read(state, x * 2 if float(x.sum()) > 0 else x, segment, attention)


def test_a_part_that_decides_by_values_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("recurrent")
    model.blocks[0].attention.set_memories(model.blocks[0].attention.memory, [DecidesByValue(8)], gated_memory=False)
    with pytest.raises(MemtxError, match=r"^DecidesByValue cannot be exported: [^\n]*$"):
        export_step(model, 4)
    assert not any(capsys.readouterr())


def test_other_models_are_refused() -> None:
    with pytest.raises(MemtxError, match="Encoder cannot be exported: it does not read segments"):
        export_step(Encoder(20, dim=8, depth=1, heads=2), 4)
    with pytest.raises(MemtxError, match="no language modeling head"):
        export_step(TransformerXL(30, dim=8, depth=1, heads=2, add_lm_head=False), 4)
    with pytest.raises(MemtxError, match="segment_length is 0"):
        export_step(model_of("recurrent"), 0)


def test_export_leaves_the_model_unchanged() -> None:
    model = model_of("recurrent").to(torch.bfloat16).train()
    program = export_step(model, 3)
    assert model.training
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert {x.dtype for x in program.state_dict.values() if x.is_floating_point()} == {torch.float32}


def test_decompositions_equal_the_operators() -> None:
    torch.manual_seed(0)
    aten = torch.ops.aten
    cummax, cummin = (ONNX_DECOMPOSITIONS[op] for op in (aten.cummax.default, aten.cummin.default))
    for length in (1, 2, 13):
        x = torch.randint(-9, 9, (2, length, 3))
        assert torch.equal(cummax(x, 1)[0], x.cummax(1).values)
        assert torch.equal(cummin(x, -2)[0], x.cummin(1).values)
    argsort = ONNX_DECOMPOSITIONS[aten.argsort.stable]
    order = torch.stack([torch.randperm(9) for _ in range(3)])
    assert torch.equal(argsort(order, stable=True, dim=1), order.argsort(dim=1))
    assert torch.equal(
        argsort(order.int(), stable=True, dim=-1, descending=True), order.argsort(dim=1, descending=True)
    )


def test_logarithms_of_sums_do_not_overflow() -> None:
    aten = torch.ops.aten
    logsumexp, logaddexp = (ONNX_DECOMPOSITIONS[op] for op in (aten.logsumexp.default, aten.logaddexp.default))
    x = torch.tensor([[500.0, 499.0, -torch.inf], [-torch.inf] * 3, [-900.0, 3.0, 3.0]])
    torch.testing.assert_close(logsumexp(x, [-1]), x.logsumexp(-1))
    torch.testing.assert_close(logsumexp(x, [1], True), x.logsumexp(1, keepdim=True))
    torch.testing.assert_close(logaddexp(x, x.flip(1)), torch.logaddexp(x, x.flip(1)))
    torch.testing.assert_close(logaddexp(x, x), torch.logaddexp(x, x))


@pytest.mark.parametrize("size", [1, 5, 32])
def test_triangular_solution_is_stable_for_repeated_keys(size: int) -> None:
    """Equal keys fill the system with ones; its powers grow to 1e8 there, and cancel in the result."""
    solve = ONNX_DECOMPOSITIONS[torch.ops.aten.linalg_solve_triangular.default]
    right_side = torch.randn(2, size, 3, generator=torch.Generator().manual_seed(0))
    for system in (torch.ones(2, size, size).tril(-1), torch.rand(2, size, size).tril(-1)):
        expected = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
        actual = solve(system, right_side, upper=False, unitriangular=True)
        # float32: sums in another order.
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)

"""The state as a value: every operation gives a new one, files give back what was saved or say why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx import files
from memtx.errors import CheckpointError, MemtxError
from memtx.memory.compressed import CompressedState
from memtx.memory.none import NoState
from memtx.memory.recurrent import RecurrentState
from memtx.state import MemoryState

NAMES = ["position", "layers[0][0].hidden", "layers[0][0].bank", "layers[1][0].hidden"]


def drawn(rows: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, bank: int = 5) -> MemoryState:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator).to(dtype)

    compressed = CompressedState(numbers(4, 2), numbers(bank, 2))
    position = torch.randint(1, 1 << 40, (rows,), generator=generator)
    return MemoryState(position, ((compressed, NoState()), (RecurrentState(numbers(3, 2)),)))


def test_is_a_tree_with_names() -> None:
    state = drawn()
    assert list(state.named_tensors()) == NAMES
    leaves, spec = pytree.tree_flatten(state)
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again.layers[0][0], CompressedState)
    assert again.layers[0][0].bank is state.layers[0][0].bank
    assert again.equals(state)


def test_is_frozen() -> None:
    with pytest.raises(AttributeError):
        drawn().position = torch.zeros(3)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        drawn().layers[0][0].bank = torch.zeros(3)


def test_nbytes_and_rows() -> None:
    state = drawn(rows=2)
    assert state.batch_size == 2
    assert state.nbytes == 2 * (8 + 4 * (4 * 2 + 5 * 2 + 3 * 2))


def test_detach_cuts_the_graph_and_leaves_the_old() -> None:
    state = drawn().map(lambda leaf: leaf.requires_grad_() * 2 if leaf.is_floating_point() else leaf)
    cut = state.detach()
    assert cut.equals(state)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(cut))
    assert state.layers[0][0].hidden.requires_grad


def test_reset_is_zero_for_the_marked_rows_only() -> None:
    state = drawn()
    before = state.map(torch.clone)
    reset = state.reset(torch.tensor([False, True, False]))
    assert all(not leaf[1].any() for leaf in pytree.tree_leaves(reset))
    assert reset.select([0, 2]).equals(state.select([0, 2]))
    assert state.equals(before)


def test_reset_forgets_even_what_is_not_a_number() -> None:
    state = drawn().map(lambda leaf: leaf * float("nan") if leaf.is_floating_point() else leaf)
    reset = state.reset(torch.ones(3, dtype=torch.bool))
    assert all(not leaf.any() for leaf in pytree.tree_leaves(reset))


def test_select_and_concat_are_inverse() -> None:
    state = drawn()
    parts = [state.select([i]) for i in range(3)]
    assert MemoryState.concat(parts).equals(state)
    twice = state.select(torch.tensor([2, 2, 0]))
    assert twice.select([0]).equals(twice.select([1]))
    assert twice.select([2]).equals(parts[0])


def test_equals_sees_every_difference() -> None:
    state = drawn()
    for name, tensor in state.named_tensors().items():
        changed = tensor.clone()
        changed[1] += 1
        assert not state.equals(state.with_named_tensors({**state.named_tensors(), name: changed}))
    near = state.map(lambda leaf: leaf + 1e-6 if leaf.is_floating_point() else leaf)
    assert not state.equals(near)
    assert state.equals(near, atol=1e-5)
    assert not state.equals(state.to(dtype=torch.float64))
    assert not state.equals(state.select([0]))


def test_to_moves_numbers_but_not_positions() -> None:
    moved = drawn().to("cpu", torch.bfloat16)
    assert [leaf.dtype for leaf in moved.named_tensors().values()] == [torch.int64, *[torch.bfloat16] * 3]


@pytest.mark.parametrize(
    "rows", [torch.tensor([True, False]), torch.tensor([0, 1, 0]), torch.zeros(3, 1, dtype=torch.bool)]
)
def test_reset_refuses(rows: Tensor) -> None:
    with pytest.raises(MemtxError, match=r"expected a bool tensor of shape \(3,\)"):
        drawn().reset(rows)


@pytest.mark.parametrize("rows", [[3], [-1], [True, False, True], torch.tensor(1), [0.5]])
def test_select_refuses(rows: list[int]) -> None:
    with pytest.raises(MemtxError, match="select got"):
        drawn().select(rows)


@pytest.mark.parametrize(
    "states",
    [
        [],
        [drawn(), drawn(bank=6)],
        [drawn(), drawn(dtype=torch.float64)],
        [drawn(), MemoryState(torch.zeros(1, dtype=torch.int64), ())],
    ],
)
def test_concat_refuses(states: list[MemoryState]) -> None:
    with pytest.raises(MemtxError, match="concat got"):
        MemoryState.concat(states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_and_loaded_is_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    state = drawn(dtype=dtype)
    state.save(tmp_path / "a.safetensors", "print", tokens="12")
    loaded = MemoryState.load(tmp_path / "a.safetensors", like=drawn(1, 7, dtype), fingerprint="print")
    assert loaded.equals(state)
    assert files.load_tensors(tmp_path / "a.safetensors", kind="memtx.state", version=2)[1]["tokens"] == "12"
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_load_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    path, state = tmp_path / "a.safetensors", drawn()

    def refused(says: str, like: MemoryState = state, fingerprint: str = "print") -> None:
        with pytest.raises(CheckpointError, match=says):
            MemoryState.load(path, like=like, fingerprint=fingerprint)

    refused("does not exist")
    state.save(path, "print")
    whole = path.read_bytes()
    refused("another model", fingerprint="other")
    refused(
        "layers\\[0\\]\\[0\\].bank is torch.float32 \\(3, 5, 2\\), expected torch.float32 \\(rows, 6", drawn(bank=6)
    )
    refused("expected torch.float64", drawn(dtype=torch.float64))
    refused("has layers", MemoryState(state.position, ()))
    refused("lacks layers\\[2\\]", MemoryState(state.position, (*state.layers, state.layers[1])))
    for size in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused("not a whole safetensors file")
    files.save_tensors(path, state.named_tensors(), kind="memtx.other", version=1, fingerprint="print")
    refused("holds 'memtx.other', expected 'memtx.state'")
    files.save_tensors(path, state.named_tensors(), kind="memtx.state", version=1, fingerprint="print")
    refused("format version 1, this release reads 2")
    uneven = {**state.named_tensors(), "position": torch.zeros(2, dtype=torch.int64)}
    files.save_tensors(path, uneven, kind="memtx.state", version=2, fingerprint="print")
    refused("is torch.int64 \\(2,\\)")

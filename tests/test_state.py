"""The state as a value: operations return a new state; saved files load unchanged or raise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx import files
from memtx.errors import CheckpointError, MemtxError
from memtx.memory.associative import AssociativeState
from memtx.memory.compressed import CompressedState
from memtx.memory.none import NoState
from memtx.memory.recurrent import RecurrentState
from memtx.state import MemoryState

NAMES = ["position", "layers[0][0].hidden", "layers[0][0].bank", "layers[1][0].hidden"]


def random_state(
    batch_size: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, num_entries: int = 5
) -> MemoryState:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator).to(dtype)

    compressed = CompressedState(randn(4, 2), randn(num_entries, 2))
    position = torch.randint(1, 1 << 40, (batch_size,), generator=generator)
    return MemoryState(position, ((compressed, NoState()), (RecurrentState(randn(3, 2)),)))


def test_state_is_a_pytree_with_named_leaves() -> None:
    state = random_state()
    assert list(state.named_tensors()) == NAMES
    leaves, spec = pytree.tree_flatten(state)
    rebuilt = pytree.tree_unflatten(leaves, spec)
    assert isinstance(rebuilt.layers[0][0], CompressedState)
    assert rebuilt.layers[0][0].bank is state.layers[0][0].bank
    assert rebuilt.equals(state)


def test_state_is_frozen() -> None:
    with pytest.raises(AttributeError):
        random_state().position = torch.zeros(3)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        random_state().layers[0][0].bank = torch.zeros(3)


def test_nbytes_and_batch_size_match_the_tensors() -> None:
    state = random_state(batch_size=2)
    assert state.batch_size == 2
    assert state.nbytes == 2 * (8 + 4 * (4 * 2 + 5 * 2 + 3 * 2))


def test_detach_leaves_the_original_attached() -> None:
    state = random_state().map(lambda leaf: leaf.requires_grad_() * 2 if leaf.is_floating_point() else leaf)
    detached = state.detach()
    assert detached.equals(state)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(detached))
    assert state.layers[0][0].hidden.requires_grad


def test_reset_zeros_the_marked_streams_only() -> None:
    state = random_state()
    before = state.map(torch.clone)
    reset = state.reset(torch.tensor([False, True, False]))
    assert all(not leaf[1].any() for leaf in pytree.tree_leaves(reset))
    assert reset.select([0, 2]).equals(state.select([0, 2]))
    assert state.equals(before)


def test_reset_clears_nan() -> None:
    state = random_state().map(lambda leaf: leaf * float("nan") if leaf.is_floating_point() else leaf)
    reset = state.reset(torch.ones(3, dtype=torch.bool))
    assert all(not leaf.any() for leaf in pytree.tree_leaves(reset))


def test_select_and_concat_are_inverse() -> None:
    state = random_state()
    parts = [state.select([index]) for index in range(3)]
    assert MemoryState.concat(parts).equals(state)
    repeated = state.select(torch.tensor([2, 2, 0]))
    assert repeated.select([0]).equals(repeated.select([1]))
    assert repeated.select([2]).equals(parts[0])


def test_equals_detects_every_difference() -> None:
    state = random_state()
    for name, tensor in state.named_tensors().items():
        changed = tensor.clone()
        changed[1] += 1
        assert not state.equals(state.with_named_tensors({**state.named_tensors(), name: changed}))
    near = state.map(lambda leaf: leaf + 1e-6 if leaf.is_floating_point() else leaf)
    assert not state.equals(near)
    assert state.equals(near, atol=1e-5)
    assert not state.equals(state.to(dtype=torch.float64))
    assert not state.equals(state.select([0]))


def test_to_casts_floating_point_tensors_only() -> None:
    cast = random_state().to("cpu", torch.bfloat16)
    assert [leaf.dtype for leaf in cast.named_tensors().values()] == [torch.int64, *[torch.bfloat16] * 3]


@pytest.mark.parametrize(
    "mask", [torch.tensor([True, False]), torch.tensor([0, 1, 0]), torch.zeros(3, 1, dtype=torch.bool)]
)
def test_reset_rejects_a_bad_mask(mask: Tensor) -> None:
    with pytest.raises(MemtxError, match=r"expected a bool tensor of shape \(3,\)"):
        random_state().reset(mask)


@pytest.mark.parametrize("indices", [[3], [-1], [True, False, True], torch.tensor(1), [0.5]])
def test_select_rejects_bad_indices(indices: list[int]) -> None:
    with pytest.raises(MemtxError, match="select got"):
        random_state().select(indices)


@pytest.mark.parametrize(
    "states",
    [
        [],
        [random_state(), random_state(num_entries=6)],
        [random_state(), random_state(dtype=torch.float64)],
        [random_state(), MemoryState(torch.zeros(1, dtype=torch.int64), ())],
    ],
)
def test_concat_rejects_different_structures(states: list[MemoryState]) -> None:
    with pytest.raises(MemtxError, match="concat got"):
        MemoryState.concat(states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_loaded_state_equals_the_saved_state(tmp_path: Path, dtype: torch.dtype) -> None:
    state = random_state(dtype=dtype)
    state.save(tmp_path / "a.safetensors", "print", tokens="12")
    loaded = MemoryState.load(tmp_path / "a.safetensors", like=random_state(1, 7, dtype), fingerprint="print")
    assert loaded.equals(state)
    assert files.load_tensors(tmp_path / "a.safetensors", kind="memtx.state", version=2)[1]["tokens"] == "12"
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_compressed_state_is_close_to_the_saved_one(tmp_path: Path) -> None:
    hidden = torch.randn(2, 50, 64) * torch.rand(2, 50, 1) * 100
    hidden[0, 3] = 0.0
    layers = ((RecurrentState(hidden),), (AssociativeState(torch.randn(2, 4, 8, 8), torch.randn(2, 64)),))
    state = MemoryState(torch.tensor([3, 0]), layers)
    state.save(tmp_path / "exact", "print")
    state.save(tmp_path / "small", "print", dtype="int8")
    assert (tmp_path / "small").stat().st_size < 0.35 * (tmp_path / "exact").stat().st_size
    loaded = MemoryState.load(tmp_path / "small", like=state.reset(torch.tensor([True, True])), fingerprint="print")
    assert torch.equal(loaded.position, state.position)
    (entries,), (associative,) = loaded.layers
    # At most half a step of the largest number's 127.
    steps = hidden.abs().amax(-1, keepdim=True) / 127
    assert ((entries.hidden - hidden).abs() <= 0.501 * steps).all()
    matrix = layers[1][0].matrix
    assert associative.matrix.dtype == torch.float32
    assert ((associative.matrix - matrix).abs() <= matrix.abs() * 2**-8).all()
    with pytest.raises(MemtxError, match="dtype is 'int4'"):
        state.save(tmp_path / "other", "print", dtype="int4")  # type: ignore[arg-type]


def test_load_rejects_damaged_and_foreign_files(tmp_path: Path) -> None:
    path, state = tmp_path / "a.safetensors", random_state()

    def check_rejected(message: str, like: MemoryState = state, fingerprint: str = "print") -> None:
        with pytest.raises(CheckpointError, match=message):
            MemoryState.load(path, like=like, fingerprint=fingerprint)

    check_rejected("does not exist")
    state.save(path, "print")
    content = path.read_bytes()
    check_rejected("another model", fingerprint="other")
    check_rejected(
        "layers\\[0\\]\\[0\\].bank is torch.float32 \\(3, 5, 2\\), expected torch.float32 \\(batch, 6",
        random_state(num_entries=6),
    )
    check_rejected("expected torch.float64", random_state(dtype=torch.float64))
    check_rejected("has layers", MemoryState(state.position, ()))
    check_rejected("lacks layers\\[2\\]", MemoryState(state.position, (*state.layers, state.layers[1])))
    for size in (0, 5, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        check_rejected("not a valid safetensors file")
    files.save_tensors(path, state.named_tensors(), kind="memtx.other", version=1, fingerprint="print")
    check_rejected("holds 'memtx.other', expected 'memtx.state'")
    files.save_tensors(path, state.named_tensors(), kind="memtx.state", version=1, fingerprint="print")
    check_rejected("format version 1, this release reads 2")
    uneven = {**state.named_tensors(), "position": torch.zeros(2, dtype=torch.int64)}
    files.save_tensors(path, uneven, kind="memtx.state", version=2, fingerprint="print")
    check_rejected("is torch.int64 \\(2,\\)")

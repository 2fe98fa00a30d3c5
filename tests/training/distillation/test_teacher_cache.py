"""Cached logits on disk, also after a kill in the middle of a record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.errors import MemtxError
from memtx.training.distillation.teacher_cache import LogitCache, LogitTable, make_key, top_k_logits


def keys_of(*numbers: int) -> list[bytes]:
    return [make_key(bytes([number])) for number in numbers]


def test_the_next_run_finds_cached_logits(tmp_path: Path) -> None:
    logits = torch.randn(5, 9)
    values, index = top_k_logits(logits, 3)
    first = LogitCache(tmp_path / "new", "a" * 64, 3)
    assert first.get(keys_of(0)) is None
    first.put(keys_of(0, 1, 2), values[:3], index[:3])
    first.put(keys_of(2, 3, 4), values[2:], index[2:])
    for cache in (first, LogitCache(tmp_path / "new", "a" * 64, 3)):
        assert len(cache) == 5
        cached = cache.get(keys_of(4, 0, 4))
        assert cached is not None
        assert torch.equal(cached[0], values[[4, 0, 4]])
        assert torch.equal(cached[1], index[[4, 0, 4]])
        assert cache.get(keys_of(0, 9)) is None
    # Caches of another teacher or another top_k are separate.
    assert len(LogitCache(tmp_path / "new", "b" * 64, 3)) == 0
    assert len(LogitCache(tmp_path / "new", "a" * 64, 4)) == 0


def test_a_truncated_record_is_overwritten(tmp_path: Path) -> None:
    values, index = top_k_logits(torch.randn(3, 9), 2)
    cache = LogitCache(tmp_path, "a" * 64, 2)
    cache.put(keys_of(0, 1), values[:2], index[:2])
    with cache.path.open("ab") as handle:
        handle.write(b"half a rec")
    reopened = LogitCache(tmp_path, "a" * 64, 2)
    assert len(reopened) == 2
    reopened.put(keys_of(2), values[2:], index[2:])
    cached = LogitCache(tmp_path, "a" * 64, 2).get(keys_of(2, 1, 0))
    assert cached is not None
    assert torch.equal(cached[0], values[[2, 1, 0]])


@given(st.lists(st.binary(max_size=3), max_size=3), st.lists(st.binary(max_size=3), max_size=3))
def test_keys_depend_on_the_boundaries_of_parts(parts: list[bytes], other: list[bytes]) -> None:
    assert (make_key(*parts) == make_key(*other)) == (parts == other)


def test_unwritable_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MemtxError, match=r"cannot be written: .* Choose another cache_dir"):
        LogitCache(tmp_path / "file" / "below", "a" * 64, 2)
    with pytest.raises(MemtxError, match="top_k is 0"):
        LogitCache(tmp_path, "a" * 64, 0)


def test_a_table_tracks_stored_tokens_and_completeness(tmp_path: Path) -> None:
    values, index = top_k_logits(torch.randn(6, 9), 3)
    table = LogitTable(tmp_path, "a" * 64, 6, 3)
    positions = torch.tensor([[4, 2], [0, 1]])
    table.put(positions.flatten(), values[positions.flatten()], index[positions.flatten()])
    assert not table.is_complete
    # Stored logits stay, and of two for one token in a batch the first counts.
    table.put(torch.tensor([4, 1, 1]), values[[0, 1, 0]], index[[0, 1, 0]])
    reopened = LogitTable(tmp_path, "a" * 64, 6, 3)
    assert not reopened.is_complete
    reopened.put(torch.tensor([3, 5]), values[[3, 5]], index[[3, 5]])
    assert reopened.is_complete
    assert LogitTable(tmp_path, "a" * 64, 6, 3).is_complete
    cached = reopened.get(positions)
    assert torch.equal(cached[0], values[positions])
    assert torch.equal(cached[1], index[positions])

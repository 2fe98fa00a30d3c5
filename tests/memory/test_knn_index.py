"""An index against every product, and what it refuses."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from memtx import MemoryTransformer
from memtx.errors import MemtxError
from memtx.memory import retrieval
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.retrieval import ExactIndex, FaissIndex, KnnIndex, RetrievalMemory

WIDTH = 8


@pytest.fixture(autouse=True)
def _faiss() -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")


def scores(found: KnnIndex, queries: Tensor, keys: Tensor, seen: Tensor, count: int) -> Tensor:
    """Return (rows, heads, queries, count) products of what was found, -inf where nothing was."""
    index, any_found = found.search(queries, keys, seen, count)
    assert index.shape == any_found.shape == (*queries.shape[:3], count)
    assert bool(seen[:, None].expand(-1, keys.shape[1], -1, -1).gather(-1, index)[any_found].all()), "none is hidden"
    places = index + torch.where(any_found, 0, keys.shape[2] * (1 + torch.arange(count)))
    assert all(len(set(one)) == count for one in places.flatten(0, 2).tolist()), "each key is taken once"
    return (queries @ keys.mT).gather(-1, index).masked_fill(~any_found, float("-inf"))


@given(
    seed=st.integers(0, 999),
    n=st.integers(1, 12),
    width=st.integers(1, 9),
    reach=st.integers(0, 20),
    begin=st.integers(0, 12),
    count=st.integers(1, 6),
    least=st.sampled_from([1, 5, 100]),
    step=st.sampled_from([1, 40, retrieval.MAX_SCORES]),
)
def test_a_flat_index_finds_what_every_product_finds(
    seed: int, n: int, width: int, reach: int, begin: int, count: int, least: int, step: int
) -> None:
    """Queries see a stretch of keys that moves with them, and one document ends before another begins."""
    torch.manual_seed(seed)
    keys, queries = (torch.randn(2, 2, k, width, dtype=torch.float64) for k in (reach + n + count, n))
    at, place = torch.arange(n)[:, None], torch.arange(keys.shape[2])
    seen = (place >= at) & (place < at + reach)
    after = torch.where(at >= begin, place >= begin + reach // 2, place < begin + reach // 2)
    seen = torch.stack([seen, seen & after])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "MAX_SCORES", step)
        expected = scores(ExactIndex(), queries, keys, seen, count)
        # faiss compares in float32: it may swap keys whose products differ by less.
        found = scores(FaissIndex("Flat", min_keys=least), queries, keys, seen, count)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("index", ["IVF32,Flat", "HNSW16", "IVF32,SQ8"])
def test_an_index_finds_most_of_what_is_nearest(index: str) -> None:
    """Of keys in clusters, as a text's are; found at random it would be 16 of 2,000."""
    torch.manual_seed(0)
    centres = torch.randn(40, WIDTH)
    keys = F.normalize(centres[torch.randint(40, (2000,))] + 0.3 * torch.randn(2000, WIDTH), dim=-1)[None, None]
    queries = F.normalize(keys[:, :, ::20] + 0.1 * torch.randn(1, 1, 100, WIDTH), dim=-1)
    seen = torch.ones(1, 100, 2000, dtype=torch.bool)
    exact, found = (one.search(queries, keys, seen, 16)[0] for one in (ExactIndex(), FaissIndex(index, 8, 1000)))
    shared = [
        len(set(one) & set(other)) / 16 for one, other in zip(exact[0, 0].tolist(), found[0, 0].tolist(), strict=True)
    ]
    assert sum(shared) / len(shared) > 0.8


def model(find: Any) -> MemoryTransformer:
    torch.manual_seed(0)
    store = partial(RetrievalMemory, capacity=64, top_k=3, exclude_recent=4, heads=2, knn_index=find)
    return MemoryTransformer(11, 16, 1, 2, memories=[[partial(RecurrentMemory, window=4), store]])


def test_a_model_reads_and_learns_by_an_index() -> None:
    """And is saved with it."""
    flat = partial(FaissIndex, index_factory="Flat", min_keys=8)
    exact, indexed = model(ExactIndex), model(flat)
    tokens = torch.randint(11, (2, 48), generator=torch.Generator().manual_seed(1))
    logits = []
    for one in (exact, indexed):
        out = one(tokens, one.init_state(2))
        out.logits.sum().backward()
        logits.append(out.logits.detach())
    # Sums of float32 in one order: the same keys are found.
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)
    for left, right in zip(exact.parameters(), indexed.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)


def test_a_saved_model_remembers_its_index(tmp_path: Any) -> None:
    model(partial(FaissIndex, index_factory="HNSW8", min_keys=7)).save_pretrained(tmp_path / "saved")
    again = MemoryTransformer.from_pretrained(tmp_path / "saved")
    (found,) = [part.knn_index for part in again.modules() if isinstance(part, RetrievalMemory)]
    assert isinstance(found, FaissIndex)
    assert (found.index_factory, found.min_keys) == ("HNSW8", 7)


@pytest.mark.parametrize(("index", "matters"), [("Flat", False), ("IVF4,Flat", True)])
def test_it_says_when_the_cut_matters(index: str, matters: bool) -> None:
    assert (
        RetrievalMemory(8, heads=2, knn_index=partial(FaissIndex, index_factory=index)).depends_on_segmentation
        is matters
    )
    assert not RetrievalMemory(8, heads=2).depends_on_segmentation


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"index_factory": "nothing"}, "index_factory is 'nothing'"),
        ({"nprobe": 0}, "nprobe is 0"),
        ({"min_keys": 0}, "min_keys is 0"),
    ],
)
def test_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(MemtxError, match=says):
        FaissIndex(**options)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MemtxError, match=r"memtx\[retrieval\]"):
        FaissIndex()

"""Search with an index against all products, and invalid options."""

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


def search_scores(knn_index: KnnIndex, queries: Tensor, keys: Tensor, mask: Tensor, count: int) -> Tensor:
    """Return the products with the keys that a search returns, ``(batch, heads, queries, count)``, -inf for no key."""
    index, is_match = knn_index.search(queries, keys, mask, count)
    assert index.shape == is_match.shape == (*queries.shape[:3], count)
    assert bool(mask[:, None].expand(-1, keys.shape[1], -1, -1).gather(-1, index)[is_match].all()), "a key is hidden"
    distinct = index + torch.where(is_match, 0, keys.shape[2] * (1 + torch.arange(count)))
    assert all(len(set(keys)) == count for keys in distinct.flatten(0, 2).tolist()), "a key is returned twice"
    return (queries @ keys.mT).gather(-1, index).masked_fill(~is_match, float("-inf"))


@given(
    seed=st.integers(0, 999),
    n=st.integers(1, 12),
    width=st.integers(1, 9),
    span=st.integers(0, 20),
    start=st.integers(0, 12),
    count=st.integers(1, 6),
    min_keys=st.sampled_from([1, 5, 100]),
    step=st.sampled_from([1, 40, retrieval.MAX_SCORES]),
)
def test_a_flat_index_equals_exact_search(
    seed: int, n: int, width: int, span: int, start: int, count: int, min_keys: int, step: int
) -> None:
    """Queries see a range of keys that moves with them, and in one stream a document ends before another starts."""
    torch.manual_seed(seed)
    keys, queries = (torch.randn(2, 2, k, width, dtype=torch.float64) for k in (span + n + count, n))
    query, key = torch.arange(n)[:, None], torch.arange(keys.shape[2])
    mask = (key >= query) & (key < query + span)
    same_document = torch.where(query >= start, key >= start + span // 2, key < start + span // 2)
    mask = torch.stack([mask, mask & same_document])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "MAX_SCORES", step)
        expected = search_scores(ExactIndex(), queries, keys, mask, count)
        # faiss compares in float32: it may swap keys whose products differ by less.
        actual = search_scores(FaissIndex("Flat", min_keys=min_keys), queries, keys, mask, count)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("index", ["IVF32,Flat", "HNSW16", "IVF32,SQ8"])
def test_an_approximate_index_finds_most_nearest_keys(index: str) -> None:
    """Keys form clusters, as those of texts do; a random choice would find 16 of 2,000."""
    torch.manual_seed(0)
    centers = torch.randn(40, WIDTH)
    keys = F.normalize(centers[torch.randint(40, (2000,))] + 0.3 * torch.randn(2000, WIDTH), dim=-1)[None, None]
    queries = F.normalize(keys[:, :, ::20] + 0.1 * torch.randn(1, 1, 100, WIDTH), dim=-1)
    mask = torch.ones(1, 100, 2000, dtype=torch.bool)
    indexes: tuple[KnnIndex, ...] = (ExactIndex(), FaissIndex(index, 8, 1000))
    exact, approximate = (knn_index.search(queries, keys, mask, 16)[0][0, 0].tolist() for knn_index in indexes)
    recalls = [len(set(true) & set(best)) / 16 for true, best in zip(exact, approximate, strict=True)]
    assert sum(recalls) / len(recalls) > 0.8


def build_model(knn_index: Any) -> MemoryTransformer:
    torch.manual_seed(0)
    store = partial(RetrievalMemory, capacity=64, top_k=3, exclude_recent=4, heads=2, knn_index=knn_index)
    return MemoryTransformer(11, 16, 1, 2, memories=[[partial(RecurrentMemory, window=4), store]])


def test_a_model_reads_and_learns_with_an_index() -> None:
    flat = partial(FaissIndex, index_factory="Flat", min_keys=8)
    exact, indexed = build_model(ExactIndex), build_model(flat)
    tokens = torch.randint(11, (2, 48), generator=torch.Generator().manual_seed(1))
    logits = []
    for model in (exact, indexed):
        out = model(tokens, model.init_state(2))
        out.logits.sum().backward()
        logits.append(out.logits.detach())
    # Both find the same keys, and sum in float32 in the same order.
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)
    for left, right in zip(exact.parameters(), indexed.parameters(), strict=True):
        # Gradients add up in float32 over 96 tokens.
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)


def test_a_saved_model_keeps_its_index(tmp_path: Any) -> None:
    build_model(partial(FaissIndex, index_factory="HNSW8", min_keys=7)).save_pretrained(tmp_path / "saved")
    loaded = MemoryTransformer.from_pretrained(tmp_path / "saved")
    (index,) = [part.knn_index for part in loaded.modules() if isinstance(part, RetrievalMemory)]
    assert isinstance(index, FaissIndex)
    assert (index.index_factory, index.min_keys) == ("HNSW8", 7)


@pytest.mark.parametrize(("index", "expected"), [("Flat", False), ("IVF4,Flat", True)])
def test_reports_whether_results_depend_on_segmentation(index: str, expected: bool) -> None:
    assert (
        RetrievalMemory(8, heads=2, knn_index=partial(FaissIndex, index_factory=index)).depends_on_segmentation
        is expected
    )
    assert not RetrievalMemory(8, heads=2).depends_on_segmentation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index_factory": "nothing"}, "index_factory is 'nothing'"),
        ({"nprobe": 0}, "nprobe is 0"),
        ({"min_keys": 0}, "min_keys is 0"),
    ],
)
def test_rejects_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        FaissIndex(**options)


def test_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MemtxError, match=r"memtx\[retrieval\]"):
        FaissIndex()

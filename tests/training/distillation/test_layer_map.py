"""Layer maps: their pairs, and the depths that they reject."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtx.errors import MemtxError
from memtx.training.distillation.layer_map import EveryKthLayer, ExplicitLayers, LastLayer


@given(st.integers(1, 12), st.integers(1, 6))
def test_every_kth_layer_is_evenly_spaced_and_ends_with_the_last(student: int, k: int) -> None:
    layers = EveryKthLayer().pairs(student, student * k)
    assert [student_layer for student_layer, _ in layers] == list(range(student))
    assert layers[-1] == (student - 1, student * k - 1)
    assert {after - before for (_, before), (_, after) in itertools.pairwise(layers)} <= {k}


def test_indivisible_depths_name_the_divisors() -> None:
    with pytest.raises(MemtxError, match=r"5 layers, which do not divide .* 12\. Choose a depth of 1, 2, 3, 4, 6, 12"):
        EveryKthLayer().pairs(5, 12)


def test_explicit_pairs_count_from_either_end() -> None:
    assert ExplicitLayers([(0, 1), (-1, -1)]).pairs(3, 5) == [(0, 1), (2, 4)]
    assert LastLayer().pairs(3, 5) == [(2, 4)]
    with pytest.raises(MemtxError, match=r"names layer 5 of the teacher, which has 5 layers. Choose -5 to 4"):
        ExplicitLayers([(0, 5)]).pairs(3, 5)
    with pytest.raises(MemtxError, match="names layer -4 of the student"):
        ExplicitLayers([(-4, 0)]).pairs(3, 5)
    with pytest.raises(MemtxError, match="no pairs"):
        ExplicitLayers([])

"""Which layer of a student is to be like which of its teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from memtx.errors import MemtxError


class LayerMap(ABC):
    """Pairs of layers, numbered from 0."""

    @abstractmethod
    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """Return (student's layer, teacher's layer) pairs of models of so many layers.

        Raises:
            MemtxError: the depths do not fit the map; says which would.
        """


class EveryKthLayer(LayerMap):
    """Layer i stands for layers k i to k i + k - 1 of the teacher, and is to be like the last of them.

    The uniform map of TinyBERT (Jiao et al. 2020, section 3: g(m) = k m), with k the quotient of the depths.
    """

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """Return a pair a layer of the student."""
        if teacher_depth % student_depth:
            fitting = ", ".join(str(depth) for depth in range(1, teacher_depth + 1) if teacher_depth % depth == 0)
            raise MemtxError(
                f"The student has {student_depth} layers, which do not divide the teacher's {teacher_depth}.",
                f"Give it {fitting} layers, or name the pairs by ExplicitLayers.",
            )
        k = teacher_depth // student_depth
        return [(layer, k * layer + k - 1) for layer in range(student_depth)]


class ExplicitLayers(LayerMap):
    """Pairs given one by one.

    Args:
        pairs: (student's layer, teacher's layer), from 0, negative from the end.

    Raises:
        MemtxError: there is none.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        if not pairs:
            raise MemtxError("A map of layers has no pairs.", "Give at least one, such as [[0, 1]].")
        self.layer_pairs = [(int(own), int(other)) for own, other in pairs]

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """Return the pairs, counted from 0."""
        found = []
        for own, other in self.layer_pairs:
            for whose, layer, depth in (("student", own, student_depth), ("teacher", other, teacher_depth)):
                if not -depth <= layer < depth:
                    raise MemtxError(
                        f"The map of layers names layer {layer} of the {whose}, which has {depth}.",
                        f"Give {-depth} to {depth - 1}.",
                    )
            found.append((own % student_depth, other % teacher_depth))
        return found


class LastLayer(ExplicitLayers):
    """The last layers alone (MiniLM, Wang et al. 2020, section 3.1), so that depths need not fit."""

    def __init__(self) -> None:
        super().__init__([(-1, -1)])


class NoLayers(LayerMap):
    """No layers: a student that starts so has the embeddings of its teacher, and what else is outside the layers.

    From a wider teacher it has the embeddings alone, along the directions in which these vary most.
    """

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """Return no pair."""
        return []

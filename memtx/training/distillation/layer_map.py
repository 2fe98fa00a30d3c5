"""Maps from the layers of a student to those of its teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from memtx.errors import MemtxError


class LayerMap(ABC):
    """Pairs of layers, numbered from 0."""

    @abstractmethod
    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """Return (student layer, teacher layer) pairs; raises MemtxError if the depths do not fit the map."""


class EveryKthLayer(LayerMap):
    """Pairs of each student layer and the last of k teacher layers, k being the quotient of the depths.

    The uniform map of TinyBERT (Jiao et al. 2020, section 3: g(m) = k m): layer i stands for layers k i to k i + k - 1.
    """

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """Return one pair per student layer."""
        if teacher_depth % student_depth:
            divisors = ", ".join(str(depth) for depth in range(1, teacher_depth + 1) if teacher_depth % depth == 0)
            raise MemtxError(
                f"The student has {student_depth} layers, which do not divide the teacher's {teacher_depth}.",
                f"Choose a depth of {divisors}, or list the pairs with ExplicitLayers.",
            )
        k = teacher_depth // student_depth
        return [(layer, k * layer + k - 1) for layer in range(student_depth)]


class EvenlySpacedLayers(LayerMap):
    """Pairs that spread over the teacher from its first layer to its last, as DistilBERT begins (Sanh et al. 2019).

    Six layers of a student stand for layers 0, 2, 4, 7, 9 and 11 of twelve, those of the published checkpoints.
    """

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """Return one pair per student layer."""
        if student_depth > teacher_depth:
            raise MemtxError(
                f"The student has {student_depth} layers, the teacher {teacher_depth}.",
                "Choose a depth of at most the teacher's, or list the pairs with ExplicitLayers.",
            )
        gaps = max(1, student_depth - 1)
        # Rounded in integers, halves upwards.
        return [(layer, (2 * layer * (teacher_depth - 1) + gaps) // (2 * gaps)) for layer in range(student_depth)]


class ExplicitLayers(LayerMap):
    """Pairs listed by the user.

    Args:
        pairs: (student layer, teacher layer) pairs, counted from 0, or from the end if negative.

    Raises:
        MemtxError: There are no pairs.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        if not pairs:
            raise MemtxError("The layer map has no pairs.", "Add at least one, such as [[0, 1]].")
        self.layer_pairs = [(int(student), int(teacher)) for student, teacher in pairs]

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """Return the pairs, counted from 0."""
        pairs = []
        for student, teacher in self.layer_pairs:
            for name, layer, depth in (("student", student, student_depth), ("teacher", teacher, teacher_depth)):
                if not -depth <= layer < depth:
                    raise MemtxError(
                        f"The layer map names layer {layer} of the {name}, which has {depth} layers.",
                        f"Choose {-depth} to {depth - 1}.",
                    )
            pairs.append((student % student_depth, teacher % teacher_depth))
        return pairs


class LastLayer(ExplicitLayers):
    """The last layers only, for models of any depth (MiniLM, Wang et al. 2020, section 3.1)."""

    def __init__(self) -> None:
        super().__init__([(-1, -1)])


class NoLayers(LayerMap):
    """No layers: a student initialized with it gets the teacher's embeddings and everything else outside the layers.

    From a wider teacher it gets the embeddings alone, projected to their principal components.
    """

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """Return no pairs."""
        return []

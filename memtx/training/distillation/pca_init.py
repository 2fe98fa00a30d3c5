"""The start of a student that is narrower than its teacher: the teacher's embeddings in fewer dimensions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.layers.embeddings import TextEmbeddings
from memtx.models.encoder import Encoder
from memtx.models.memory_transformer import MemoryTransformer


@torch.no_grad()
def init_embeddings_by_pca(student: Encoder | MemoryTransformer, teacher: Encoder | MemoryTransformer) -> None:
    """Let the student's embeddings begin as the teacher's, along the directions in which these vary most.

    The principal components that SliceGPT cuts whole models to (Ashkboos et al. 2024, section 3), of the token
    embeddings and for the tables alone; layers and heads stay as they were drawn.

    Args:
        student: narrower than the teacher.
        teacher: of the same kind.

    Raises:
        MemtxError: one has a table that the other has not, or of another number of entries.
    """
    given, wrong = _embedding_tables(teacher), []
    own = _embedding_tables(student)
    for name in own.keys() | given.keys():
        rows = [len(tables[name].weight) if name in tables else 0 for tables in (own, given)]
        if rows[0] != rows[1]:
            wrong.append(f"{name} has {rows[0]} entries, the teacher's {rows[1]}")
    if wrong:
        raise MemtxError(
            f"The student cannot begin with the teacher's embeddings: {'; '.join(sorted(wrong))}.",
            "Give it tables of the same entries, or leave student_init out.",
        )
    first = teacher.embedding.word_embeddings if isinstance(teacher.embedding, TextEmbeddings) else teacher.embedding
    kept = principal_directions(first.weight, student.dim, centered=_subtracts_mean(student))
    for name, table in own.items():
        table.weight.copy_(given[name].weight.to(kept) @ kept)
    if isinstance(student.embedding, TextEmbeddings) and isinstance(teacher.embedding, TextEmbeddings):
        # Where token embeddings are multiplied by the root of the width, the widths differ.
        student.embedding.word_embeddings.weight.mul_(teacher.embedding.scale / student.embedding.scale)


def principal_directions(embeddings: Tensor, dim: int, *, centered: bool) -> Tensor:
    """Return (width, dim) float64, a map to fewer dimensions that keeps most of the squares of ``embeddings``.

    Args:
        embeddings: (entries, width).
        dim: at most width.
        centered: whether what follows takes a vector's mean off, in the table's width and in the narrower one. Means
            are then left out, and what is kept has a mean of zero in the new dimensions, so that nothing is lost.
    """
    x = embeddings.double()
    if centered:
        x = x - x.mean(1, keepdim=True)
    top: Tensor = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)
    if not centered:
        return top[:, :dim]
    # An orthonormal basis that begins with the direction of means, which is dropped.
    beside = torch.eye(dim, dtype=x.dtype, device=x.device)
    beside[:, 0] = 1.0
    basis: Tensor = torch.linalg.qr(beside).Q[:, 1:]
    return top[:, : dim - 1] @ basis.T


def _subtracts_mean(model: Encoder | MemoryTransformer) -> bool:
    """Return whether the norms take means off."""
    return isinstance(model.norm if isinstance(model, MemoryTransformer) else model.embedding.norm, nn.LayerNorm)


def _embedding_tables(model: Encoder | MemoryTransformer) -> dict[str, nn.Embedding]:
    """Return the tables of embeddings by name."""
    found: dict[str, nn.Embedding] = {}
    for part in ("embedding", "absolute_positions"):
        inside = getattr(model, part, None)
        if inside is not None:
            found |= {name: one for name, one in inside.named_modules(prefix=part) if isinstance(one, nn.Embedding)}
    return found

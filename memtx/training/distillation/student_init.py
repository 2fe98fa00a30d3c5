"""Initialization of a student from its teacher: embeddings, heads, and some of the layers.

DistilBERT (Sanh et al. 2019, section 3) takes half of the layers, from the first to the last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.layers.embeddings import TextEmbeddings
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.distillation.layer_map import LayerMap, NoLayers
from memtx.training.distillation.model_outputs import ModelDims, get_backbone

_TOKEN_NAMES = ("embedding.word_embeddings.weight", "head.weight", "head.bias")
"""Weights of an encoder with an entry for each token."""
_LAYER_NAME = re.compile(r"^((?:backbone\.)?blocks\.)(\d+)(\..+)$")


@torch.no_grad()
def init_student(student: nn.Module, teacher: nn.Module, layer_map: LayerMap) -> None:
    """Copy the teacher's weights by name, into each layer those of the teacher layer that it is mapped to.

    Memories, and parts outside the layers that only one of the models has, such as a head, keep their weights.

    Args:
        student: Model as wide as the teacher; with ``NoLayers`` it may be narrower.
        teacher: Model of the same class; an encoder may also initialize the backbone of a task model.
        layer_map: Pairs of student and teacher layers.

    Raises:
        MemtxError: The classes, widths or parts of layers differ.
    """
    if isinstance(student, TaskModel) and isinstance(teacher, Encoder):
        student = student.backbone
    if type(student) is not type(teacher):
        raise MemtxError(
            f"The student ({type(student).__name__}) cannot be initialized from the teacher "
            f"({type(teacher).__name__}).",
            "Remove student_init, or use models of the same class.",
        )
    dims, teacher_dims = ModelDims.from_model(student), ModelDims.from_model(teacher)
    if isinstance(layer_map, NoLayers) and dims.dim < teacher_dims.dim:
        narrow, wide = get_backbone(student), get_backbone(teacher)
        if isinstance(narrow, Encoder | MemoryTransformer) and isinstance(wide, Encoder | MemoryTransformer):
            init_embeddings_by_pca(narrow, wide)
            return
    if dims.dim != teacher_dims.dim or not dims.depth or not teacher_dims.depth:
        raise MemtxError(
            f"The student, {dims.dim} wide with {dims.depth} layers, cannot be initialized from the layers of the "
            f"teacher, {teacher_dims.dim} wide with {teacher_dims.depth} layers.",
            f"Remove student_init, use dim {teacher_dims.dim} and the layers of an encoder or a decoder, or initialize "
            "a narrower student with NoLayers.",
        )
    _copy_weights(student, teacher, dict(layer_map.pairs(dims.depth, teacher_dims.depth)))


def _copy_weights(student: nn.Module, teacher: nn.Module, teacher_layers: Mapping[int, int]) -> None:
    """Copy parameters; ``teacher_layers`` maps student layers to teacher layers."""
    sources: dict[str, Tensor] = {}
    for name, tensor in _tensors_without_memories(teacher).items():
        if (match := _LAYER_NAME.match(name)) is None:
            sources[name] = tensor
        else:
            layers = (layer for layer, teacher_layer in teacher_layers.items() if teacher_layer == int(match[2]))
            sources |= {f"{match[1]}{layer}{match[3]}": tensor for layer in layers}
    targets = _tensors_without_memories(student)
    errors = [f"the student has no {name}" for name in sorted(sources.keys() - targets) if _LAYER_NAME.match(name)]
    for name, target in targets.items():
        match, source = _LAYER_NAME.match(name), sources.get(name)
        if source is not None and name.removeprefix("backbone.") in _TOKEN_NAMES:
            source = source[: len(target)]  # without the padding of a published vocabulary
        if source is None:
            errors += [f"the teacher has no {name}"] if match is not None and int(match[2]) in teacher_layers else []
        elif source.shape != target.shape:
            errors.append(f"{name} is {tuple(target.shape)}, the teacher's {tuple(source.shape)}")
        else:
            target.copy_(source)
    if errors:
        raise MemtxError(
            f"The student cannot be initialized from the teacher's layers: {'; '.join(errors[:3])}.",
            "Use layers of the same parts and sizes, or remove student_init.",
        )


def _tensors_without_memories(model: nn.Module) -> dict[str, Tensor]:
    memories = model.memory_parameters() if isinstance(model, MemoryTransformer) else {}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in memories}


@torch.no_grad()
def init_embeddings_by_pca(student: Encoder | MemoryTransformer, teacher: Encoder | MemoryTransformer) -> None:
    """Initialize the embeddings of a narrower student from those of a teacher of the same class.

    SliceGPT projects whole models (Ashkboos et al. 2024, section 3). Here only the embedding tables are projected, to
    the principal components of the token embeddings, and layers and heads keep their weights.

    Raises:
        MemtxError: Only one of the models has an embedding table, or the tables have different numbers of entries.
    """
    tables, teacher_tables = _embedding_tables(student), _embedding_tables(teacher)
    errors = []
    for name in sorted(tables.keys() | teacher_tables.keys()):
        size, teacher_size = (len(named[name].weight) if name in named else 0 for named in (tables, teacher_tables))
        if size != teacher_size:
            errors.append(f"{name} has {size} entries, the teacher's {teacher_size}")
        elif (width := teacher_tables[name].weight.shape[1]) != teacher.dim:
            errors.append(f"{name} of the teacher has width {width}, its layers {teacher.dim}")
    if errors:
        raise MemtxError(
            f"The student cannot be initialized from the teacher's embeddings: {'; '.join(errors)}.",
            "Use tables of the same number of entries, or remove student_init.",
        )
    tokens, embedding = next(iter(teacher_tables.values())), teacher.embedding
    directions = principal_directions(tokens.weight, student.dim, centered=_subtracts_mean(student))
    for name, table in tables.items():
        table.weight.copy_(teacher_tables[name].weight.to(directions) @ directions)
    if isinstance(student.embedding, TextEmbeddings) and isinstance(embedding, TextEmbeddings):
        # Token embeddings may be scaled by the square root of the width, which differs.
        student.embedding.word_embeddings.weight.mul_(embedding.scale / student.embedding.scale)


def principal_directions(embeddings: Tensor, dim: int, *, centered: bool) -> Tensor:
    """Return a projection ``(width, dim)`` float64 that keeps as much of the embeddings' squared norm as possible.

    Args:
        embeddings: Embedding table, ``(entries, width)``.
        dim: Target width, at most ``width``.
        centered: If True, the following norm subtracts the mean of a vector, in either width. Means are then dropped,
            and projected vectors have mean zero, so that no dimension is wasted on them.
    """
    x = embeddings.double()
    if centered:
        x = x - x.mean(1, keepdim=True)
    directions: Tensor = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)
    if not centered:
        return directions[:, :dim]
    # An orthonormal basis whose first vector, the direction of the mean, is dropped.
    mean_first = torch.eye(dim, dtype=x.dtype, device=x.device)
    mean_first[:, 0] = 1.0
    basis: Tensor = torch.linalg.qr(mean_first).Q[:, 1:]
    return directions[:, : dim - 1] @ basis.T


def _subtracts_mean(model: Encoder | MemoryTransformer) -> bool:
    norm = model.norm if isinstance(model, MemoryTransformer) else model.embedding.norm
    return isinstance(norm, nn.LayerNorm)


def _embedding_tables(model: Encoder | MemoryTransformer) -> dict[str, nn.Embedding]:
    """Return the embedding tables by name."""
    tables: dict[str, nn.Embedding] = {}
    for prefix in ("embedding", "absolute_positions"):
        if (part := getattr(model, prefix, None)) is not None:
            modules = part.named_modules(prefix=prefix)
            tables |= {name: module for name, module in modules if isinstance(module, nn.Embedding)}
    return tables

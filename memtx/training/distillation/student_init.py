"""A student that begins with its teacher's weights: embeddings, heads, and some of the layers.

DistilBERT (Sanh et al. 2019, section 3) takes every second layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from memtx.errors import MemtxError
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.distillation.layer_map import LayerMap, NoLayers
from memtx.training.distillation.model_outputs import ModelDims, get_backbone
from memtx.training.distillation.pca_init import init_embeddings_by_pca

_LAYER_NAME = re.compile(r"^((?:backbone\.)?blocks\.)(\d+)(\..+)$")


@torch.no_grad()
def init_student(student: nn.Module, teacher: nn.Module, layer_map: LayerMap) -> None:
    """Copy into the student what the teacher has under the same names, each layer's from the one the map names.

    What is of memories, and what only one of the two has outside its layers, such as a head, is left as it is.

    Args:
        student: of the teacher's width; with ``NoLayers`` also narrower.
        teacher: of the same kind; an encoder may also begin the body of a task's model.
        layer_map: which layer begins as which.

    Raises:
        MemtxError: kinds, widths, or the parts of layers differ.
    """
    if isinstance(student, TaskModel) and isinstance(teacher, Encoder):
        student = student.backbone
    kinds = type(student), type(teacher)
    if kinds[0] is not kinds[1]:
        raise MemtxError(
            f"The student is a {kinds[0].__name__}, the teacher a {kinds[1].__name__}: it cannot begin as the other.",
            "Leave student_init out, or give models of one kind.",
        )
    own, other = ModelDims.from_model(student), ModelDims.from_model(teacher)
    narrow, wide = get_backbone(student), get_backbone(teacher)
    if (
        isinstance(layer_map, NoLayers)
        and own.dim < other.dim
        and isinstance(narrow, Encoder | MemoryTransformer)
        and isinstance(wide, Encoder | MemoryTransformer)
    ):
        init_embeddings_by_pca(narrow, wide)
        return
    if own.dim != other.dim or not own.depth or not other.depth:
        raise MemtxError(
            f"The student is {own.dim} wide and shows {own.depth} layers, the teacher {other.dim} and {other.depth}: "
            "it cannot begin with its layers.",
            f"Leave student_init out, give the student dim {other.dim} and an encoder's or a decoder's layers, or "
            "start a narrower one by NoLayers.",
        )
    source = dict(layer_map.pairs(own.depth, other.depth))
    memories = _memory_parameter_names(student)
    given, wrong = teacher.state_dict(), _find_unmatched(student, teacher, source)
    for name, tensor in student.state_dict(keep_vars=True).items():
        found = _LAYER_NAME.match(name)
        if name in memories or (found is not None and int(found[2]) not in source):
            continue
        there = given.get(name if found is None else f"{found[1]}{source[int(found[2])]}{found[3]}")
        if there is None:
            wrong += [f"the teacher has no {name}"] if found is not None else []
        elif there.shape != tensor.shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, the teacher's {tuple(there.shape)}")
        else:
            tensor.copy_(there)
    if wrong:
        raise MemtxError(
            f"The student cannot begin with the teacher's layers: {'; '.join(wrong[:3])}.",
            "Give it layers of the same parts and sizes, or leave student_init out.",
        )


def _memory_parameter_names(model: nn.Module) -> set[str]:
    return set(model.memory_parameters()) if isinstance(model, MemoryTransformer) else set()


def _find_unmatched(student: nn.Module, teacher: nn.Module, teacher_layers: Mapping[int, int]) -> list[str]:
    """Return what is wrong where the teacher's layers have parts, such as biases, that the student's have not."""
    own, used = student.state_dict(), set(teacher_layers.values())
    layer = {other: mine for mine, other in teacher_layers.items()}
    wrong = []
    for name in teacher.state_dict().keys() - _memory_parameter_names(teacher):
        found = _LAYER_NAME.match(name)
        if found is not None and int(found[2]) in used:
            mine = f"{found[1]}{layer[int(found[2])]}{found[3]}"
            wrong += [f"the student has no {mine}"] if mine not in own else []
    return sorted(wrong)

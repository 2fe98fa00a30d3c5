"""A student that begins as its teacher: which weights it has, and which models it cannot begin as."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from memtx.errors import MemtxError
from memtx.memory.compressed import CompressedMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.distillation.layer_map import EveryKth, Explicit
from memtx.training.distillation.start import begin_as

VOCAB = 11


WINDOW = partial(RecurrentMemory, window=8)


def decoder(depth: int, memory: Any = WINDOW, **options: Any) -> MemoryTransformer:
    return MemoryTransformer(VOCAB, **({"dim": 8, "depth": depth, "heads": 2, "memories": [memory]} | options))


def test_layers_are_those_of_the_map_and_memories_stay() -> None:
    teacher, student = decoder(4), decoder(2, partial(CompressedMemory, window=8, rate=2, length=3))
    before = {name: one.clone() for name, one in student.state_dict().items()}
    begin_as(student, teacher, EveryKth())
    memories = student.memory_parameters()
    assert memories
    given = teacher.state_dict()
    for name, one in student.state_dict().items():
        if name in memories:
            assert torch.equal(one, before[name])
            continue
        source = name.replace("blocks.1.", "blocks.3.").replace("blocks.0.", "blocks.1.")
        assert torch.equal(one, given[source]), name
        assert one.data_ptr() != given[source].data_ptr()


def test_a_layer_that_the_map_leaves_out_stays() -> None:
    teacher, student = Encoder(VOCAB, 8, 4, 2), Encoder(VOCAB, 8, 2, 2)
    before = {name: one.clone() for name, one in student.state_dict().items()}
    begin_as(student, teacher, Explicit([(1, 0)]))
    found = student.state_dict()
    assert all(torch.equal(found[name], before[name]) for name in found if name.startswith("blocks.0."))
    name = "blocks.1.attention.query.weight"
    assert torch.equal(found[name], teacher.state_dict()["blocks.0.attention.query.weight"])
    assert torch.equal(found["embedding.tokens.weight"], teacher.embedding.tokens.weight)


def test_an_encoder_begins_the_body_of_a_tasks_model() -> None:
    teacher = Encoder(VOCAB, 8, 4, 2)
    student = TaskModel(VOCAB, 3, partial(Encoder, dim=8, depth=2, heads=2))
    head = student.head.out.weight.clone()
    begin_as(student, teacher, EveryKth())
    assert torch.equal(student.body.embedding.tokens.weight, teacher.embedding.tokens.weight)
    assert torch.equal(student.head.out.weight, head)
    other = TaskModel(VOCAB, 3, partial(Encoder, dim=8, depth=1, heads=2))
    begin_as(other, student, EveryKth())
    assert torch.equal(other.head.out.weight, head)


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (Encoder(VOCAB, 8, 2, 2), "a Encoder, the teacher a MemoryTransformer.* Leave start out"),
        (decoder(2, dim=12), "12 wide and shows 2 layers, the teacher 8 and 4.* give the student dim 8"),
        (decoder(3), "3 layers, which do not divide"),
        (decoder(2, kv_heads=1), r"key_value.weight is \(8, 8\), the teacher's \(16, 8\)"),
        (decoder(2, bias=True), "the teacher has no blocks.0.attention.query.bias"),
    ],
)
def test_models_that_it_cannot_begin_as_are_named(student: Any, said: str) -> None:
    with pytest.raises(MemtxError, match=said):
        begin_as(student, decoder(4), EveryKth())


def test_what_the_teachers_layers_have_besides_is_named() -> None:
    with pytest.raises(MemtxError, match=r"the student has no blocks.0.attention.key_value.bias"):
        begin_as(decoder(2), decoder(4, bias=True), EveryKth())

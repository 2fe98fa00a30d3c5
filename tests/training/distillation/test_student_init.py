"""Initialization of a student from its teacher: copied weights, and rejected models."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.layers.embeddings import TextEmbeddings
from memtx.memory.compressed import CompressedMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.distillation.layer_map import EveryKthLayer, ExplicitLayers, NoLayers
from memtx.training.distillation.student_init import init_student, principal_directions

VOCAB = 11


WINDOW = partial(RecurrentMemory, window=8)


def decoder(depth: int, memory: Any = WINDOW, **options: Any) -> MemoryTransformer:
    return MemoryTransformer(VOCAB, **({"dim": 8, "depth": depth, "heads": 2, "memories": [memory]} | options))


def test_layers_are_copied_by_the_map_and_memories_stay() -> None:
    teacher, student = decoder(4), decoder(2, partial(CompressedMemory, window=8, compression_rate=2, num_entries=3))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    init_student(student, teacher, EveryKthLayer())
    memories = student.memory_parameters()
    assert memories
    teacher_tensors = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        if name in memories:
            assert torch.equal(tensor, before[name])
            continue
        source = name.replace("blocks.1.", "blocks.3.").replace("blocks.0.", "blocks.1.")
        assert torch.equal(tensor, teacher_tensors[source]), name
        assert tensor.data_ptr() != teacher_tensors[source].data_ptr()


def test_unmapped_layers_stay() -> None:
    teacher, student = Encoder(VOCAB, 8, 4, 2), Encoder(VOCAB, 8, 2, 2)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    init_student(student, teacher, ExplicitLayers([(1, 0)]))
    after = student.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("blocks.0."))
    name = "blocks.1.attention.query.weight"
    assert torch.equal(after[name], teacher.state_dict()["blocks.0.attention.query.weight"])
    assert torch.equal(after["embedding.word_embeddings.weight"], teacher.embedding.word_embeddings.weight)


def test_an_encoder_initializes_the_backbone_of_a_task_model() -> None:
    teacher = Encoder(VOCAB, 8, 4, 2)
    student = TaskModel(VOCAB, 3, partial(Encoder, dim=8, depth=2, heads=2))
    head = student.head.out.weight.clone()
    init_student(student, teacher, EveryKthLayer())
    assert torch.equal(student.backbone.embedding.word_embeddings.weight, teacher.embedding.word_embeddings.weight)
    assert torch.equal(student.head.out.weight, head)
    other = TaskModel(VOCAB, 3, partial(Encoder, dim=8, depth=1, heads=2))
    init_student(other, student, EveryKthLayer())
    assert torch.equal(other.head.out.weight, head)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (Encoder(VOCAB, 8, 2, 2), r"student \(Encoder\) .* teacher \(MemoryTransformer\).* Remove student_init"),
        (decoder(2, dim=12), "12 wide with 2 layers, .* 8 wide with 4 layers.* use dim 8"),
        (decoder(3), "3 layers, which do not divide"),
        (decoder(2, kv_heads=1), r"key_value.weight is \(8, 8\), the teacher's \(16, 8\)"),
        (decoder(2, bias=True), "the teacher has no blocks.0.attention.query.bias"),
    ],
)
def test_mismatched_models_are_rejected(student: Any, message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        init_student(student, decoder(4), EveryKthLayer())


def test_extra_parameters_of_the_teacher_are_named() -> None:
    with pytest.raises(MemtxError, match=r"the student has no blocks.0.attention.key_value.bias"):
        init_student(decoder(2), decoder(4, bias=True), EveryKthLayer())


def low_rank_table(entries: int, width: int, rank: int, seed: int, *, centered: bool) -> Tensor:
    """Return a table of that rank; with zero means if the norm subtracts them."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(entries, rank, generator=draw, dtype=torch.float64)
    y = torch.randn(rank, width, generator=draw, dtype=torch.float64)
    return x @ (y - y.mean(1, keepdim=True) if centered else y)


@given(st.integers(2, 9), st.integers(0, 6), st.booleans(), st.integers(0, 99))
def test_projected_vectors_keep_their_normalized_values(dim: int, more: int, centered: bool, seed: int) -> None:
    width, rank = dim + more, dim - 1 if centered else dim
    x = low_rank_table(12, width, rank, seed, centered=centered)
    directions = principal_directions(x, dim, centered=centered)
    # Float64's rounding, a hundred times over for vectors near zero that norms magnify.
    close = {"atol": 1e-9, "rtol": 1e-9}
    assert torch.allclose((x @ directions) @ (x @ directions).T, x @ x.T, **close)
    norm = F.layer_norm if centered else F.rms_norm
    assert torch.allclose(
        norm(x @ directions, (dim,), eps=0.0) / dim**0.5, norm(x, (width,), eps=0.0) @ directions / width**0.5, **close
    )


@pytest.mark.parametrize("task", [False, True])
def test_a_narrower_encoder_gets_projected_embeddings(task: bool) -> None:
    def make_model(dim: int) -> Any:
        body = partial(Encoder, dim=dim, depth=2, heads=2)
        return TaskModel(VOCAB, 3, body) if task else body(VOCAB)

    teacher, student = make_model(16), make_model(8)
    wide, narrow = (model.backbone if task else model for model in (teacher, student))
    with torch.no_grad():
        wide.embedding.word_embeddings.weight.copy_(low_rank_table(VOCAB, 16, 7, 0, centered=True))
        wide.embedding.position_embeddings.weight[:4] = wide.embedding.word_embeddings.weight[:4]
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    init_student(student, teacher, NoLayers())
    tokens, teacher_tokens = narrow.embedding.word_embeddings.weight, wide.embedding.word_embeddings.weight
    # Projected in float32 from a singular value decomposition.
    assert torch.allclose(tokens @ tokens.T, teacher_tokens @ teacher_tokens.T, atol=1e-4)
    assert torch.allclose(narrow.embedding.position_embeddings.weight[:4], tokens[:4], atol=1e-6)
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.removeprefix("backbone.") for name in changed} == {
        "embedding.word_embeddings.weight",
        "embedding.position_embeddings.weight",
    }


@pytest.mark.parametrize("rescales", [(True, True), (True, False), (False, True)])
def test_projected_embeddings_keep_their_size_where_they_are_rescaled(rescales: tuple[bool, bool]) -> None:
    """Token embeddings times their scale keep the teacher's products."""
    teacher, student = (
        Encoder(VOCAB, dim, 1, 2, embeddings=partial(TextEmbeddings, num_positions=4, rescale_embeddings=rescale))
        for dim, rescale in zip((16, 8), rescales, strict=True)
    )
    with torch.no_grad():
        teacher.embedding.word_embeddings.weight.copy_(low_rank_table(VOCAB, 16, 7, 0, centered=True))
    init_student(student, teacher, NoLayers())
    tokens, expected = (
        model.embedding.word_embeddings.weight * (model.dim**0.5 if rescale else 1.0)
        for model, rescale in zip((student, teacher), reversed(rescales), strict=True)
    )
    # Projected in float32 from a singular value decomposition, times a scale of up to 16.
    torch.testing.assert_close(tokens @ tokens.T, expected @ expected.T, rtol=1e-4, atol=1e-3)


def test_a_narrower_decoder_gets_projected_embeddings() -> None:
    teacher, student = decoder(3, dim=16), decoder(2)
    with torch.no_grad():
        teacher.embedding.weight.copy_(low_rank_table(VOCAB, 16, 8, 0, centered=False))
    init_student(student, teacher, NoLayers())
    tokens, teacher_tokens = student.embedding.weight, teacher.embedding.weight
    # Projected in float32 from a singular value decomposition.
    assert torch.allclose(tokens @ tokens.T, teacher_tokens @ teacher_tokens.T, atol=1e-4)


def test_no_layers_copies_everything_else_at_equal_widths() -> None:
    teacher, student = decoder(4), decoder(2)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    init_student(student, teacher, NoLayers())
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("blocks.") else teacher.state_dict()[name]), name


def test_mismatched_embedding_tables_are_named() -> None:
    student = Encoder(VOCAB, 8, 2, 2, embeddings=partial(TextEmbeddings, num_positions=32))
    with pytest.raises(MemtxError, match=r"embedding.position_embeddings has 32 entries, the teacher's 512"):
        init_student(student, Encoder(VOCAB, 16, 2, 2), NoLayers())

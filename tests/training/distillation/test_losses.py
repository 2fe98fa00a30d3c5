"""Every loss against plain loops in float64 on the models' weights, and rejected arguments."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.layers.bigbird import BigBirdAttention
from memtx.layers.encoder_attention import FullAttention
from memtx.layers.longformer import LongformerAttention
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.encoder import Encoder
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training import distillation as kinds
from memtx.training.distillation import layer_losses, losses
from memtx.training.distillation.layer_map import ExplicitLayers, NoLayers
from memtx.training.distillation.losses import DistillationLoss
from memtx.training.distillation.model_outputs import ModelDims, ModelOutputs, collect_language_outputs, get_blocks
from memtx.training.distillation.teacher_cache import top_k_logits

BATCH_SIZE, LENGTH, VOCAB = 2, 7, 11
# float64, sums in another order
CLOSE: Any = {"rel": 1e-9}
DIMS = ModelDims("Encoder", 8, 2, (2, 2), (8, 8), VOCAB, has_attention_maps=True)


def encoder(dim: int, depth: int, heads: int = 2, attention: Any = FullAttention) -> Encoder:
    model = Encoder(VOCAB, dim, depth, heads, attentions=[attention])
    # A wide distribution, so that no two scores are close.
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    return model.double()


def read(model: Encoder, marked: Tensor | None = None) -> ModelOutputs:
    """Outputs of an encoder for random texts, the second of them padded."""
    tokens = torch.randint(VOCAB, (BATCH_SIZE, LENGTH), generator=torch.Generator().manual_seed(1))
    present = torch.ones(BATCH_SIZE, LENGTH, dtype=torch.bool)
    present[1, 5:] = False
    out = model(tokens, present.long(), output_hidden_states=True)
    assert out.hidden_states is not None
    assert out.logits is not None
    scored = present & (tokens % 2 == 0)
    return ModelOutputs(
        out.logits[scored],
        hidden_states=out.hidden_states,
        blocks=get_blocks(model),
        attention_mask=present,
        global_attention_mask=marked,
    )


def pair(student: Encoder, teacher: Encoder, make: Any) -> tuple[float, ModelOutputs, ModelOutputs, DistillationLoss]:
    torch.manual_seed(3)
    loss = make(ModelDims.from_model(student), ModelDims.from_model(teacher)).double()
    student_out, teacher_out = read(student), read(teacher)
    return float(loss(student_out, teacher_out).detach()), student_out, teacher_out, loss


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [score / sum(powers) for score in powers]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("chunk", [2, 512])
def test_soft_targets(temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_SIZE", chunk)
    make = partial(kinds.SoftTargets, temperature=temperature)
    loss_value, student_out, teacher_out, _ = pair(encoder(8, 1), encoder(12, 2), make)
    assert student_out.features is not None
    assert teacher_out.features is not None
    divergences = [
        kl(
            softmax([logit / temperature for logit in teacher_logits]),
            softmax([logit / temperature for logit in student_logits]),
        )
        for student_logits, teacher_logits in zip(
            student_out.features.tolist(), teacher_out.features.tolist(), strict=True
        )
    ]
    assert loss_value == pytest.approx(temperature**2 * sum(divergences) / len(divergences), **CLOSE)


def test_soft_targets_of_top_k_logits() -> None:
    loss_value, student_out, teacher_out, loss = pair(encoder(8, 1), encoder(12, 2), kinds.SoftTargets)
    assert student_out.features is not None
    assert teacher_out.features is not None

    def loss_of_top_k(top_k: int) -> float:
        values, index = top_k_logits(teacher_out.features, top_k)
        return float(loss(student_out, ModelOutputs(values.double(), class_indices=index)).detach())

    divergences = []
    for student_logits, teacher_logits in zip(
        student_out.features.tolist(), teacher_out.features.float().tolist(), strict=True
    ):
        top_classes = sorted(range(VOCAB), key=lambda index: -teacher_logits[index])[:4]
        teacher_probs, student_probs = (
            softmax([teacher_logits[index] / 2 for index in top_classes]),
            softmax([logit / 2 for logit in student_logits]),
        )
        divergences.append(kl(teacher_probs, [student_probs[index] for index in top_classes]))
    assert loss_of_top_k(4) == pytest.approx(4 * sum(divergences) / len(divergences), **CLOSE)
    # With all classes only float64 digits are lost; missing classes are padded.
    assert loss_of_top_k(VOCAB) == pytest.approx(loss_value, rel=1e-5)
    assert loss_of_top_k(VOCAB + 3) == pytest.approx(loss_value, rel=1e-5)


@pytest.mark.parametrize("dim", [8, 12])
@pytest.mark.parametrize("kind", ["mse", "cosine", "embeddings"])
def test_losses_of_hidden_states(dim: int, kind: str) -> None:
    make: Any = {
        "mse": kinds.HiddenMSE,
        "cosine": partial(kinds.HiddenCosine, layers=ExplicitLayers([(0, 0), (1, 3)])),
        "embeddings": kinds.EmbeddingMSE,
    }[kind]
    loss_value, student_out, teacher_out, loss = pair(encoder(8, 2), encoder(dim, 4), make)
    layers = {"mse": [(1, 2), (2, 4)], "cosine": [(1, 1), (2, 4)], "embeddings": [(0, 0)]}[kind]
    weight = dict(loss.named_parameters()).get("project.weight")
    assert (weight is None) == (dim == 8)
    means = []
    for student_layer, teacher_layer in layers:
        distances = []
        for text, position in student_out.token_mask.nonzero().tolist():
            x, y = (
                student_out.hidden_states[student_layer][text, position].tolist(),
                teacher_out.hidden_states[teacher_layer][text, position].tolist(),
            )
            if weight is not None:
                x = [sum(a * b for a, b in zip(output_weights, x, strict=True)) for output_weights in weight.tolist()]
            if kind == "cosine":
                dot = sum(a * b for a, b in zip(x, y, strict=True))
                distances.append(1 - dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y)))
            else:
                distances.append(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(y))
        means.append(sum(distances) / len(distances))
    # TinyBERT's equation 11: layers are summed, each with weight 1.
    assert loss_value == pytest.approx(sum(means), **CLOSE)


def by_heads(model: Encoder, outputs: ModelOutputs, layer: int, part: str, heads: int) -> list[Any]:
    """Return projections by text, head and position, computed from the layer's weights alone."""
    linear = getattr(model.blocks[layer].attention, part)
    x = outputs.hidden_states[layer] @ linear.weight.T + linear.bias
    width = x.shape[-1] // heads
    return [
        [x[text, :, head * width : (head + 1) * width].tolist() for head in range(heads)] for text in range(BATCH_SIZE)
    ]


@pytest.mark.parametrize("queries", [1, 3, 128])
@pytest.mark.parametrize("window", [None, 4])
def test_attention_maps(window: int | None, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_losses, "QUERY_CHUNK_SIZE", queries)
    attention: Any = FullAttention if window is None else partial(LongformerAttention, window=window)
    student, teacher = encoder(8, 1, 2, attention), encoder(12, 2, 2)
    loss_value, student_out, teacher_out, loss = pair(student, teacher, kinds.AttentionMSE)

    def expected(global_tokens: list[tuple[int, int]]) -> float:
        read_by = ((student, student_out, 0), (teacher, teacher_out, 1))
        parts = [by_heads(*inputs, name, 2) for inputs in read_by for name in ("query", "key")]
        squared_errors = []
        for text in range(BATCH_SIZE):
            positions = student_out.token_mask[text].nonzero().flatten().tolist()
            for head in range(2):
                for i in positions:
                    for j in positions:
                        if (window is not None and abs(i - j) > window // 2) or (text, i) in global_tokens:
                            continue
                        scores = [
                            sum(a * b for a, b in zip(q[text][head][i], k[text][head][j], strict=True))
                            / math.sqrt(len(q[text][head][i]))
                            for q, k in (parts[:2], parts[2:])
                        ]
                        squared_errors.append((scores[0] - scores[1]) ** 2)
        return sum(squared_errors) / len(squared_errors)

    assert loss_value == pytest.approx(expected([]), **CLOSE)
    # Global tokens have separate query projections: their scores are not compared.
    global_tokens = torch.zeros(BATCH_SIZE, LENGTH, dtype=torch.bool)
    global_tokens[0, 2] = True
    loss_without_global_tokens = loss(replace(student_out, global_attention_mask=global_tokens), teacher_out)
    assert float(loss_without_global_tokens.detach()) == pytest.approx(expected([(0, 2)]), **CLOSE)


@pytest.mark.parametrize("heads", [None, 4])
def test_value_relations(heads: int | None) -> None:
    student, teacher = encoder(8, 1, 2), encoder(12, 2, 2)
    loss_value, student_out, teacher_out, _ = pair(student, teacher, partial(kinds.ValueRelations, heads=heads))
    count = heads or 2
    student_values, teacher_values = (
        by_heads(student, student_out, 0, "value", count),
        by_heads(teacher, teacher_out, 1, "value", count),
    )
    divergences = []
    for text in range(BATCH_SIZE):
        positions = student_out.token_mask[text].nonzero().flatten().tolist()
        for head in range(count):
            for i in positions:
                relations = [
                    softmax(
                        [
                            sum(a * b for a, b in zip(v[text][head][i], v[text][head][j], strict=True))
                            / math.sqrt(len(v[text][head][i]))
                            for j in positions
                        ]
                    )
                    for v in (teacher_values, student_values)
                ]
                divergences.append(kl(*relations))
    assert loss_value == pytest.approx(sum(divergences) / len(divergences), **CLOSE)


def test_value_relations_of_decoders_look_back_within_documents() -> None:
    torch.manual_seed(0)
    memories = [partial(RecurrentMemory, window=16)]
    models = [MemoryTransformer(VOCAB, dim=8, depth=1, heads=2, memories=memories).double() for _ in range(2)]
    for model in models:
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.5)
    tokens = torch.randint(VOCAB, (1, 6))
    document_starts = torch.zeros(1, 6, dtype=torch.bool)
    document_starts[0, 4] = True
    outputs = []
    for model in models:
        hidden = model(tokens, document_starts=document_starts, return_hidden_states=True).hidden_states
        outputs.append(collect_language_outputs(model, hidden, tokens, document_starts))
    dims = ModelDims.from_model(models[0])
    loss_value = float(kinds.ValueRelations(dims, dims)(*outputs).detach())
    divergences = []
    values = [output.values(0)[0].tolist() for output in outputs]
    for head in range(2):
        for i in range(6):
            visible = range(4 if i >= 4 else 0, i + 1)
            part = slice(4 * head, 4 * head + 4)
            relations = [
                softmax([sum(a * b for a, b in zip(v[i][part], v[j][part], strict=True)) / 2 for j in visible])
                for v in (values[1], values[0])
            ]
            divergences.append(kl(*relations))
    assert loss_value == pytest.approx(sum(divergences) / len(divergences), **CLOSE)


def test_hard_labels_return_the_students_loss() -> None:
    student_loss = torch.tensor(2.5)
    assert kinds.HardLabels(DIMS, DIMS)(ModelOutputs(None, loss=student_loss), ModelOutputs(None)) is student_loss


@pytest.mark.parametrize(
    ("make", "teacher", "message"),
    [
        (kinds.SoftTargets, {"num_classes": 0}, "no head for the task. Fine-tune it first"),
        (kinds.SoftTargets, {"num_classes": 12}, "student has 11 classes, the teacher 12. Use the same vocabulary"),
        (partial(kinds.SoftTargets, temperature=0.0), {}, "temperature is 0"),
        (partial(kinds.SoftTargets, weight=-1.0), {}, "SoftTargets's weight is -1"),
        (partial(kinds.SoftTargets, begin=0.5, end=0.5), {}, "SoftTargets begins at 0.5 and ends at 0.5"),
        (kinds.HiddenMSE, {"depth": 3}, "2 layers, which do not divide the teacher's 3. Choose a depth of 1, 3"),
        (partial(kinds.HiddenMSE, layers=NoLayers()), {}, "its layer map has none. Use EveryKthLayer"),
        (kinds.HiddenMSE, {"depth": 0}, r"the teacher \(Encoder\) returns none"),
        (kinds.AttentionMSE, {"heads": (4, 4)}, "has 2 heads, layer 0 of the teacher 4.* Use 4 heads in the student"),
        (kinds.AttentionMSE, {"has_attention_maps": False}, r"\(Encoder\) attends to random blocks or a memory"),
        (kinds.ValueRelations, {"heads": (2, 4)}, "2 heads, layer 1 of the teacher 4.* that divide both widths"),
        (partial(kinds.ValueRelations, heads=3), {}, r"value width \(8\) is not divisible by heads \(3\)"),
    ],
)
def test_mismatched_dimensions_are_rejected_with_a_hint(make: Any, teacher: dict[str, Any], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        make(DIMS, replace(DIMS, **teacher))


def test_dims_match_the_model() -> None:
    dims = ModelDims.from_model(encoder(8, 2, 4))
    assert dims == ModelDims("Encoder", 8, 2, (4, 4), (8, 8), VOCAB, has_attention_maps=True, classes_are_tokens=True)
    assert not ModelDims.from_model(encoder(8, 2, 4, partial(BigBirdAttention, block_size=4))).has_attention_maps
    assert not ModelDims.from_model(
        encoder(8, 2, 4, partial(LongformerAttention, window=4, num_random_tokens=1))
    ).has_attention_maps
    with pytest.raises(MemtxError, match="A Linear can be neither teacher nor student"):
        ModelDims.from_model(nn.Linear(2, 2))

"""Choices, retrieval, dialogues and several labels: losses and scores by their definitions, and learning end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EarlyStopping
from torch.nn import functional as F

from memtx.cli.class_report import write_class_report
from memtx.data.tasks.batches import collate_examples
from memtx.data.tasks.data_module import TaskDataModule
from memtx.data.tasks.retrieval import RetrievalExample
from memtx.errors import MemtxError
from memtx.metrics import ClassReport, RetrievalScore
from memtx.models.encoder import Encoder
from memtx.training.callbacks.defaults import adapt_options
from memtx.training.class_weights import compute_class_weights
from memtx.training.finetuning import ClassificationModule
from tests.tasks import KINDS, MODULES, body, folder, records, task, tokenizer, write_lines
from tests.training.test_finetuning import parts, trainer


def batch_of(kind: str, inputs: list[dict[str, Any]], **options: Any) -> Any:
    kind_task, tokens = task(kind, **options), tokenizer()
    return collate_examples([kind_task.prepare(kind_task.parse(record), tokens) for record in inputs], 0)


def module_of(kind: str, **options: Any) -> Any:
    return MODULES[kind](backbone=body(), vocab_size=200, num_labels=task(kind).num_labels, **options)


@pytest.mark.parametrize("stride", [None, 4])
def test_the_loss_of_choices_is_the_cross_entropy_of_each_example(stride: int | None) -> None:
    inputs = [
        {"text": "the whale " * (1 if stride is None else 4), "choices": choices, "label": label}
        for choices, label in ((["a", "the", "sea"], 2), (["ship", "sea"], 0))
    ]
    batch = batch_of("multiple_choice", inputs, max_length=14, stride=stride)
    logits = torch.randn(len(batch.tokens), 1, generator=torch.Generator().manual_seed(0))
    expected = []
    for example, label in enumerate((2, 0)):
        groups, is_example = batch.groups, batch.groups[:, 0] == example
        scores = [
            logits[is_example & (groups[:, 1] == part)].mean() for part in range(int(groups[is_example].max()) + 1)
        ]
        scores = scores[: len(inputs[example]["choices"])]
        expected.append(F.cross_entropy(torch.stack(scores)[None], torch.tensor([label])))
    loss = module_of("multiple_choice").compute_loss(logits, batch)
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_negatives_are_the_other_documents_of_the_batch_but_no_copies() -> None:
    inputs = [
        {"query": "a", "positive": "the whale"},
        {"query": "sea", "positive": "the ship", "negatives": ["old sea"]},
        {"query": "of", "positive": "the whale"},
    ]
    batch = batch_of("retrieval", inputs)
    vectors = torch.randn(len(batch.tokens), 8, generator=torch.Generator().manual_seed(0))
    queries, documents = F.normalize(vectors[[0, 2, 5]], dim=-1), F.normalize(vectors[[1, 3, 4, 6]], dim=-1)
    scores = queries @ documents.T / 0.1
    scores[0, 3] = scores[2, 0] = -torch.inf
    expected = F.cross_entropy(scores, torch.tensor([0, 1, 3]))
    torch.testing.assert_close(module_of("retrieval", temperature=0.1).compute_loss(vectors, batch), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_ranks_are_those_of_a_sort(num_queries: int, num_parts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    documents = F.normalize(torch.randn(12, 4, generator=generator), dim=-1)
    queries = F.normalize(torch.randn(num_queries, 4, generator=generator), dim=-1)
    targets = torch.randint(12, (num_queries,), generator=generator)
    scores = queries @ documents.T
    ranks = 1 + (scores > scores.gather(1, targets[:, None])).sum(1)
    for k, expected in ((None, (1 / ranks).mean()), (3, (ranks <= 3).float().mean())):
        score = RetrievalScore(k)
        for index in torch.arange(num_queries).chunk(num_parts):
            # Documents come more than once, as the paragraph of several questions does.
            score.update(queries[index], index, targets[index] * 7, documents, torch.arange(12) * 7)
        torch.testing.assert_close(score.compute(), expected)


def test_equal_vectors_and_other_answers_of_a_query_are_ranked_fairly() -> None:
    score = RetrievalScore()
    score.update(torch.ones(1, 2), torch.tensor([0]), torch.tensor([3]), torch.ones(4, 2), torch.arange(4))
    assert float(score.compute()) == 0.25
    score = RetrievalScore(1)
    vectors = torch.eye(2)
    score.update(vectors[[0, 0]], torch.tensor([5, 5]), torch.tensor([0, 1]), vectors[[0, 0]], torch.tensor([0, 1]))
    assert float(score.compute()) == 1.0


@pytest.mark.parametrize(
    ("kind", "measure"),
    [("multiple_choice", "accuracy"), ("retrieval", "recall_at_1"), ("dialogue", "accuracy"), ("multi_label", "f1")],
)
def test_each_kind_learns_a_simple_rule(kind: str, measure: str, tmp_path: Path) -> None:
    module, data = parts(kind, folder(tmp_path, kind, 24))
    run = trainer(max_epochs=15, check_val_every_n_epoch=99)
    run.fit(module, data)
    # Guessing reaches half of that at most.
    assert run.validate(module, data, verbose=False)[0][f"val_{measure}"] > 0.7
    assert (module.report is not None) == (kind in ("dialogue", "multi_label"))


def test_a_run_that_ends_before_its_first_validation_does_not_ask_for_its_metric(tmp_path: Path) -> None:
    module, data = parts("classification", folder(tmp_path, "classification", 24))
    options = {"callbacks": [EarlyStopping("val_accuracy", mode="max")], "enable_checkpointing": False}
    callbacks = adapt_options(options, [], interactive=False)["callbacks"]
    run = trainer(max_steps=2, callbacks=callbacks)
    run.fit(module, data)
    assert run.global_step == 2
    module, data = parts("classification", tmp_path)
    stopping = EarlyStopping("val_accuracy", mode="max", patience=1, min_delta=2.0)
    run = trainer(max_epochs=9, callbacks=adapt_options(options | {"callbacks": [stopping]}, [], False)["callbacks"])
    run.fit(module, data)
    assert run.current_epoch == 2


def test_weights_of_classes_are_in_the_training_loss_alone(tmp_path: Path) -> None:
    root = folder(tmp_path, "classification", 8)
    write_lines(root / "train.jsonl", records("classification", 8)[::2] + records("classification", 2)[1:])
    module, data = parts("classification", root, class_weights="balanced")
    trainer(max_steps=1, limit_val_batches=0).fit(module, data)
    torch.testing.assert_close(module.label_weights, torch.tensor([5 / 2, 5 / 8]))
    batch = next(iter(data.train_dataloader()))
    logits = torch.randn(len(batch.labels), 2)
    expected = F.cross_entropy(logits, batch.labels, weight=torch.tensor([5 / 2, 5 / 8]))
    torch.testing.assert_close(module.train().compute_loss(logits, batch), expected)
    torch.testing.assert_close(module.eval().compute_loss(logits, batch), F.cross_entropy(logits, batch.labels))
    assert "label_weights" not in module.state_dict()

    def weights(choice: Any) -> list[float]:
        return compute_class_weights(choice, data, ClassificationModule.balanced_weights).tolist()

    assert weights({"pos": 3.0}) == [1.0, 3.0]
    assert weights([2.0, 4.0]) == [2.0, 4.0]
    for choice, message in (({"poz": 1.0}, "Did you mean 'pos'"), ([1.0], "1 weights"), ([0.0, 1.0], "0.0 for 'neg'")):
        with pytest.raises(MemtxError, match=message):
            weights(choice)
    with pytest.raises(MemtxError, match="RetrievalModule does not support class_weights"):
        module_of("retrieval", class_weights="balanced")


def test_rare_labels_weigh_more_when_balanced(tmp_path: Path) -> None:
    lines = [{"text": "a", "labels": labels} for labels in (["ship"], ["ship", "whale"], ["ship"], [])]
    write_lines(tmp_path / "train.jsonl", lines)
    data = TaskDataModule(task("multi_label"), str(tmp_path))
    weights = compute_class_weights("balanced", data, MODULES["multi_label"].balanced_weights)
    # texts without and with each label; one with a label that no text has
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 4.0, 3.0]))


def test_a_report_has_scores_of_classes_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = ClassReport(["a", "b"], ["a", "b"])
    for prediction, target in ("aa", "ab", "bb", "ab"):
        report.update([(prediction,)], [(target,)])
        report.update_confusion([prediction], [target])
    write_class_report(report.compute(), tmp_path)
    content = json.loads((tmp_path / "classes.json").read_text())
    assert content["classes"]["a"] == {"precision": 1 / 3, "recall": 1.0, "f1": 0.5, "support": 1}
    assert content["confusion"] == {"labels": ["a", "b"], "matrix": [[1, 0], [2, 1]]}
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert "0.333" in capsys.readouterr().out
    write_class_report(None, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_dialogues_lose_their_oldest_turns_whole() -> None:
    kind_task = type(task("dialogue"))(["x"], 16, drop_oldest=True)
    turns = [{"role": "user", "content": "the white whale"}, {"role": "agent", "content": "lost at sea"}] * 3
    prepared = kind_task.prepare(kind_task.parse({"turns": turns, "label": "x"}), tokenizer())
    assert len(prepared.windows) == 1
    assert len(prepared.windows[0].ids) <= 16
    (text,) = tokenizer().decode(prepared.windows[0].ids[1:-1].tolist()).split("[SEP]")[:1]
    assert text.split()[0] in ("user", "agent")
    prediction = kind_task.postprocess(prepared, [np.zeros(1, dtype=np.float32)])
    assert 0 < prediction["dropped_turns"] < 6
    assert "1 of 1 dialogues" in str(kind_task.describe_losses([prepared]))
    # One turn that is too long keeps its end.
    long_turn = kind_task.prepare(
        kind_task.parse({"turns": [{"role": "a", "content": "sea " * 40}]}, False), tokenizer()
    )
    assert len(long_turn.windows[0].ids) == 16


def test_a_retrieval_input_is_ranked_or_embedded() -> None:
    kind_task = task("retrieval")
    assert kind_task.parse({"text": "a"}, False) == RetrievalExample("a", is_document=True)
    assert kind_task.parse({"query": "a"}, False) == RetrievalExample("a")
    assert kind_task.parse({"query": "a", "documents": ["b"]}, False).documents == ("b",)
    prepared = kind_task.prepare(RetrievalExample("a", ("b", "c")), tokenizer())
    vectors = [np.array(vector, dtype=np.float32) for vector in ([1.0, 0.0], [0.0, 2.0], [3.0, 0.0])]
    assert kind_task.postprocess(prepared, vectors) == {"best": "c", "ranking": [1, 0], "scores": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("multiple_choice", {"text": "a", "choices": ["b"], "label": 0}, "1 entries"),
        ("multiple_choice", {"text": "a", "choices": ["b", "c"], "label": 2}, "'label' is 2"),
        ("multiple_choice", {"text": "a", "choices": ["b", "b"], "label": "b"}, "'label' is"),
        ("multiple_choice", {"text": "a", "choices": ["b", "c"]}, "no 'label'"),
        ("retrieval", {"query": "a"}, "no 'positive'"),
        ("retrieval", {"query": "a", "positive": "b", "negatives": ["b"]}, "contains the positive"),
        ("dialogue", {"turns": [], "label": "user"}, "'turns' is empty"),
        ("dialogue", {"turns": [{"role": "user"}], "label": "user"}, r"turns\[0\]: There is no 'content'"),
        ("dialogue", {"messages": ["a"], "label": "user"}, r"messages\[0\] is"),
        ("dialogue", {"text": "a", "label": "user"}, "no 'turns'"),
        ("multi_label", {"text": "a"}, "no 'labels'"),
        ("multi_label", {"text": "a", "labels": "ship"}, "expected a list"),
        ("multi_label", {"text": "a", "labels": ["shop"]}, "Did you mean 'ship'"),
    ],
)
def test_bad_examples_are_named(kind: str, record: dict[str, Any], message: str) -> None:
    kind_task = task(kind)
    with pytest.raises(MemtxError, match=message):
        kind_task.prepare(kind_task.parse(record), tokenizer())


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "longformer", "bigbird"])
def test_every_task_begins_from_a_published_encoder(name: str, parity: Path) -> None:
    for kind in KINDS:
        module = MODULES[kind](pretrained=str(parity / name), vocab_size=120, num_labels=task(kind).num_labels or 2)
        batch = batch_of(kind, records(kind, 3))
        loss = module.compute_loss(module._logits(batch._replace(tokens=batch.tokens % 120)), batch)
        loss.backward()
        weights = [weight for weight in module.model.backbone.parameters() if weight.grad is not None]
        assert isinstance(module.model.backbone, Encoder)
        assert loss.item() > 0
        assert len(weights) > 30


def test_a_task_begins_from_the_encoder_of_another_task(tmp_path: Path) -> None:
    trained = module_of("tagging")
    trained.model.save_pretrained(tmp_path)
    module = MODULES["retrieval"](pretrained=str(tmp_path), vocab_size=200, num_labels=1)
    weights = module.model.backbone.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in trained.model.backbone.state_dict().items())

"""Fine-tuned encoders in published folders predict from the folder's own tokenizer, labels and lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import memtx
from memtx.cli.main import main
from memtx.errors import CheckpointError, DataError
from memtx.inference.published_tasks import get_published_task, load_published_predictor
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel
from tests.hf.folders import write
from tests.hf.test_task_heads import RECORDED, draw
from tests.tasks import texts

FAMILIES = ("Bert", "DistilBert", "Roberta", "Longformer", "BigBird")


def backend_of(family: str) -> Any:
    """Return a tokenizer of the family's kind, trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if family in ("Bert", "DistilBert", "BigBird"):
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer, backend.decoder = normalizers.BertNormalizer(lowercase=True), decoders.WordPiece()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        backend.train_from_iterator(texts(30), trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        return backend
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(texts(30), trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return backend


def folder_of(path: Path, family: str, task: str, **config: Any) -> Path:
    case, backend = RECORDED[f"{family}For{task}"], backend_of(family)
    vocab_size = backend.get_vocab_size()
    shapes = {name: [vocab_size if size == 40 else size for size in shape] for name, shape in case["shapes"].items()}
    for name, shape in shapes.items():
        if "position_embeddings" in name:
            shape[0] = 66
        elif name.startswith("classifier") and shape[0] == 3 and "id2label" in config:
            shape[0] = len(config["id2label"])
    size = {"vocab_size": vocab_size, "max_position_embeddings": 66}
    folder = write(path, {**case["config"], **size, **config}, draw(shapes))
    backend.save(str(folder / "tokenizer.json"))
    return folder


def logits_of(folder: Path, *pair: str, globals_: int = 0) -> tuple[Tensor, Any]:
    """Return the logits for one or two texts as the library itself encodes them, and its encoding."""
    from tokenizers import Tokenizer

    encoding = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(*pair)
    tokens, model = torch.tensor([encoding.ids]), memtx.from_pretrained(folder)
    types, mask = torch.tensor([encoding.type_ids]), torch.ones_like(tokens)
    with torch.no_grad():
        if isinstance(model, Encoder):
            return model(tokens).logits[0], encoding
        assert isinstance(model, TaskModel)
        return model(tokens, mask, types, (torch.arange(tokens.shape[1]) < globals_).long()[None])[0], encoding


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_and_pairs_are_classified(tmp_path: Path, family: str) -> None:
    labels = {"0": "bad", "1": "good", "2": "mixed"}
    folder = folder_of(tmp_path / "model", family, "SequenceClassification", id2label=labels)
    assert get_published_task(folder) == "ForSequenceClassification"
    predictor = load_published_predictor(folder)
    pair = {"text": "the captain saw the whale", "text_pair": "Ahab lost the ship"}
    single, double = predictor.predict(["the whale", pair])
    for prediction, inputs in ((single, ("the whale",)), (double, tuple(pair.values()))):
        probs = logits_of(folder, *inputs, globals_=1)[0].softmax(-1)
        expected = dict(zip(labels.values(), probs.tolist(), strict=True))
        # float32, with the padding of a batch
        assert prediction["scores"] == pytest.approx(expected, abs=1e-4)
        assert prediction["label"] == max(expected, key=expected.__getitem__)
    assert double == predictor.predict([{"text_a": pair["text"], "text_b": pair["text_pair"]}])[0]
    assert set(predictor.predict(["the whale " * 100])[0]["scores"]) == set(labels.values()), "in windows"


def test_problem_types_decide_on_the_scores(tmp_path: Path) -> None:
    options: dict[str, Any] = {"id2label": {"0": "sea", "1": "night"}, "problem_type": "multi_label_classification"}
    folder = folder_of(tmp_path / "several", "Bert", "SequenceClassification", **options)
    prediction = load_published_predictor(folder).predict(["the dark sea"])[0]
    probs = logits_of(folder, "the dark sea")[0].sigmoid().tolist()
    assert list(prediction["scores"].values()) == pytest.approx(probs, abs=1e-5)
    assert prediction["labels"] == [label for label, score in prediction["scores"].items() if score >= 0.5]
    folder = folder_of(tmp_path / "one", "Bert", "SequenceClassification", id2label={"0": "LABEL_0"})
    prediction = load_published_predictor(folder).predict(["the dark sea"])[0]
    assert prediction == {"score": pytest.approx(float(logits_of(folder, "the dark sea")[0]), abs=1e-5)}
    with pytest.raises(DataError, match="problem_type is 'several'"):
        load_published_predictor(
            folder_of(tmp_path / "wrong", "Bert", "SequenceClassification", problem_type="several")
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_tagged(tmp_path: Path, family: str) -> None:
    folder, text = folder_of(tmp_path, family, "TokenClassification"), "the captain, Ahab, saw"
    prediction = load_published_predictor(folder).predict([text])[0]
    logits, encoding = logits_of(folder, text)
    by_start = {start: logits[index].argmax() for index, (start, stop) in enumerate(encoding.offsets) if stop > start}
    words = ["the", "captain", ",", "Ahab", ",", "saw"]
    assert prediction["tokens"] == words
    word_starts = [0, 4, 11, 13, 17, 19]
    # Byte-level tokens begin with the space before a word.
    expected = [by_start.get(start, by_start.get(start - 1)) for start in word_starts]
    assert prediction["tags"] == [("O", "B-X", "I-X")[int(label)] for label in expected if label is not None]
    for span in prediction["spans"]:
        assert text[span["start"] : span["end"]] == span["text"]


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_are_answered(tmp_path: Path, family: str) -> None:
    folder = folder_of(tmp_path, family, "QuestionAnswering")
    question, context = "who saw it", "the old captain saw the white whale in the night"
    prediction = load_published_predictor(folder).predict([{"question": question, "context": context}])[0]
    from tokenizers import Tokenizer

    num_question = len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(question, add_special_tokens=False))
    logits, encoding = logits_of(folder, question, context, globals_=1 + num_question)
    best = max(
        (float(logits[start, 0] + logits[stop, 1]), start, stop)
        for start in range(len(encoding.ids))
        for stop in range(start, len(encoding.ids))
        if encoding.sequence_ids[start] == encoding.sequence_ids[stop] == 1
    )
    first, last = encoding.offsets[best[1]][0], encoding.offsets[best[2]][1]
    assert prediction["answer"].strip() == context[first:last].strip()
    assert context[prediction["start"] : prediction["end"]] == prediction["answer"]
    assert not prediction["is_impossible"]


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_tokens_are_filled(tmp_path: Path, family: str) -> None:
    folder = folder_of(tmp_path, family, "MaskedLM")
    mask = "<mask>" if family in ("Roberta", "Longformer") else "[MASK]"
    predictor = load_published_predictor(folder)
    text = f"the {mask} saw the {mask}"
    prediction = predictor.predict([{"text": text, "top_k": 3}])[0]
    logits, encoding = logits_of(folder, text)
    positions = [index for index, token in enumerate(encoding.tokens) if token == mask]
    assert len(prediction["masks"]) == len(positions) == 2
    for candidates, position in zip(prediction["masks"], positions, strict=True):
        top = logits[position].softmax(-1).topk(3)
        assert [candidate["id"] for candidate in candidates] == top.indices.tolist()
        assert [candidate["score"] for candidate in candidates] == pytest.approx(top.values.tolist(), abs=1e-5)
    for raw_input, message in (
        ("the whale", "no masked token"),
        ({"txt": "x"}, "There is no 'text'"),
        ({"text": text, "top_k": 0}, "top_k is 0"),
        (f"{mask} " + "the " * 200, "the model reads 6"),
    ):
        with pytest.raises(DataError, match=message):
            predictor.predict([raw_input])


def test_a_published_folder_is_served_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path, "Bert", "SequenceClassification")
    assert main(["predict", "--checkpoint", str(folder), "--text", "the whale"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["label"] in ("O", "B-X", "I-X")
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    pytest.importorskip("httpx", reason="the package 'httpx' is not installed")
    from fastapi.testclient import TestClient

    from memtx.serving.app import create_task_app

    with TestClient(create_task_app(load_published_predictor(folder), model_name="m")) as web:
        response = web.post("/v1/predict", json={"input": ["the whale", {"text": "x", "text_pair": "y"}]}).json()
    assert response["task"] == "text_classification"
    assert response["data"][0] == {"index": 0, **printed} or response["data"][0]["label"] == printed["label"]


@pytest.mark.parametrize("family", ["Bert", "BigBird"])
@pytest.mark.parametrize("name", ["ForMultipleChoice", "ForNextSentencePrediction", "Model", ""])
def test_other_tasks_are_named(tmp_path: Path, family: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path, family, "SequenceClassification", architectures=[f"{family}{name}"] if name else None)
    class_name = f"{family}{name}" if name else "model without a class name"
    for words in (["predict", "--text", "x"], ["serve"]):
        assert main([*words, "--checkpoint", str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"holds a {class_name}, whose task is not supported. Give a model whose class name ends with" in line
    with pytest.raises(CheckpointError, match="whose task is not supported" if "Choice" in name else "classifier"):
        memtx.from_pretrained(folder)


def test_damaged_labels_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "Bert", "SequenceClassification")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": ["a"]}))
    with pytest.raises(CheckpointError, match="id2label"):
        load_published_predictor(folder)
    (folder / "config.json").write_text(json.dumps({**config, "id2label": None}))
    scores = load_published_predictor(folder).predict(["the whale"])[0]["scores"]
    assert list(scores) == ["LABEL_0", "LABEL_1", "LABEL_2"]

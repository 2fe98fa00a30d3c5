"""Small examples of every task, a folder of them, and a small model, shared by the tests of tasks."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memtx.data.hf_tokenizers import HFTokenizer, WordPieceTokenizer
from memtx.data.tasks.base import Task
from memtx.data.tasks.classification import Classification, MultiLabelClassification, PairClassification
from memtx.data.tasks.dialogue import DialogueClassification
from memtx.data.tasks.multiple_choice import MultipleChoice
from memtx.data.tasks.question_answering import QuestionAnswering
from memtx.data.tasks.retrieval import Retrieval
from memtx.data.tasks.tagging import Tagging
from memtx.inference.predictor import Predictor
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.longformer import LongformerAttention
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel
from memtx.training.finetuning import (
    ClassificationModule,
    MultiLabelModule,
    QuestionAnsweringModule,
    TaggingModule,
    TaskModule,
)
from memtx.training.grouped_tasks import MultipleChoiceModule, RetrievalModule

WORDS = "the a whale ship sea night storm captain saw found lost old white dark of in to Ahab".split()  # noqa: SIM905


def texts(count: int, seed: int = 0, words: int = 12) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)) + " ." for _ in range(count)]


def records(kind: str, count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Return examples whose labels can be read off them."""
    examples: list[dict[str, Any]] = []
    draw = random.Random(seed)
    for index, text in enumerate(texts(count, seed)):
        if kind == "classification":
            good = index % 2 == 0
            examples.append({"text": f"{text} {'good' if good else 'bad'}", "label": "pos" if good else "neg"})
        elif kind == "matching":
            same = index % 2 == 0
            examples.append(
                {
                    "text_a": text,
                    "text_b": text if same else " ".join(reversed(text.split())),
                    "label": "same" if same else "other",
                }
            )
        elif kind == "tagging":
            tokens = text.split()
            tags = ["B-WHO" if token in ("captain", "Ahab") else "O" for token in tokens]
            examples.append({"tokens": tokens, "tags": tags})
        elif kind == "multi_label":
            names = ("whale", "ship", "storm")  # each is in some text of a few
            text = f"{text} {names[index % 3]}"
            examples.append({"text": text, "labels": [name for name in names if name in text.split()]})
        elif kind == "multiple_choice":
            right, *others = draw.sample(["the white whale", "a lost ship", "the dark sea", "an old storm"], 3)
            choices = draw.sample([right, *others][: 2 + index % 2], 2 + index % 2)
            examples.append({"text": right, "question": "who ?", "choices": choices, "label": right})
        elif kind == "retrieval":
            words = text.split()
            negatives = {} if index % 2 else {"negatives": [f"the {words[0]} of nothing"]}
            examples.append({"query": " ".join(words[:4]), "positive": " ".join(words[:8]), **negatives})
        elif kind == "dialogue":
            roles = ("user", "agent") if index % 2 else ("agent", "user")
            turns = [{"role": role, "content": content} for role, content in zip(roles, ("Ahab", text), strict=True)]
            examples.append({"turns": turns, "label": roles[0]})
        else:
            start = text.find("whale")
            answers = [{"text": "whale", "answer_start": start}] if start >= 0 else []
            examples.append(
                {"id": f"q{index}", "title": "t", "context": text, "question": "who swims ?", "answers": answers,
                 "is_impossible": not answers}
            )  # fmt: skip
    return examples


def task(kind: str, max_length: int = 64, stride: int | None = None) -> Task:
    if kind == "questions":
        return QuestionAnswering(max_length, stride)
    if kind == "tagging":
        return Tagging(["B-WHO", "O"], max_length, stride)
    if kind == "matching":
        return PairClassification(["other", "same"], max_length, stride)
    if kind == "multiple_choice":
        return MultipleChoice(max_length, stride)
    if kind == "retrieval":
        return Retrieval(max_length, stride)
    if kind == "dialogue":
        return DialogueClassification(["agent", "user"], max_length, stride)
    if kind == "multi_label":
        return MultiLabelClassification(["ship", "storm", "whale"], max_length, stride)
    return Classification(["neg", "pos"], max_length, stride)


KINDS = (
    "classification",
    "matching",
    "tagging",
    "questions",
    "multi_label",
    "multiple_choice",
    "retrieval",
    "dialogue",
)
MODULES: dict[str, type[TaskModule]] = {
    "classification": ClassificationModule,
    "matching": ClassificationModule,
    "tagging": TaggingModule,
    "questions": QuestionAnsweringModule,
    "multi_label": MultiLabelModule,
    "multiple_choice": MultipleChoiceModule,
    "retrieval": RetrievalModule,
    "dialogue": ClassificationModule,
}


def tokenizer(size: int = 200) -> HFTokenizer:
    tokenizer_trained = WordPieceTokenizer(size, lowercase=False)
    tokenizer_trained.train(texts(50))
    return tokenizer_trained


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def folder(root: Path, kind: str, count: int = 24) -> Path:
    for seed, split in enumerate(("train", "validation", "test")):
        write_lines(root / f"{split}.jsonl", records(kind, count, seed))
    return root


def body(max_length: int = 64) -> Any:
    return partial(
        Encoder,
        dim=16,
        depth=1,
        heads=2,
        attentions=[partial(LongformerAttention, window=4)],
        embeddings=partial(TextEmbeddings, num_positions=max_length, type_vocab_size=2),
        add_mlm_head=False,
    )


def predictor(kind: str, max_length: int = 64, stride: int | None = None, seed: int = 0) -> Predictor:
    torch.manual_seed(seed)
    a_task, tokens = task(kind, max_length, stride), tokenizer()
    head: Any = MODULES[kind].default_head
    return Predictor(TaskModel(tokens.vocab_size, a_task.num_labels, body(max_length), head), tokens, a_task)

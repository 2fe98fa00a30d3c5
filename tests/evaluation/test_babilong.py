"""BABILong: the benchmark's rule for answers, its prompt, and answers that a model writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memtx.data.babi import Story
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import DataError
from memtx.evaluation.babilong import Prompt, collect_labels, evaluate_babilong, is_right, load_prompts
from memtx.evaluation.free_answers import write_answers
from memtx.evaluation.haystack import read_contexts
from memtx.inference.generate import generate
from memtx.inference.sampling import SamplingParams
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState
from tests.evaluation.test_babi import HAYSTACK

TOKENIZER = ByteTokenizer()
LABELS = {"bathroom", "garden", "office"}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (" garden", True),
        ("The most recent location of Mary is GARDEN. She was in the office.", True),
        ("Mary is in the garden or in the office", False),
        ("garden<context> office", True),
        ("office", False),
        ("", False),
        (". garden", False),
    ],
)
def test_an_answer_is_right_if_its_first_sentence_names_it_alone(output: str, expected: bool) -> None:
    assert is_right(output, Story((), "Where is Mary?", "garden"), LABELS) is expected


def test_labels_of_the_question_and_lists_of_answers_follow_the_benchmark() -> None:
    # A label in the question is never the answer.
    assert is_right("the garden after the office", Story((), "Where was it before the office?", "garden"), LABELS)
    labels = collect_labels(["apple,football", "milk", "nothing"])
    assert labels == {"apple", "football", "milk", "nothing"}
    story = Story((), "What is Ann carrying?", "apple,football")
    assert is_right("football and apple", story, labels)
    assert not is_right("apple", story, labels)
    assert not is_right("apple, football, milk", story, labels)
    assert collect_labels(["n,e", "E,s"]) == {"n,e", "e,s"}
    assert is_right("n,e", Story((), "How do you go?", "n,e"), {"n,e", "e,s"})


def test_prompts_are_those_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"qa7": {"instruction": "I", "examples": "E", "post_prompt": "P"}}))
    prompt = load_prompts(str(path))[7]
    text = prompt.before + "C" + prompt.after.format(question="Q?")
    assert text == "I\n\nE\n\nP\n\n<context>\nC\n</context>\n\nQuestion: Q?"
    for content in ("{}", "[]", '{"qa1": {"instruction": "I"}}', '{"x": {}}'):
        path.write_text(content)
        with pytest.raises(DataError, match="has no prompt"):
            load_prompts(str(path))


@dataclass
class Output:
    logits: Tensor
    state: MemoryState


class Repeater:
    """Writes the same answer after every question mark; the state counts the tokens of the answer."""

    def __init__(self, answer: str) -> None:
        self.answer = answer.encode()
        self.lengths = set[int]()

    def init_state(self, batch_size: int) -> MemoryState:
        zeros = torch.zeros(batch_size, dtype=torch.int64)
        return MemoryState(zeros, ((zeros,),))

    def __call__(self, tokens: Tensor, state: MemoryState, labels: Tensor | None = None) -> Output:
        if labels is not None:
            self.lengths.add(tokens.shape[1])
        (counts,) = state.layers[0]
        counts = torch.where(tokens[:, -1] == ord("?"), 0, counts + 1)
        logits = torch.zeros(len(tokens), tokens.shape[1], TOKENIZER.vocab_size)
        for row, count in enumerate(counts.tolist()):
            logits[row, -1, self.answer[min(count, len(self.answer) - 1)]] = 1.0
        return Output(logits, MemoryState(state.position + tokens.shape[1], ((counts,),)))


def test_accuracy_is_the_share_of_right_answers_at_every_length() -> None:
    answers = ["garden", "office", "garden", "bathroom"]
    stories = [Story((f"Fact {n}.",), f"Where is {n}?", answer) for n, answer in enumerate(answers)]
    model: Any = Repeater(" the garden.")
    prompts = {1: Prompt("Read: ", "\n{question}")}
    for options in ({}, {"prompts": prompts}):
        results = evaluate_babilong(
            model, TOKENIZER, HAYSTACK, {1: stories}, [0, 500, 5], num_samples=4, segment_length=1000, **options
        )
        scores = [(result.name, result.distance, result.accuracy, result.chance) for result in results]
        assert scores == [("qa1", 0, 0.5, 0.5), ("qa1", 500, 0.5, 0.5), ("qa1", 5, None, 0.5)]
    # Begin token and context; then with the prompt before it. A context of 0 tokens holds the fact alone.
    assert model.lengths == {1 + 8, 1 + 500, 1 + 6 + 8, 1 + 6 + 500}
    with pytest.raises(DataError, match="no prompt for qa1"):
        evaluate_babilong(model, TOKENIZER, HAYSTACK, {1: stories}, [0], prompts={2: Prompt()})


def test_written_answers_equal_generation_one_text_at_a_time() -> None:
    torch.manual_seed(0)
    model = MemoryTransformer(TOKENIZER.vocab_size, dim=16, depth=1, heads=2).eval()
    contexts = [np.frombuffer(text, np.uint8).astype(np.int64) for text in (b"The moor is dark.", b"The wind was cold")]
    questions = [np.frombuffer(text, np.uint8).astype(np.int64) for text in (b" Why?", b" Who was it?")]
    state = read_contexts(model, contexts, TOKENIZER.bos_token_id)
    answers = write_answers(model, TOKENIZER, state, questions, 12, segment_length=5)
    for context, question, answer in zip(contexts, questions, answers, strict=True):
        prompt = bytes(np.concatenate([context, question]).tolist()).decode()
        options: dict[str, Any] = {"max_tokens": 12, "sampling_params": SamplingParams(temperature=0)}
        assert answer == "".join(generate(model, TOKENIZER, prompt, **options))

"""BABILong: stories of bAbI in book text, answered in words (Kuratov et al. 2024).

The prompt's layout and the rule by which an answer is right are those of the benchmark's code (booydar/babilong,
babilong/prompts.py and babilong/metrics.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from memtx import files
from memtx.data.babi import Story
from memtx.data.haystack import Haystack, TokenIds, encode_ids
from memtx.data.tokenizers import Tokenizer
from memtx.errors import DataError
from memtx.evaluation.accuracy import EvaluationResult, ProgressFn
from memtx.evaluation.babi import hide_stories
from memtx.evaluation.free_answers import write_answers
from memtx.evaluation.haystack import read_contexts
from memtx.models.recurrent_lm import RecurrentLanguageModel

MAX_ANSWER_TOKENS = 20
"""Maximum number of tokens of an answer, as in the benchmark."""

PROMPT_PARTS = ("instruction", "examples", "post_prompt")
PROMPT_HINT = (
    'Give a JSON object such as {"qa1": {"instruction": "...", "examples": "...", "post_prompt": "..."}}: '
    "the benchmark's DEFAULT_PROMPTS, written by json.dump."
)


@dataclass(frozen=True)
class Prompt:
    """Text before and after the context; the one after has a field ``{question}``."""

    before: str = ""
    after: str = " {question}"

    @classmethod
    def from_parts(cls, instruction: str, examples: str, post_prompt: str) -> Prompt:
        """Return the benchmark's prompt from its three parts."""
        return cls(
            f"{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n", "\n</context>\n\nQuestion: {question}"
        )


def load_prompts(path: str) -> dict[int, Prompt]:
    """Read the benchmark's prompts, by task number; raises DataError if the file has another form."""
    content = files.read_json(Path(path).expanduser())
    prompts = {}
    for name, parts in content.items() if isinstance(content, dict) else ():
        number = name.removeprefix("qa")
        entries = parts if isinstance(parts, dict) else {}
        texts = {key: entries[key] for key in PROMPT_PARTS if isinstance(entries.get(key), str)}
        if not number.isdecimal() or len(texts) < len(PROMPT_PARTS):
            raise DataError(f"'{path}' has no prompt at '{name}'.", PROMPT_HINT)
        prompts[int(number)] = Prompt.from_parts(**texts)
    if not prompts:
        raise DataError(f"'{path}' has no prompts.", PROMPT_HINT)
    return prompts


def collect_labels(answers: Collection[str]) -> set[str]:
    """Return the labels of a task in lower case: its answers, those of several words apart (qa8), directions not."""
    return {label for answer in map(str.lower, answers) for label in _split_answer(answer)}


def _split_answer(answer: str) -> list[str]:
    # A path such as "n,e" (qa19) is one label.
    return answer.split(",") if "," in answer and len(answer) > 3 else [answer]


def is_right(output: str, story: Story, labels: Collection[str]) -> bool:
    """Return whether the first sentence of an output names the answer and no other label.

    Labels of the question are ignored, since they are never the answer. ``labels`` are in lower case.
    """
    sentence = output.lower().split(".")[0]
    for mark in ("<context>", "<example>"):
        sentence = sentence.split(mark)[0]
    question = story.question.lower()
    named = {label for label in labels if label in sentence and label not in question}
    expected = _split_answer(story.answer.lower())
    return named == set(expected) and len(named) == len(expected)


def evaluate_babilong(
    model: RecurrentLanguageModel,
    tokenizer: Tokenizer,
    haystack: Haystack,
    tasks: dict[int, list[Story]],
    lengths: Sequence[int],
    *,
    prompts: dict[int, Prompt] | None = None,
    num_samples: int = 16,
    seed: int = 0,
    segment_length: int = 512,
    on_progress: ProgressFn = lambda _: None,
) -> list[EvaluationResult]:
    """Return the accuracy of written answers on every task at every length; None if no story fits.

    Args:
        model: Model in eval mode.
        tokenizer: Tokenizer of the model.
        haystack: Text to hide the facts in.
        tasks: Stories by task number.
        lengths: Tokens of the context: facts and text, without prompt and question. 0 is the facts alone.
        prompts: Prompt of each task. None gives the context and the question alone, as models read that are trained on
            the task.
        num_samples: Maximum number of questions per task and length.
        seed: Seed of the choice of stories, texts and positions.
        segment_length: Tokens per call.
        on_progress: Called after every call of the model on contexts with the number of tokens per context.

    Raises:
        DataError: A task has no prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    results = []
    for number, stories in tasks.items():
        if prompts is not None and number not in prompts:
            raise DataError(f"There is no prompt for qa{number}.", "Add it, or evaluate other tasks.")
        prompt = prompts[number] if prompts is not None else Prompt()
        counts = Counter(story.answer for story in stories)
        labels, chance = collect_labels(counts), counts.most_common(1)[0][1] / len(stories)
        before = encode_ids(tokenizer, prompt.before)
        for length in lengths:
            samples, contexts = hide_stories(haystack, stories, length, num_samples, generator)
            accuracy = None
            if samples:
                questions = [encode_ids(tokenizer, prompt.after.format(question=story.question)) for story in samples]
                contexts = [np.concatenate([before, context]) for context in contexts]
                outputs = _answer(model, tokenizer, contexts, questions, segment_length, on_progress)
                num_right = sum(is_right(*pair, labels) for pair in zip(outputs, samples, strict=True))
                accuracy = num_right / len(samples)
            results.append(EvaluationResult(f"qa{number}", length, accuracy, chance))
    return results


def _answer(
    model: RecurrentLanguageModel,
    tokenizer: Tokenizer,
    contexts: Sequence[TokenIds],
    questions: Sequence[TokenIds],
    segment_length: int,
    on_progress: ProgressFn,
) -> list[str]:
    """Return the answers; contexts of one length are read together."""
    answers = [""] * len(contexts)
    for length in dict.fromkeys(map(len, contexts)):
        indices = [index for index, context in enumerate(contexts) if len(context) == length]
        group = [contexts[index] for index in indices]
        state = read_contexts(model, group, tokenizer.bos_token_id, segment_length, on_progress)
        group_questions = [questions[index] for index in indices]
        texts = write_answers(
            model, tokenizer, state, group_questions, MAX_ANSWER_TOKENS, stop=["."], segment_length=segment_length
        )
        for index, text in zip(indices, texts, strict=True):
            answers[index] = text
    return answers

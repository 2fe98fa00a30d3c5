"""RULER: 13 synthetic tasks at any length in tokens of the model's own tokenizer (Hsieh et al. 2024)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from memtx.data.haystack import encode_ids, split_sentences
from memtx.data.sources.base import Document
from memtx.data.tokenizers import Tokenizer
from memtx.errors import DataError
from memtx.evaluation.accuracy import EvaluationResult, ProgressFn
from memtx.evaluation.free_answers import write_answers
from memtx.evaluation.haystack import read_contexts
from memtx.evaluation.ruler_prompts import RULER_TASKS, RulerSample, RulerTask, RulerTexts
from memtx.models.recurrent_lm import RecurrentLanguageModel

QUESTION_TASKS = {"qa_1": "squad", "qa_2": "hotpotqa"}
"""Tasks that need a file of questions, and the option of the command line that names it."""

MIN_WORDS = 200
"""Number of different words that the haystack must have."""

_WORD = re.compile(r"[a-z]{3,12}")


def read_haystack(documents: Iterable[Document]) -> RulerTexts:
    """Return sentences and words of documents; raises DataError if they have few different words."""
    sentences = [sentence for document in documents for sentence in split_sentences(document.read()) if sentence]
    words = sorted({word for sentence in sentences for word in _WORD.findall(sentence.lower())})
    if len(words) < MIN_WORDS:
        message = f"The texts have {len(words)} different words, expected at least {MIN_WORDS}."
        raise DataError(message, "Give longer texts by --haystack.")
    return RulerTexts(words, sentences)


def read_questions(path: str) -> RulerTexts:
    """Read questions and their documents: SQuAD 2.0's JSON, HotpotQA's JSON, or SQuAD's examples as JSON lines.

    Raises DataError if the file cannot be read, is none of these, or has no question with an answer.
    """
    hint = "Give dev-v2.0.json of SQuAD, hotpot_dev_distractor_v1.json of HotpotQA, or JSON lines of examples."
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        content = json.loads(text) if not path.endswith("jsonl") else [json.loads(line) for line in text.splitlines()]
        entries = list(_iter_questions(content))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"'{path}' has no questions ({type(error).__name__}: {error}).", hint) from error
    if not entries:
        raise DataError(f"'{path}' has no question with an answer.", hint)
    documents = sorted({document for _, _, sources, related in entries for document in (*sources, *related)})
    index_of = {document: index for index, document in enumerate(documents)}
    questions = []
    for question, answers, sources, related in entries:
        own_indices = tuple(index_of[document] for document in sources)
        related_indices = tuple(index_of[document] for document in dict.fromkeys(related) if document not in sources)
        questions.append((question, answers, own_indices, related_indices))
    return RulerTexts(documents=documents, questions=questions)


def _iter_questions(content: Any) -> Iterable[tuple[str, tuple[str, ...], list[str], list[str]]]:
    """Yield question, answers, documents with the answer, and documents of the same article."""
    if isinstance(content, dict):
        for article in content["data"]:
            contexts = [str(paragraph["context"]) for paragraph in article["paragraphs"]]
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    answers = tuple(str(answer["text"]) for answer in entry["answers"])
                    if answers and not entry.get("is_impossible", False):
                        yield str(entry["question"]), answers, [str(paragraph["context"])], contexts
        return
    contexts_by_title: dict[str, list[str]] = {}
    for entry in content:
        if isinstance(entry["context"], str):
            contexts_by_title.setdefault(str(entry.get("title")), []).append(entry["context"])
    for entry in content:
        if not isinstance(entry["context"], str):
            documents = [f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]]
            yield str(entry["question"]), (str(entry["answer"]),), documents, []
            continue
        answers = tuple(str(answer["text"]) for answer in entry["answers"])
        if answers:
            yield str(entry["question"]), answers, [entry["context"]], contexts_by_title[str(entry.get("title"))]


def make_samples(
    name: str, texts: RulerTexts, tokenizer: Tokenizer, length: int, num_samples: int, seed: int
) -> list[RulerSample] | None:
    """Return prompts of a task that are as long as the length allows, answer included; None if none fits.

    The number of units of filler is found once by bisection, as in the benchmark, and lowered where a sample is longer.
    """
    task = RULER_TASKS[name]

    def make(num_units: int, index: int) -> RulerSample:
        return task.make(texts, num_units, length, Random(f"{seed} {name} {length} {index}"))

    def fits(sample: RulerSample) -> bool:
        return len(encode_ids(tokenizer, sample.prompt)) + task.max_tokens <= length

    if not fits(make(low := task.min_units, 0)):
        return None
    high = 2 * low
    while fits(make(high, 0)):
        low, high = high, 2 * high
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(make(middle, 0)) else (low, middle)
    samples = []
    for index in range(num_samples):
        num_units = low
        while not fits(sample := make(num_units, index)):
            if num_units == task.min_units:
                return None
            num_units = max(task.min_units, num_units - max(1, num_units // 50))
        samples.append(sample)
    return samples


def score(task: RulerTask, output: str, answers: Sequence[str]) -> float:
    """Return the score of an output, from 0 to 1: answers count where they occur in it, in either case."""
    is_given = [answer.lower() in output.lower() for answer in answers]
    return sum(is_given) / len(answers) if task.needs_all else float(any(is_given))


def evaluate_ruler(
    model: RecurrentLanguageModel,
    tokenizer: Tokenizer,
    texts: dict[str, RulerTexts],
    lengths: Sequence[int],
    *,
    num_samples: int = 8,
    seed: int = 0,
    segment_length: int = 512,
    on_progress: ProgressFn = lambda _: None,
) -> list[EvaluationResult]:
    """Return the mean score on every task at every length; None where no prompt fits.

    Args:
        model: Model in eval mode.
        tokenizer: Tokenizer of the model.
        texts: Material of the prompts of each task, by the task's name.
        lengths: Tokens of prompt and answer.
        num_samples: Prompts per task and length; the benchmark has 500.
        seed: Seed of the prompts.
        segment_length: Tokens per call.
        on_progress: Called with the number of tokens that were read.
    """
    results = []
    for name, task_texts in texts.items():
        task = RULER_TASKS[name]
        for length in lengths:
            samples = make_samples(name, task_texts, tokenizer, length, num_samples, seed)
            scores = list[float]()
            for sample in samples or ():
                tokens = encode_ids(tokenizer, sample.prompt)
                # The last token is read with the answer, whose first logits it gives.
                state = read_contexts(model, [tokens[:-1]], tokenizer.bos_token_id, segment_length)
                (output,) = write_answers(model, tokenizer, state, [tokens[-1:]], task.max_tokens)
                scores.append(score(task, output, sample.answers))
                on_progress(length)
            results.append(EvaluationResult(name, length, float(np.mean(scores)) if scores else None, 0.0))
    return results

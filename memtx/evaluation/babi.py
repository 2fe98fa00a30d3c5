"""bAbI stories hidden in book text, as in BABILong (Weston et al. 2015; Kuratov et al. 2024, section 2)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from memtx.data.encodings import Utf8Decoder
from memtx.data.tokenizers import Tokenizer
from memtx.errors import DataError
from memtx.evaluation.accuracy import EvaluationResult, ProgressFn
from memtx.evaluation.haystack import Haystack, TokenIds, choose_answer, encode_ids, read_contexts
from memtx.models.recurrent_lm import RecurrentLanguageModel

FORMAT_HINT = "Give a folder with files such as qa1_single-supporting-fact_test.txt, with numbered lines."

_FILE_PATTERN = re.compile(r"qa(\d+)_.*_test\.txt")
_LINE_PATTERN = re.compile(r"(\d+) (.+)")


@dataclass(frozen=True)
class Story:
    """A question and the facts before it, in order."""

    facts: tuple[str, ...]
    question: str
    answer: str


def read_stories(path: Path) -> list[Story]:
    """Read the questions in a file: lines of a story are numbered from 1; a tab separates question and answer."""
    stories: list[Story] = []
    facts: list[str] = []
    lines = Utf8Decoder(f"'{path}'").decode(path.read_bytes(), final=True).splitlines()
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if (match := _LINE_PATTERN.fullmatch(line.rstrip())) is None:
            raise DataError(f"'{path}', line {line_number} is not a number and a sentence.", FORMAT_HINT)
        if match[1] == "1":
            facts = []
        text, *answer = match[2].split("\t")
        if answer:
            stories.append(Story(tuple(facts), text.strip(), answer[0].strip()))
        else:
            facts.append(text.strip())
    if not stories:
        raise DataError(f"'{path}' has no question.", FORMAT_HINT)
    return stories


def load_tasks(folder: str) -> dict[int, list[Story]]:
    """Load the stories of each task that has a test file in the folder, by task number.

    Raises DataError if the folder does not exist or has no test file, or a file is malformed, not UTF-8 or has no
    questions.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"'{folder}' is not a folder.", FORMAT_HINT)
    paths = {int(match[1]): path for path in root.iterdir() if (match := _FILE_PATTERN.fullmatch(path.name))}
    if not paths:
        raise DataError(f"'{folder}' has no bAbI test file.", FORMAT_HINT)
    return {number: read_stories(paths[number]) for number in sorted(paths)}


def evaluate_babi(
    model: RecurrentLanguageModel,
    tokenizer: Tokenizer,
    haystack: Haystack,
    tasks: dict[int, list[Story]],
    lengths: Sequence[int],
    *,
    num_samples: int = 16,
    seed: int = 0,
    segment_length: int = 512,
    on_progress: ProgressFn = lambda _: None,
) -> list[EvaluationResult]:
    """Return the accuracy on every task at every length; None if no story fits.

    The sentences of a story are hidden in order at random positions, and the question follows at the end. The answer is
    chosen by likelihood among all answers of the task; chance is the frequency of the most common answer.

    ``tasks`` maps task numbers to stories; ``num_samples`` is the maximum number of questions per task and length. The
    other arguments are those of :func:`~memtx.evaluation.haystack.evaluate_needle`.
    """
    generator = torch.Generator().manual_seed(seed)
    results = []
    for number, stories in tasks.items():
        counts = Counter(story.answer for story in stories)
        words = sorted(counts)
        answers = [encode_ids(tokenizer, f" {word}") for word in words]
        chance = counts.most_common(1)[0][1] / len(stories)
        for length in lengths:
            contexts: list[TokenIds] = []
            samples: list[Story] = []
            for index in torch.randperm(len(stories), generator=generator).tolist():
                if len(samples) == num_samples:
                    break
                facts = [encode_ids(tokenizer, f" {fact}") for fact in stories[index].facts]
                depths = torch.rand(len(facts), generator=generator).sort().values.tolist()
                if (context := haystack.hide(facts, depths, length, generator)) is not None:
                    contexts.append(context)
                    samples.append(stories[index])
            accuracy = None
            if samples:
                state = read_contexts(model, contexts, tokenizer.bos_token_id, segment_length, on_progress)
                num_correct = 0
                for index, story in enumerate(samples):
                    question = encode_ids(tokenizer, f" {story.question}")
                    choice = choose_answer(model, state.select([index]), question, answers)
                    num_correct += words[choice] == story.answer
                accuracy = num_correct / len(samples)
            results.append(EvaluationResult(f"qa{number}", length, accuracy, chance))
    return results

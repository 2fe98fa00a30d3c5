"""bAbI stories hidden in book text, as BABILong does (Weston et al. 2015; Kuratov et al. 2024, section 2).

The sentences of a story stand in their order at random places among the sentences of a book, the question at the end;
the answer is chosen among all that the task's questions have, by likelihood.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from memtx.data.tokenizers import Tokenizer
from memtx.errors import DataError
from memtx.evaluation.haystack import Haystack, TokenIds, encode_ids
from memtx.evaluation.likelihood import choose_answer, read_contexts
from memtx.evaluation.results import EvaluationResult
from memtx.models.memory_transformer import MemoryTransformer

FORMAT_HINT = "It holds files such as qa1_single-supporting-fact_test.txt, of numbered lines."

_FILE_PATTERN = re.compile(r"qa(\d+)_.*_test\.txt")
_LINE_PATTERN = re.compile(r"(\d+) (.+)")


@dataclass(frozen=True)
class Story:
    """A question and all that was told before it.

    Attributes:
        facts: the sentences, in order.
        question: what is asked.
        answer: to it.
    """

    facts: tuple[str, ...]
    question: str
    answer: str


def read_stories(path: Path) -> list[Story]:
    """Return the questions of a file: lines are numbered from 1 in each story, a question has its answer behind a tab.

    Raises:
        DataError: a line is of another form, or there is no question; names file and line.
    """
    found: list[Story] = []
    facts: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8: {error.reason} at byte {error.start}.", "Convert it.") from error
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if (parts := _LINE_PATTERN.fullmatch(line.rstrip())) is None:
            raise DataError(f"'{path}', line {place}: there is no number and sentence.", FORMAT_HINT)
        if parts[1] == "1":
            facts = []
        text, *behind = parts[2].split("\t")
        if behind:
            found.append(Story(tuple(facts), text.strip(), behind[0].strip()))
        else:
            facts.append(text.strip())
    if not found:
        raise DataError(f"'{path}' holds no question.", FORMAT_HINT)
    return found


def load_tasks(folder: str) -> dict[int, list[Story]]:
    """Return the stories of each task whose test file is in the folder, by its number.

    Raises:
        DataError: no such folder or file, or one that cannot be used.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"'{folder}' is no folder, expected one of bAbI's tasks.", FORMAT_HINT)
    named = {int(parts[1]): path for path in root.iterdir() if (parts := _FILE_PATTERN.fullmatch(path.name))}
    if not named:
        raise DataError(f"'{folder}' holds no task of bAbI.", FORMAT_HINT)
    return {number: read_stories(named[number]) for number in sorted(named)}


def evaluate_babi(
    model: MemoryTransformer,
    tokenizer: Tokenizer,
    haystack: Haystack,
    tasks: dict[int, list[Story]],
    lengths: Sequence[int],
    *,
    num_samples: int = 16,
    seed: int = 0,
    segment_length: int = 512,
    on_progress: Callable[[int], None] | None = None,
) -> list[EvaluationResult]:
    """Return the accuracy of every task at every length, beside the share of its most frequent answer.

    Args:
        model: in eval mode, of this tokenizer.
        tokenizer: the model's.
        haystack: the text.
        tasks: stories by the task's number.
        lengths: tokens of a context, the story included; a task none of whose stories is so short has no accuracy.
        num_samples: questions of a task and length at most.
        seed: of the choice of stories, places and text.
        segment_length: tokens a call.
        on_progress: is told how many tokens of a row were read.
    """
    generator = torch.Generator().manual_seed(seed)
    results = []
    for number, told in tasks.items():
        words = sorted({story.answer for story in told})
        answers = [encode_ids(tokenizer, f" {word}") for word in words]
        usual = Counter(story.answer for story in told).most_common(1)[0][1] / len(told)
        for length in lengths:
            contexts: list[TokenIds] = []
            chosen: list[Story] = []
            for one in torch.randperm(len(told), generator=generator).tolist():
                if len(chosen) == num_samples:
                    break
                facts = [encode_ids(tokenizer, f" {fact}") for fact in told[one].facts]
                places = torch.rand(len(facts), generator=generator).sort().values.tolist()
                if (context := haystack.hide(facts, places, length, generator)) is not None:
                    contexts.append(context)
                    chosen.append(told[one])
            share = None
            if chosen:
                state = read_contexts(
                    model, contexts, tokenizer.bos_token_id, segment_length=segment_length, on_progress=on_progress
                )
                right = 0
                for row, story in enumerate(chosen):
                    question = encode_ids(tokenizer, f" {story.question}")
                    right += words[choose_answer(model, state.select([row]), question, answers)] == story.answer
                share = right / len(chosen)
            results.append(EvaluationResult(f"qa{number}", length, share, usual))
    return results

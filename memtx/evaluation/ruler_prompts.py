"""Prompts of RULER's 13 tasks, made at random (Hsieh et al. 2024, section 3 and appendix B).

Layout, sizes and wording of the prompts are those of the benchmark's code (NVIDIA/RULER, scripts/data/synthetic and
scripts/synthetic.yaml), since scores depend on them; the generators are of this project. Keys are pairs of words of the
haystack, in place of a list of English adjectives and nouns.
"""

from __future__ import annotations

import itertools
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NEEDLE_PROMPT = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)
VARIABLE_PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {count} variables are assigned the value {query}, they are: "
)
COMMON_WORDS_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
FREQUENT_WORDS_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)
QUESTION_PROMPT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me "
    "the answer and do not output any other words.\n\nQuestion: {query} Answer:"
)
NUM_DEPTHS = 40
SHORT_LENGTH = 4096
"""Length below which lists of words have fewer repetitions."""
ZETA_2 = 1.6449340668482264
"""Sum of k ** -2 over all k from 1, which normalizes the frequencies of coded words."""


@dataclass(frozen=True)
class RulerSample:
    """A prompt, and the strings that a right answer has."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class RulerTexts:
    """Material of prompts.

    Attributes:
        words: Different words, from which keys and lists are drawn.
        sentences: Sentences of long texts in order.
        documents: Documents of questions.
        questions: For each question its text, its answers and the indices of its documents and of related ones.
    """

    words: Sequence[str] = ()
    sentences: Sequence[str] = ()
    documents: Sequence[str] = ()
    questions: Sequence[tuple[str, tuple[str, ...], tuple[int, ...], tuple[int, ...]]] = ()


Maker = Callable[[RulerTexts, int, int, Random], RulerSample]
"""Makes a prompt from texts, the number of units of filler, the length in tokens, and a random source."""


@dataclass(frozen=True)
class RulerTask:
    """A task of the benchmark.

    Attributes:
        make: Maker of prompts; more units of filler make a longer one.
        max_tokens: Maximum number of tokens of an answer; they count as part of the length.
        min_units: Fewest units of filler.
        needs_all: If True, the score is the share of the answers that are given; else one of them is enough.
    """

    make: Maker
    max_tokens: int
    min_units: int
    needs_all: bool = True


def _make_value(kind: str, words: Sequence[str], random: Random) -> str:
    if kind == "numbers":
        return str(random.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=random.getrandbits(128), version=4))
    return f"{random.choice(words)}-{random.choice(words)}"


def make_needles(
    filler: str,
    keys: str = "words",
    values: str = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> Maker:
    """Return the maker of a needle task; ``filler`` is noise, sentences or other needles."""
    num_keys = max(num_keys, num_queries)

    def make(texts: RulerTexts, num_units: int, length: int, random: Random) -> RulerSample:
        names = [_make_value(keys, texts.words, random) for _ in range(num_keys)]
        hidden = [[_make_value(values, texts.words, random) for _ in range(num_values)] for _ in names]
        needles = [
            NEEDLE.format(kind=values, key=name, value=value)
            for name, parts in zip(names, hidden, strict=True)
            for value in parts
        ]
        random.shuffle(needles)
        if filler == "sentences":
            context = _insert_by_depth(_repeat(texts.sentences, num_units), needles, random)
        else:
            lines = [NOISE] * num_units
            if filler == "needles":
                lines = [
                    NEEDLE.format(
                        kind=values,
                        key=_make_value(keys, texts.words, random),
                        value=_make_value(values, texts.words, random),
                    )
                    for _ in range(num_units)
                ]
            for index, needle in zip(_sample_descending(num_units, len(needles), random), needles, strict=True):
                lines.insert(index, needle)
            context = "\n".join(lines)
        indices = random.sample(range(num_keys), num_queries)
        queries = [names[index] for index in indices]
        query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
        prompt, kind = NEEDLE_PROMPT, values
        if num_queries * num_values == 1:
            for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is")):
                prompt = prompt.replace(plural, singular)
            kind = values[:-1]
        answers = tuple(value for index in indices for value in hidden[index])
        return RulerSample(prompt.format(kind=kind, context=context, query=query), answers)

    return make


def _repeat(sentences: Sequence[str], count: int) -> list[str]:
    return [sentences[index % len(sentences)] for index in range(count)]


def _sample_descending(stop: int, count: int, random: Random) -> list[int]:
    return sorted(random.sample(range(stop), count), reverse=True)


def _insert_by_depth(sentences: list[str], needles: Sequence[str], random: Random) -> str:
    """Return sentences with needles at random depths out of ``NUM_DEPTHS`` evenly spaced ones, from 0 to 100%."""
    depths = sorted(random.sample(range(NUM_DEPTHS), len(needles)))
    ends = [int(len(sentences) * round(100 * depth / (NUM_DEPTHS - 1)) / 100) for depth in depths]
    parts = list[str]()
    for start, end, needle in zip([0, *ends], ends, needles, strict=False):
        parts += [*sentences[start:end], needle]
    return " ".join([*parts, *sentences[ends[-1] :]])


def _make_names(count: int, size: int, random: Random) -> list[str]:
    names = dict[str, None]()
    while len(names) < count:
        names["".join(random.choices(string.ascii_uppercase, k=size))] = None
    return list(names)


def _make_chain(num_units: int, num_hops: int, size: int, random: Random) -> RulerSample:
    names, value = _make_names(num_hops + 1, size, random), str(random.randint(10000, 99998))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {later} = VAR {earlier} " for earlier, later in itertools.pairwise(names)]
    lines = [NOISE] * num_units
    for index, line in zip(_sample_descending(num_units, len(chain), random), reversed(chain), strict=True):
        lines.insert(index, line)
    context = "\n".join(lines).replace(". \n", ".\n")
    prompt = VARIABLE_PROMPT.format(context=context, query=value, count=num_hops + 1)
    return RulerSample(prompt, tuple(names))


def make_variables(texts: RulerTexts, num_units: int, length: int, random: Random) -> RulerSample:
    """Return a chain of assignments (vt) after an example of one with shorter names."""
    num_hops = 4
    example = _make_chain(5, num_hops, 3, random)
    sample = _make_chain(num_units, num_hops, 5, random)
    return RulerSample(f"{example.prompt} {' '.join(example.answers)}\n\n{sample.prompt}", sample.answers)


def _list_words(words: list[str], num_common: int, repeats: tuple[int, int], random: Random) -> RulerSample:
    items = [*words[:num_common] * repeats[0], *words[num_common:] * repeats[1]]
    random.shuffle(items)
    context = " ".join(f"{number}. {word}" for number, word in enumerate(items, 1))
    return RulerSample(COMMON_WORDS_PROMPT.format(context=context), tuple(words[:num_common]))


def make_common_words(texts: RulerTexts, num_units: int, length: int, random: Random) -> RulerSample:
    """Return a list of words of which ten are more common (cwe), after an example of one."""
    is_short = length < SHORT_LENGTH
    num_words, example_repeats, repeats = (20, (3, 1), (6, 1)) if is_short else (40, (10, 3), (30, 3))
    example = _list_words(_draw_words(texts, num_words, random), 10, example_repeats, random)
    sample = _list_words(_draw_words(texts, num_units, random), 10, repeats, random)
    answer = " ".join(f"{number}. {word}" for number, word in enumerate(example.answers, 1))
    return RulerSample(f"{example.prompt} {answer}\n{sample.prompt}", sample.answers)


def _draw_words(texts: RulerTexts, count: int, random: Random) -> list[str]:
    """Return different words; compounds of two, if there are too few."""
    words = random.sample(texts.words, min(count, len(texts.words)))
    seen = set(words)
    while len(words) < count:
        compound = random.choice(texts.words) + random.choice(texts.words)
        if compound not in seen:
            words.append(compound)
            seen.add(compound)
    return words


def make_frequent_words(texts: RulerTexts, num_units: int, length: int, random: Random) -> RulerSample:
    """Return coded words with frequencies by a zeta distribution of exponent 2 (fwe); the first one is noise."""
    vocabulary = list[str]()
    while len(vocabulary) < max(length // 50, 4):
        word = "".join(random.choices(string.ascii_lowercase, k=6))
        if word not in vocabulary[:4]:
            vocabulary.append(word)
    vocabulary[0] = "..."
    words = [word for rank, word in enumerate(vocabulary, 1) for _ in range(int(num_units * rank**-2 / ZETA_2))]
    random.shuffle(words)
    return RulerSample(FREQUENT_WORDS_PROMPT.format(context=" ".join(words)), tuple(vocabulary[1:4]))


def make_question(texts: RulerTexts, num_units: int, length: int, random: Random) -> RulerSample:
    """Return a question about one of many documents (qa), those related to it first among the others."""
    query, answers, sources, related = random.choice(texts.questions)
    num_others = max(0, num_units - len(sources))
    others = list(related)
    if num_others <= len(related):
        others = random.sample(related, num_others)
    else:
        pool = [index for index in range(len(texts.documents)) if index not in {*sources, *related}]
        others += random.sample(pool, min(len(pool), num_others - len(related)))
        others += random.choices(range(len(texts.documents)), k=max(0, num_others - len(others)))
    chosen = [*sources, *others]
    random.shuffle(chosen)
    context = "\n\n".join(f"Document {number}:\n{texts.documents[index]}" for number, index in enumerate(chosen, 1))
    return RulerSample(QUESTION_PROMPT.format(context=context, query=query), answers)


RULER_TASKS = {
    "niah_single_1": RulerTask(make_needles("noise"), 128, 4),
    "niah_single_2": RulerTask(make_needles("sentences"), 128, 4),
    "niah_single_3": RulerTask(make_needles("sentences", values="uuids"), 128, 4),
    "niah_multikey_1": RulerTask(make_needles("sentences", num_keys=4), 128, 4),
    "niah_multikey_2": RulerTask(make_needles("needles"), 128, 4),
    "niah_multikey_3": RulerTask(make_needles("needles", keys="uuids", values="uuids"), 128, 4),
    "niah_multivalue": RulerTask(make_needles("sentences", num_values=4), 128, 4),
    "niah_multiquery": RulerTask(make_needles("sentences", num_queries=4), 128, 4),
    "vt": RulerTask(make_variables, 30, 5),
    "cwe": RulerTask(make_common_words, 120, 11),
    "fwe": RulerTask(make_frequent_words, 50, 40),
    "qa_1": RulerTask(make_question, 32, 1, needs_all=False),
    "qa_2": RulerTask(make_question, 32, 1, needs_all=False),
}
"""The tasks by name; qa_1 asks about SQuAD, qa_2 about HotpotQA."""

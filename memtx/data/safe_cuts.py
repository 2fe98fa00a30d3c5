"""Cuts of a text that change none of its tokens, for tokenizers of the ``tokenizers`` library.

The ids of a text are those of its chunks, each encoded between short contexts that stand for the text around it and
whose ids are dropped. That holds where every chunk ends between two words of the tokenizer (pre-tokens), or, in
byte-pair encoding, between two characters that no token joins. A tokenizer without such cuts is refused.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from memtx.errors import DataError

MIN_CHUNK_CHARS = 2048
NUM_PROBES = 400
"""Number of random texts on which each rule is tried when a tokenizer is loaded."""

_SOLID = r"[\w!-/:-@\[-`{-~]"
_CJK = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]"
_CJK_STOPS = "\u3001\u3002\uff0c\uff01\uff1f\uff1b\uff1a"
# Texts of many kinds: scripts, cases, digits, quotes, contractions, spaces and line ends.
_PROBE_PARTS = [*"abzABZ019_.,;:!?'\"()[]{}<>|@#$%^&*+=~`/\\-éßİΣ٣½ﬁー中日のあ한งא🙂。“”«…", *" \t\u00a0\u3000\n"]
_PROBE_PARTS += [
    "  ",
    "\n\n",
    "\r\n",
    "\n \n",
    "    ",
    "'s",
    "'LL",
    "don't",
    "1234",
    "word",
    "Word",
    "e\u0301",
    "\u2581",
]
_PROBE_PARTS += [f"\u4e2d{stop}\u4e2d" for stop in _CJK_STOPS]
# Contexts before a chunk that begins with any character, if the tokenizer does not split words.
_LEFT_CONTEXTS = ["a", "\n", "z", "0", " ", "Q", "~", "é", "中"]
# Components that treat each character alone.
_CHARACTER_NORMALIZERS = {"Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
_UNSPLIT_PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Split"}


class TextChunk(NamedTuple):
    """A part of a text, and contexts that stand for the text before and after it; empty at the ends of the text."""

    text: str
    left: str = ""
    right: str = ""


class _Rule(NamedTuple):
    """Rule to cut a text at the start of each match of a pattern, with the contexts of the chunks beside the cut."""

    pattern: re.Pattern[str]
    left: str
    right: str


# Cuts before a space, after a line end, before a full stop of Chinese or Japanese; the first rule of each kind that
# fits the tokenizer is used. The kind is known from the first character after a cut.
_RULE_KINDS = {
    "space": [_Rule(re.compile(rf"(?<={solid}) (?={solid})"), "a", " a") for solid in (_SOLID, r"\w")],
    "line": [_Rule(re.compile(rf"(?<=\n)(?={solid})"), "a\n", "a") for solid in (_SOLID, r"\w")],
    "stop": [_Rule(re.compile(rf"(?<={_CJK})[{_CJK_STOPS}](?=\w)"), "\u4e2d", "\u3002\u4e2d")],
}


def _kind(first: str) -> str:
    """Return the kind of a cut before a character."""
    return "space" if first == " " else "stop" if first in _CJK_STOPS else "line"


class SafeSplitter:
    """Splits a text that arrives in any portions into chunks whose ids, joined, are those of the whole text.

    Text is pending until a safe cut is known, so memory is bounded by the longest part of a text without one.
    """

    def __init__(self, finder: CutFinder, pending: str = "", continues: bool = False) -> None:
        self._finder, self._continues, self._searched = finder, continues, 0
        self.pending = pending

    def feed(self, text: str) -> list[TextChunk]:
        """Take the next portion of the text and return the chunks that are now complete."""
        buffer, start = self.pending + text, 0
        chunks: list[TextChunk] = []
        while True:
            cut, self._searched = self._finder.find(buffer, start, self._searched)
            if cut is None:
                break
            chunks.append(self._chunk(buffer[start:cut], self._finder.right_context(buffer[cut])))
            start = cut
        self.pending, self._searched = buffer[start:], self._searched - start
        return chunks

    def flush(self) -> list[TextChunk]:
        """End the text: return the pending text as the last chunk (none if empty). Later text continues it."""
        text, self.pending, self._searched = self.pending, "", 0
        return [self._chunk(text)] if text else []

    def _chunk(self, text: str, right: str = "") -> TextChunk:
        left = self._finder.left_context(text) if self._continues else ""
        self._continues = True
        return TextChunk(text, left, right)


class CutFinder:
    """Finds cuts of a text for one tokenizer; they depend on the text alone.

    Raises DataError if the ids of a text may depend on all of it.

    Args:
        backend: Tokenizer of the library, without truncation, padding and dropout.
        description: Its JSON.
        added_tokens: Spellings of added tokens that the library finds in a text, each with True if it is looked for in
            the normalized text.
    """

    def __init__(self, backend: Any, description: Mapping[str, Any], added_tokens: Mapping[str, bool]) -> None:
        self.backend = backend
        # Letters that the rules of this tokenizer name.
        rules_text = json.dumps([description.get("normalizer"), description.get("pre_tokenizer")], ensure_ascii=False)
        letters = sorted(set(rules_text))[:256]
        self._num_ids: dict[str, int] = {}
        self._rules = {
            kind: rule for kind, rules in _RULE_KINDS.items() if (rule := _fitting_rule(backend, rules, letters))
        }
        self._pairs = frozenset[str]() if self._rules else _joined_characters(backend, description)
        self._fuses_unknown = bool(description["model"].get("fuse_unk"))
        self._only_ascii = _has_normalizer(description, {"NFC", "NFD", "NFKC", "NFKD"})
        self._joins: dict[str, bool] = {}
        self._added_tokens = tuple(token for token in added_tokens if token)
        # Tokens that may span a cut: any where words are not split, else those with a space inside.
        self._spanning_tokens = {
            token
            for token in self._added_tokens
            if not self._rules or any(map(str.isspace, token.replace("\u2581", " ")))
        }
        normalized_tokens = [token for token, normalized in added_tokens.items() if normalized and backend.normalizer]
        self._normalized_tokens = {
            spelling for token in normalized_tokens for spelling in (token, normalize(backend, token))
        }
        self._normalized_tokens -= {""}
        self._reach = max(map(len, {*self._added_tokens, *self._normalized_tokens}), default=0)

    def find(self, text: str, start: int, searched: int) -> tuple[int | None, int]:
        """Return the first cut at least ``MIN_CHUNK_CHARS`` after ``start``, and where to continue the search.

        No cut is before ``searched``. The cut is None if it depends on text to come.
        """
        position = max(start + MIN_CHUNK_CHARS, searched)
        while (cut := self._next_candidate(text, position)) is not None:
            if len(text) <= cut + 2 * self._reach:
                return None, cut
            if not self._touches_added_token(text, cut) and not text[start:cut].isspace():
                return cut, cut
            position = cut + 1
        return None, max(position, len(text) - 1)

    def left_context(self, text: str) -> str:
        """Return the context of a text that continues another."""
        first = text[:1]
        if not self._rules:
            return next((context for context in _LEFT_CONTEXTS if not self._is_joined(context + first)), "")
        rule = self._rules.get(_kind(first)) or self._rules.get("line") or next(iter(self._rules.values()))
        return rule.left

    def right_context(self, text: str) -> str:
        """Return the context of a chunk that is cut before ``text``."""
        return self._rules[_kind(text[:1])].right if self._rules else ""

    def encode(self, chunks: Sequence[TextChunk], *, with_offsets: bool = False) -> list[tuple[Any, slice]]:
        """Encode chunks in parallel; return the library's encodings and the range of each chunk's own tokens."""
        encode = self.backend.encode_batch if with_offsets else self.backend.encode_batch_fast
        encodings = encode([chunk.left + chunk.text + chunk.right for chunk in chunks], add_special_tokens=False)
        ranges = []
        for chunk, encoding in zip(chunks, encodings, strict=True):
            num_right = 0
            if chunk.right:
                left = next(rule.left for rule in self._rules.values() if rule.right == chunk.right)
                num_right = self._count(left + chunk.right) - self._count(left)
            ranges.append(slice(self._count(chunk.left), len(encoding) - num_right))
        return list(zip(encodings, ranges, strict=True))

    def _count(self, text: str) -> int:
        """Return the number of ids of a context."""
        if text not in self._num_ids:
            self._num_ids[text] = len(self.backend.encode(text, add_special_tokens=False)) if text else 0
        return self._num_ids[text]

    def _next_candidate(self, text: str, position: int) -> int | None:
        if self._rules:
            first = len(text)
            for rule in self._rules.values():
                # Not beyond the cut of another rule; a pattern looks at two characters from a cut on.
                if match := rule.pattern.search(text, position, first + 2):
                    first = min(first, match.start())
            return first if first < len(text) else None
        for index in range(max(position, 1), len(text)):
            if not self._is_joined(text[index - 1 : index + 1]) and self.left_context(text[index]):
                return index
        return None

    def _is_joined(self, pair: str) -> bool:
        """Return whether a token may join two neighbouring characters."""
        if pair not in self._joins:
            self._joins[pair] = self._may_join(pair)
        return self._joins[pair]

    def _may_join(self, pair: str) -> bool:
        if len(pair) < 2 or pair == "\r\n" or (self._only_ascii and not pair[1].isascii()):
            return True
        anchor, first, second = (_spell(self.backend, text) for text in ("a", f"a{pair[0]}", f"a{pair}"))
        if not (anchor and len(first) > len(anchor) and len(second) > len(first) and second.startswith(first)):
            return True
        letters = second[len(first) - 1 : len(first) + 1]
        fuses = self._fuses_unknown and not any(map(self.backend.token_to_id, letters))
        return fuses or letters in self._pairs

    def _touches_added_token(self, text: str, cut: int) -> bool:
        """Return whether an added token may span the cut, or has only whitespace between it and the cut."""
        if not self._added_tokens:
            return False
        end = cut
        while end and text[end - 1].isspace():
            end -= 1
        after = text[cut : cut + 2 * self._reach + 64].lstrip()
        before = text[max(0, end - self._reach) : end]
        if before.endswith(self._added_tokens) or after.startswith(self._added_tokens):
            return True
        for token in self._spanning_tokens:
            window = text[max(0, cut - len(token) + 1) : cut + len(token) - 1]
            if token in window or token in window.replace(" ", "\u2581"):
                return True
        if not self._normalized_tokens:
            return False
        window = normalize(self.backend, text[max(0, cut - 2 * self._reach) : cut + 2 * self._reach])
        return any(token in window for token in self._normalized_tokens)


def normalize(backend: Any, text: str) -> str:
    """Return a text as the tokenizer's normalizer writes it."""
    return str(backend.normalizer.normalize_str(text)) if backend.normalizer is not None else text


def _split_words(backend: Any, text: str) -> list[str]:
    """Return the words (pre-tokens) of a text, in the letters of the tokenizer's vocabulary."""
    text = normalize(backend, text)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]


def _spell(backend: Any, text: str) -> str:
    return "".join(_split_words(backend, text))


def _fitting_rule(backend: Any, rules: Sequence[_Rule], letters: Sequence[str]) -> _Rule | None:
    """Return the first rule by which random texts are cut between the same words that they have uncut."""
    if backend.pre_tokenizer is None:
        return None
    parts = [*_PROBE_PARTS, *_PROBE_PARTS[:8] * 4, *letters]
    return next(
        (rule for rule in rules if all(_keeps_words(backend, rule, *text) for text in _probes(rule, parts))), None
    )


def _probes(rule: _Rule, parts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield texts that the rule cuts."""
    draw = random.Random(0)
    for _ in range(NUM_PROBES):
        before, after = ("".join(draw.choices(parts, k=draw.randrange(8))) for _ in range(2))
        joint = draw.choice([rule.right, rule.left[1:] + draw.choice(parts), f"{draw.choice(parts)}{rule.right[:1]}"])
        text = f"{before}{draw.choice(parts)}{joint}{draw.choice(parts)}{after}"
        for match in itertools.islice(rule.pattern.finditer(text), 2):
            yield text[: match.start()], text[match.start() :]


def _keeps_words(backend: Any, rule: _Rule, before: str, after: str) -> bool:
    if before.isspace():
        return True
    left, both = (len(_split_words(backend, text)) for text in (rule.left, rule.left + rule.right))
    first, second = _split_words(backend, before + rule.right), _split_words(backend, rule.left + after)
    return _split_words(backend, before + after) == first[: len(first) - (both - left)] + second[left:]


def _has_normalizer(description: Mapping[str, Any], names: set[str]) -> bool:
    return any(part["type"] in names for part in components(description.get("normalizer")))


def components(component: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the parts of a component, those of a sequence one by one."""
    if component is None:
        return
    for key in ("normalizers", "pretokenizers", "decoders", "processors"):
        if key in component:
            for part in component[key]:
                yield from components(part)
            return
    yield component


def _joined_characters(backend: Any, description: Mapping[str, Any]) -> frozenset[str]:
    """Return each two neighbouring characters in tokens of byte-pair encoding that does not split words.

    No merge joins other characters, so a text may be cut between them.
    """
    model = description["model"]
    normalizers, pre_tokenizers = (list(components(description.get(key))) for key in ("normalizer", "pre_tokenizer"))
    literals = [part["pattern"].get("String", "") for part in [*normalizers, *pre_tokenizers] if "pattern" in part]
    tokens = [token for token in backend.get_vocab(with_added_tokens=False) if len(token) > 1]
    is_byte = re.compile("<0x[0-9A-F]{2}>")
    if (
        model.get("type", "BPE") != "BPE"
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or not {part["type"] for part in normalizers} <= _CHARACTER_NORMALIZERS
        or not {part["type"] for part in pre_tokenizers} <= _UNSPLIT_PRE_TOKENIZERS
        or not all(len(literal) == 1 for literal in literals)
        or any(part.get("use_regex") for part in pre_tokenizers)
        or any(is_byte.search(token) and not is_byte.fullmatch(token) for token in tokens)
    ):
        raise DataError(
            "The tokenizer does not split a text into words that are known without the rest of the text, so a long "
            "text cannot be encoded in parts.",
            "Use a tokenizer whose pre_tokenizer splits at spaces, such as one with Metaspace (split: true).",
        )
    return frozenset(
        pair for token in tokens if not is_byte.fullmatch(token) for pair in map("".join, itertools.pairwise(token))
    )

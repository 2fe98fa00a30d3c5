from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.tokenizers import Tokenizer
from memtx.errors import MemtxError
from memtx.inference.generate import generate
from memtx.inference.reader import StreamReader
from memtx.inference.sampling import SamplingParams
from memtx.inference.token_generator import StopFilter
from memtx.models.memory_transformer import MemoryTransformer

GREEDY = SamplingParams(greedy=True)


def test_greedy_is_the_whole_texts_argmax(pair_model: MemoryTransformer, pair_tokenizer: Tokenizer, text: str) -> None:
    prompt = text[:300]
    ids = [pair_tokenizer.bos_token_id, *pair_tokenizer.encode(prompt).tolist()]
    expected = []
    with torch.inference_mode():
        for _ in range(24):
            logits = pair_model(torch.tensor([ids])).logits[0, -1]
            logits[pair_tokenizer.bos_token_id] = -torch.inf
            ids.append(int(logits.argmax()))
            expected.append(ids[-1])
    found = "".join(
        generate(pair_model, pair_tokenizer, prompt, segment_length=7, max_tokens=24, sampling_params=GREEDY)
    )
    assert found == pair_tokenizer.decode(expected)


def test_a_read_book_needs_no_second_reading(
    byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, text: str
) -> None:
    reader = StreamReader(byte_model, byte_tokenizer, segment_length=40)
    list(reader.feed(text[:500]))
    before = reader.totals
    # The text that still waits in the reader is part of what is gone on with.
    ours = "".join(generate(byte_model, byte_tokenizer, text[500:520], reader=reader, max_tokens=30, seed=3))
    whole = "".join(generate(byte_model, byte_tokenizer, text[:520], segment_length=40, max_tokens=30, seed=3))
    assert ours == whole
    assert reader.totals == before


def test_seeds_decide(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    def made(seed: int) -> str:
        return "".join(generate(byte_model, byte_tokenizer, "The", max_tokens=40, seed=seed))

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_an_empty_prompt_starts_a_document(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    assert "".join(generate(byte_model, byte_tokenizer, max_tokens=5, sampling_params=GREEDY))


class Spelling(MemoryTransformer):
    """Spells ``content``, whatever it sees; ``begin`` would always be likelier."""

    content = b""

    def decode_step(self, tokens, rings, step):  # type: ignore[no-untyped-def]
        logits = super().decode_step(tokens, rings, step).fill_(1)
        logits[0, 256] = 99
        logits[0, self.content[int(step.position[0]) % len(self.content)]] = 50
        return logits


def fixed_model(content: bytes) -> MemoryTransformer:
    model = Spelling(257, dim=8, depth=1, heads=1)
    model.content = content
    return model.eval()


def test_characters_come_whole(byte_tokenizer: Tokenizer) -> None:
    text = "aé🙂z"
    model = fixed_model(text.encode())
    pieces = list(generate(model, byte_tokenizer, max_tokens=len(text.encode()), sampling_params=GREEDY))
    assert pieces == ["a", "é", "🙂", "z"]


def test_a_character_cut_off_at_the_end_is_replaced(byte_tokenizer: Tokenizer) -> None:
    model = fixed_model("é".encode())
    assert "".join(generate(model, byte_tokenizer, max_tokens=3, sampling_params=GREEDY)) == "é\ufffd"


@pytest.mark.parametrize(
    ("stop", "shown"), [(["cd"], "ab"), (["zz", "d"], "abc"), (["fgX"], "abcdefg"), (["é"], "abcdefg")]
)
def test_stop_strings_end_it_and_are_not_shown(byte_tokenizer: Tokenizer, stop: list[str], shown: str) -> None:
    model = fixed_model(b"abcdefg")
    assert "".join(generate(model, byte_tokenizer, max_tokens=7, sampling_params=GREEDY, stop=stop)) == shown


@settings(deadline=None, max_examples=100)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30)),
)
def test_stop_filter_equals_a_search_in_the_whole(text: str, stops: list[str], places: list[int]) -> None:
    stop_filter, shown = StopFilter(stops), ""
    borders = sorted({place % (len(text) + 1) for place in places} | set(range(len(text) + 1)))
    for a, b in itertools.pairwise(borders):
        shown += stop_filter.feed(text[a:b])
        if stop_filter.is_stopped:
            break
    else:
        shown += stop_filter.finish()
    # Letter by letter, the stop that is complete first ends it; of those, the one that began first.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(ends)[1]] if ends else text)


def test_the_penalty_keeps_tokens_from_repeating(byte_tokenizer: Tokenizer) -> None:
    model = fixed_model(b"a")
    plain = "".join(generate(model, byte_tokenizer, max_tokens=4, sampling_params=GREEDY))
    strong = "".join(
        generate(
            model, byte_tokenizer, max_tokens=4, sampling_params=SamplingParams(greedy=True, repetition_penalty=1e9)
        )
    )
    assert plain == "aaaa"
    assert strong.count("a") == 1


def test_mistakes_are_raised_at_once(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(MemtxError, match="max_tokens is -1"):
        generate(byte_model, byte_tokenizer, max_tokens=-1)
    with pytest.raises(MemtxError, match="stop string is empty"):
        generate(byte_model, byte_tokenizer, stop=[""])

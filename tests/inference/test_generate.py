from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.tokenizers import ByteTokenizer, Tokenizer
from memtx.errors import MemtxError
from memtx.inference.generate import GenerationConfig, StopFilter, TextDelta, TokenGenerator, generate
from memtx.inference.reader import StreamReader
from memtx.inference.sampling import SamplingParams
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.transformer_xl import TransformerXL

GREEDY = SamplingParams(greedy=True)


@pytest.mark.parametrize("model_class", [MemoryTransformer, TransformerXL])
def test_greedy_text_equals_the_argmax_over_the_whole_text(
    pair_model: MemoryTransformer, pair_tokenizer: Tokenizer, text: str, model_class: type[MemoryTransformer]
) -> None:
    if model_class is TransformerXL:
        torch.manual_seed(0)
        vocab_size = pair_tokenizer.vocab_size
        pair_model = TransformerXL(vocab_size, 16, 2, 2, memory_length=24, same_length=True, cutoffs=[100]).eval()
        for parameter in pair_model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)  # so that every token has another successor
    prompt = text[:300]
    ids = [pair_tokenizer.bos_token_id, *pair_tokenizer.encode(prompt).tolist()]
    expected = []
    with torch.inference_mode():
        for _ in range(24):
            logits = pair_model(torch.tensor([ids])).logits[0, -1]
            logits[pair_tokenizer.bos_token_id] = -torch.inf
            ids.append(int(logits.argmax()))
            expected.append(ids[-1])
    generated = "".join(
        generate(pair_model, pair_tokenizer, prompt, segment_length=7, max_tokens=24, sampling_params=GREEDY)
    )
    assert generated == pair_tokenizer.decode(expected)


def test_text_continues_from_a_reader(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, text: str) -> None:
    reader = StreamReader(byte_model, byte_tokenizer, segment_length=40)
    list(reader.feed(text[:500]))
    before = reader.totals
    # The reader's pending text is part of the text to continue.
    continued = "".join(generate(byte_model, byte_tokenizer, text[500:520], reader=reader, max_tokens=30, seed=3))
    expected = "".join(generate(byte_model, byte_tokenizer, text[:520], segment_length=40, max_tokens=30, seed=3))
    assert continued == expected
    assert reader.totals == before


def test_equal_seeds_give_equal_texts(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    def generate_with(seed: int) -> str:
        return "".join(generate(byte_model, byte_tokenizer, "The", max_tokens=40, seed=seed))

    assert generate_with(1) == generate_with(1)
    assert generate_with(1) != generate_with(2)


def test_an_empty_prompt_begins_a_document(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    assert "".join(generate(byte_model, byte_tokenizer, max_tokens=5, sampling_params=GREEDY))


class SpellingModel(MemoryTransformer):
    """Generates ``content`` after any text; the begin token always has a higher logit."""

    content = b""

    def decode_step(self, tokens, rings, step):  # type: ignore[no-untyped-def]
        logits = super().decode_step(tokens, rings, step).fill_(1)
        logits[0, 256] = 99
        logits[0, self.content[int(step.position[0]) % len(self.content)]] = 50
        return logits


def fixed_model(content: bytes) -> MemoryTransformer:
    model = SpellingModel(257, dim=8, depth=1, heads=1)
    model.content = content
    return model.eval()


def test_parts_hold_complete_characters(byte_tokenizer: Tokenizer) -> None:
    text = "aé🙂z"
    model = fixed_model(text.encode())
    parts = list(generate(model, byte_tokenizer, max_tokens=len(text.encode()), sampling_params=GREEDY))
    assert parts == ["a", "é", "🙂", "z"]


def test_an_incomplete_character_at_the_end_is_replaced(byte_tokenizer: Tokenizer) -> None:
    model = fixed_model("é".encode())
    assert "".join(generate(model, byte_tokenizer, max_tokens=3, sampling_params=GREEDY)) == "é\ufffd"


@pytest.mark.parametrize(
    ("stop", "expected"), [(["cd"], "ab"), (["zz", "d"], "abc"), (["fgX"], "abcdefg"), (["é"], "abcdefg")]
)
def test_stop_strings_end_the_text_and_are_not_part_of_it(
    byte_tokenizer: Tokenizer, stop: list[str], expected: str
) -> None:
    model = fixed_model(b"abcdefg")
    assert "".join(generate(model, byte_tokenizer, max_tokens=7, sampling_params=GREEDY, stop=stop)) == expected


@settings(deadline=None, max_examples=100)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30)),
)
def test_stop_filter_equals_a_search_in_the_whole_text(text: str, stops: list[str], offsets: list[int]) -> None:
    stop_filter, visible = StopFilter(stops), ""
    borders = sorted({offset % (len(text) + 1) for offset in offsets} | set(range(len(text) + 1)))
    for start, end in itertools.pairwise(borders):
        visible += stop_filter.feed(text[start:end])
        if stop_filter.is_stopped:
            break
    else:
        visible += stop_filter.finish()
    # Letter by letter, the first complete stop string ends the text; among several, the one that began first.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert visible == (text[: min(ends)[1]] if ends else text)


def test_repetition_penalty_prevents_repetition(byte_tokenizer: Tokenizer) -> None:
    model = fixed_model(b"a")
    plain = "".join(generate(model, byte_tokenizer, max_tokens=4, sampling_params=GREEDY))
    penalty = SamplingParams(greedy=True, repetition_penalty=1e9)
    penalized = "".join(generate(model, byte_tokenizer, max_tokens=4, sampling_params=penalty))
    assert plain == "aaaa"
    assert penalized.count("a") == 1


def test_invalid_options_of_generate_are_refused_at_once(
    byte_model: MemoryTransformer, byte_tokenizer: Tokenizer
) -> None:
    with pytest.raises(MemtxError, match="max_tokens is -1"):
        generate(byte_model, byte_tokenizer, max_tokens=-1)
    with pytest.raises(MemtxError, match="stop string is empty"):
        generate(byte_model, byte_tokenizer, stop=[""])


def logits_for(token: int) -> torch.Tensor:
    logits = torch.zeros(260)
    logits[token] = 5.0
    logits[256] = 9.0  # The begin token, which is not text.
    logits[259] = 9.0  # Beyond the tokenizer's vocabulary.
    return logits


def spell(content: bytes, **options: object) -> tuple[TokenGenerator, list[TextDelta]]:
    config = GenerationConfig(sampling_params=GREEDY, **options)  # type: ignore[arg-type]
    token_generator = TokenGenerator(ByteTokenizer(), 256, [], config)
    deltas = []
    for byte in content:
        if token_generator.finish_reason is not None:
            break
        deltas.append(token_generator.advance(logits_for(byte)))
    return token_generator, deltas


def test_logprobs_are_those_of_the_model() -> None:
    token_generator, deltas = spell(b"ab", max_tokens=2, logprobs=2)
    log_norm = math.log(257 * 1 + math.exp(5) + 2 * math.exp(9))
    for delta, byte in zip(deltas, b"ab", strict=True):
        (token,) = delta.token_logprobs
        assert token.token == byte
        assert token.logprob == pytest.approx(5 - log_norm, abs=1e-5)  # float32
        assert token.top_logprobs[0] == (byte, pytest.approx(5 - log_norm, abs=1e-5))
        assert len(token.top_logprobs) == 2
    assert token_generator.finish_reason == "length"


def test_logprobs_come_with_the_characters_of_their_tokens() -> None:
    _, deltas = spell("aé🙂z".encode(), max_tokens=8, logprobs=0)
    parts = [(delta.text, len(delta.token_logprobs)) for delta in deltas if delta.text]
    assert parts == [("a", 1), ("é", 2), ("🙂", 4), ("z", 1)]
    assert [token.text_offset for delta in deltas for token in delta.token_logprobs] == [0, 1, 1, 2, 2, 2, 2, 3]


def test_logprobs_of_a_stop_string_are_not_returned() -> None:
    token_generator, deltas = spell(b"abcdef", max_tokens=6, logprobs=0, stop=("cd",))
    assert "".join(delta.text for delta in deltas) == "ab"
    assert sum(len(delta.token_logprobs) for delta in deltas) == 2
    assert (token_generator.finish_reason, token_generator.num_generated) == ("stop", 4)


def test_the_end_token_has_a_logprob_and_no_text() -> None:
    token_generator, deltas = spell(b"abc", max_tokens=6, logprobs=1, stop_token_ids=(ord("b"),))
    assert "".join(delta.text for delta in deltas) == "a"
    entries = [entry for delta in deltas for entry in delta.token_logprobs]
    assert [(entry.token, entry.text_offset) for entry in entries] == [(ord("a"), 0), (ord("b"), 1)]
    assert (token_generator.finish_reason, token_generator.num_generated) == ("stop", len(entries))


def test_text_held_back_is_returned_at_the_end() -> None:
    token_generator, deltas = spell("aé".encode(), max_tokens=2, logprobs=0, stop=("ax",))
    assert "".join(delta.text for delta in deltas) == "a\ufffd"
    assert sum(len(delta.token_logprobs) for delta in deltas) == 2
    assert token_generator.finish_reason == "length"


def test_invalid_generation_configs_are_refused() -> None:
    for options, message in (
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"seed": 2**64}, "64-bit integer"),
        ({"stop": ("",)}, "stop string is empty"),
    ):
        with pytest.raises(MemtxError, match=message):
            GenerationConfig(**options)  # type: ignore[arg-type]
    assert TokenGenerator(ByteTokenizer(), 0, [], GenerationConfig(max_tokens=0)).finish_reason == "length"

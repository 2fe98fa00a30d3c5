"""Hiding keeps length, order and depth; answers equal those of one pass over all text; needles are found."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.data.haystack import MAX_SENTENCE_CHARS, Haystack, encode_ids, split_sentences
from memtx.data.sources.base import Document
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import DataError, MemtxError
from memtx.evaluation.haystack import choose_answer, evaluate_needle, read_contexts
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer
from tests.evaluation.readers import remembers
from tests.evaluation.test_babi import HAYSTACK

TEXT = "It was dark. Was it? It was! The wind blew over\nthe moor, and nobody came.\n\nA title\n\n" * 3
TOKENIZER = ByteTokenizer()


def haystack(text: str = TEXT) -> Haystack:
    return Haystack([Document("a", "a", len(text), text=text)], TOKENIZER)


def test_text_is_split_into_sentences() -> None:
    assert split_sentences(TEXT)[:5] == [
        "It was dark.", "Was it?", "It was!", "The wind blew over the moor, and nobody came.", "A title",
    ]  # fmt: skip
    assert split_sentences('"Go." He went.') == ['"Go."', "He went."]
    assert max(map(len, split_sentences("word " * 1000))) <= MAX_SENTENCE_CHARS
    with pytest.raises(DataError):
        haystack(" \n\n ")


@given(st.lists(st.floats(0, 1), max_size=5), st.integers(0, 400), st.integers(0, 99))
def test_facts_are_hidden_in_order_at_their_depths(depths: list[float], length: int, seed: int) -> None:
    depths.sort()
    facts = [encode_ids(TOKENIZER, f" <fact {number}>") for number in range(len(depths))]
    context = haystack().hide(facts, depths, length, torch.Generator().manual_seed(seed))
    fact_length = sum(map(len, facts))
    if fact_length > length:
        assert context is None
        return
    assert context is not None
    assert len(context) == length
    text = TOKENIZER.decode(context)
    fact_starts = [text.index(f" <fact {number}>") for number in range(len(depths))]
    assert fact_starts == sorted(fact_starts)
    filler, max_sentence_length = text, max(map(len, split_sentences(TEXT))) + 1
    for number, start in enumerate(fact_starts):
        before = start - number * len(" <fact 0>")
        # At the nearest end of a sentence, so at most half a sentence away.
        assert abs(before - depths[number] * (length - fact_length)) <= max_sentence_length / 2
        filler = filler.replace(f" <fact {number}>", "")
    # The filler is consecutive text.
    assert filler in " " + " ".join(split_sentences(TEXT) * 4)


def model() -> MemoryTransformer:
    torch.manual_seed(0)
    memories = [partial(CompressedMemory, window=8, compression_rate=2, num_entries=4)]
    return MemoryTransformer(257, dim=16, depth=1, heads=2, memories=memories).double().eval()


def test_chosen_answer_equals_that_of_one_pass_over_all_text() -> None:
    reader, generator = model(), torch.Generator().manual_seed(0)
    contexts = [np.random.default_rng(seed).integers(0, 256, 50) for seed in range(3)]
    state = read_contexts(reader, contexts, TOKENIZER.bos_token_id, segment_length=7)
    before = {name: tensor.clone() for name, tensor in state.named_tensors().items()}
    question = encode_ids(TOKENIZER, " Who?")
    for stream, context in enumerate(contexts):
        answers = [torch.randint(256, (2 + number % 3,), generator=generator).numpy() for number in range(4)]
        nlls = []
        for answer in answers:
            tokens = torch.from_numpy(np.concatenate([[TOKENIZER.bos_token_id], context, question, answer]))
            logprobs = reader(tokens[None]).logits[0].detach().log_softmax(-1)
            answer_indices = range(len(tokens) - len(answer), len(tokens))
            nlls.append(-sum(float(logprobs[index - 1, tokens[index]]) for index in answer_indices))
        assert choose_answer(reader, state.select([stream]), question, answers) == int(np.argmin(nlls))
        reversed_choice = choose_answer(reader, state.select([stream]), question, answers[::-1])
        assert reversed_choice == 3 - int(np.argmin(nlls))
    # Questions leave the state unchanged.
    assert all(torch.equal(before[name], tensor) for name, tensor in state.named_tensors().items())


def test_needles_are_found_as_far_as_text_is_remembered() -> None:
    reader = remembers(3000)
    results = evaluate_needle(reader, TOKENIZER, HAYSTACK, [1000, 2000], num_depths=4, num_samples=3)
    assert [result.name for result in results] == ["depth 0%", "depth 33%", "depth 67%", "depth 100%"] * 2
    assert [result.distance for result in results] == [1000] * 4 + [2000] * 4
    assert all(result.accuracy == 1.0 and result.chance == 0.25 for result in results)
    # Each context is read once for all its questions; the other tokens are questions and answers.
    question_tokens = 2 * 4 * 3 * 4 * len(" The password of the harbour is copper. x")
    assert 3 * (1001 + 2001) < reader.num_tokens_read < 3 * (1001 + 2001) + question_tokens
    short = evaluate_needle(remembers(500), TOKENIZER, HAYSTACK, [2000], num_depths=4, num_samples=3, seed=1)
    # 33% of 2,000 from the end is farther than 500; a model without the text chooses the first answer.
    assert [result.accuracy for result in short] == [1.0, 0.0, 0.0, 1.0]


def test_impossible_needle_options_are_reported() -> None:
    with pytest.raises(MemtxError, match="do not fit into 100"):
        evaluate_needle(remembers(9), TOKENIZER, HAYSTACK, [100], num_samples=1)
    for num_depths in (1, 11):
        with pytest.raises(MemtxError, match=f"num_depths is {num_depths}"):
            evaluate_needle(remembers(9), TOKENIZER, HAYSTACK, [1000], num_depths=num_depths)

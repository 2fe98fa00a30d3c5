"""Hiding keeps length, order and places, and choosing by likelihood is what a plain reading of everything gives."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.data.sources.base import Document
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import DataError
from memtx.evaluation.haystack import MAX_SENTENCE_CHARS, Haystack, encode_ids, split_sentences
from memtx.evaluation.likelihood import choose_answer, read_contexts
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer

TEXT = "It was dark. Was it? It was! The wind blew over\nthe moor, and nobody came.\n\nA title\n\n" * 3
TOKENIZER = ByteTokenizer()


def haystack(text: str = TEXT) -> Haystack:
    return Haystack([Document("a", "a", len(text), text=text)], TOKENIZER)


def test_sentences() -> None:
    assert split_sentences(TEXT)[:5] == [
        "It was dark.", "Was it?", "It was!", "The wind blew over the moor, and nobody came.", "A title",
    ]  # fmt: skip
    assert split_sentences('"Go." He went.') == ['"Go."', "He went."]
    assert max(map(len, split_sentences("word " * 1000))) <= MAX_SENTENCE_CHARS
    with pytest.raises(DataError):
        haystack(" \n\n ")


@given(st.lists(st.floats(0, 1), max_size=5), st.integers(0, 400), st.integers(0, 99))
def test_facts_are_hidden_in_order_at_their_places(places: list[float], length: int, seed: int) -> None:
    places.sort()
    facts = [encode_ids(TOKENIZER, f" <fact {number}>") for number in range(len(places))]
    found = haystack().hide(facts, places, length, torch.Generator().manual_seed(seed))
    told = sum(map(len, facts))
    if told > length:
        assert found is None
        return
    assert found is not None
    assert len(found) == length
    text = TOKENIZER.decode(found)
    at = [text.index(f" <fact {number}>") for number in range(len(places))]
    assert at == sorted(at)
    rest, longest = text, max(map(len, split_sentences(TEXT))) + 1
    for number in range(len(places)):
        before = at[number] - number * len(" <fact 0>")
        # At the nearest end of a sentence, so at most half of one away.
        assert abs(before - places[number] * (length - told)) <= longest / 2
        rest = rest.replace(f" <fact {number}>", "")
    # What is left is the text as it runs on.
    assert rest in " " + " ".join(split_sentences(TEXT) * 4)


def model() -> MemoryTransformer:
    torch.manual_seed(0)
    memories = [partial(CompressedMemory, window=8, compression_rate=2, num_entries=4)]
    return MemoryTransformer(257, dim=16, depth=1, heads=2, memories=memories).double().eval()


def test_the_likeliest_answer_is_that_of_a_whole_reading() -> None:
    own, generator = model(), torch.Generator().manual_seed(0)
    contexts = [np.random.default_rng(row).integers(0, 256, 50) for row in range(3)]
    state = read_contexts(own, contexts, TOKENIZER.bos_token_id, segment_length=7)
    before = {name: tensor.clone() for name, tensor in state.named_tensors().items()}
    question = encode_ids(TOKENIZER, " Who?")
    for row, context in enumerate(contexts):
        answers = [torch.randint(256, (2 + number % 3,), generator=generator).numpy() for number in range(4)]
        costs = []
        for answer in answers:
            whole = torch.from_numpy(np.concatenate([[TOKENIZER.bos_token_id], context, question, answer]))
            chances = own(whole[None]).logits[0].detach().log_softmax(-1)
            places = range(len(whole) - len(answer), len(whole))
            costs.append(-sum(float(chances[at - 1, whole[at]]) for at in places))
        assert choose_answer(own, state.select([row]), question, answers) == int(np.argmin(costs))
        turned = choose_answer(own, state.select([row]), question, answers[::-1])
        assert turned == 3 - int(np.argmin(costs))
    # Asking leaves it as it was.
    assert all(torch.equal(before[name], tensor) for name, tensor in state.named_tensors().items())

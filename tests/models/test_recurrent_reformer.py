"""A causal Reformer reads, continues and generates as a recurrent language model, by whole calls."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx import MemtxError, Reformer, StreamReader, generate
from memtx.checkpoint.load import load_language_model
from memtx.data.tokenizers import ByteTokenizer
from memtx.inference.decoder import Decoder
from memtx.layers.positions.absolute import PositionEmbeddings
from memtx.layers.reformer import LocalAttention, LSHAttention
from memtx.models.recurrent_lm import RecurrentLanguageModel
from memtx.models.recurrent_reformer import RecurrentReformer

TOKENS = torch.randint(0, 30, (2, 24), generator=torch.Generator().manual_seed(0))


def reformer(vocab_size: int = 30, length: int = 16, **options: Any) -> Reformer:
    torch.manual_seed(0)
    attentions = [partial(LocalAttention, chunk_length=4), partial(LSHAttention, chunk_length=4, num_hashes=2)]
    model = Reformer(vocab_size, 8, 2, attentions, positions=partial(PositionEmbeddings, max_length=length), **options)
    return model.double().eval()


def test_a_call_reads_its_block_again() -> None:
    model = reformer()
    stream: RecurrentLanguageModel = RecurrentReformer(model).eval()
    state, expected = stream.init_state(2), model(TOKENS[:, :12]).logits
    assert expected is not None
    for start, end in ((0, 5), (5, 6), (6, 12)):
        output = stream(TOKENS[:, start:end], state, return_hidden_states=True)
        state = output.state
        # Of the tokens up to the end of the call, whatever the lengths of the calls before it.
        logits = model(TOKENS[:, :end]).logits
        assert logits is not None
        torch.testing.assert_close(output.logits, logits[:, start:end], rtol=0, atol=1e-12)
    assert state.position.tolist() == [12, 12]
    assert len(stream.fingerprint) == 64


def test_a_long_text_continues_in_a_fresh_block_and_documents_are_apart() -> None:
    model = reformer()
    stream = RecurrentReformer(model).eval()
    output = stream(TOKENS)
    second = model(TOKENS[:, 16:]).logits
    assert output.logits is not None
    torch.testing.assert_close(output.logits[:, 16:], second, rtol=0, atol=1e-12)
    document_starts = torch.zeros_like(TOKENS, dtype=torch.bool)
    document_starts[0, 3] = True
    logits = stream(TOKENS, document_starts=document_starts).logits
    alone = stream(TOKENS[:1, 3:]).logits
    assert logits is not None
    torch.testing.assert_close(logits[:1, 3:], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[1], output.logits[1], rtol=0, atol=1e-12)  # each stream for itself


def test_labels_give_the_loss_of_the_logits() -> None:
    stream = RecurrentReformer(reformer()).eval()
    labels = TOKENS.roll(-1, 1)
    labels[:, -1] = -100
    output, logits = stream(TOKENS, labels=labels), stream(TOKENS).logits
    assert logits is not None
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-12)
    assert output.nll is not None
    assert output.nll[:, -1].tolist() == [0, 0]


def test_decoding_reading_and_generation(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    model = reformer(tokenizer.vocab_size, length=64).float()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    loaded, loaded_tokenizer = load_language_model(tmp_path / "model")
    decoder = Decoder(loaded, loaded.init_state(2))
    logits = [decoder.step(tokens) for tokens in TOKENS[:, :8].unbind(1)]
    assert isinstance(loaded, RecurrentReformer)
    expected = loaded.reformer(TOKENS[:, :8]).logits
    assert expected is not None
    torch.testing.assert_close(logits[-1], expected[:, -1], rtol=0, atol=1e-5)
    reader = StreamReader(loaded, loaded_tokenizer, 16)
    for _ in [
        *reader.feed("some text, longer than one block of positions, so that another begins. "),
        *reader.finish(),
    ]:
        pass
    assert reader.totals.num_tokens == 71
    texts = ["".join(generate(loaded, loaded_tokenizer, "some ", max_tokens=4, seed=1)) for _ in range(2)]
    assert texts[0] == texts[1]


def test_bidirectional_models_are_refused() -> None:
    for model in (reformer(causal=False), reformer(add_lm_head=False)):
        with pytest.raises(MemtxError, match="no causal language model"):
            RecurrentReformer(model)

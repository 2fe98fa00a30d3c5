from __future__ import annotations

import pytest
import torch

from memtx.data.batch import IGNORED
from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer, Tokenizer
from memtx.errors import MemtxError
from memtx.training.objectives import masked, permuted, word_edges, words_in

TEXT = "Captain Ahab's white whale, störm 19th: the-end.\n\n Call me."


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_of_the_chosen_most_are_masked_some_others_some_left() -> None:
    tokens = torch.randint(0, 1000, (40, 1000), generator=seeded())
    found = masked(tokens, mask=1000, vocab_size=1000, share=0.15, kept=(7,), generator=seeded(1))
    chosen = found.labels != IGNORED
    assert torch.equal(found.labels[chosen], tokens[chosen])
    assert torch.equal(found.tokens[~chosen], tokens[~chosen])
    assert not chosen[tokens == 7].any()
    count = int(chosen.sum())
    # 40,000 draws at 15%, and 6,000 at 80%, 10%, 10%: five standard deviations.
    assert count / tokens.numel() == pytest.approx(0.15, abs=0.01)
    hidden = (found.tokens == 1000) & chosen
    same = (found.tokens == tokens) & chosen
    assert int(hidden.sum()) / count == pytest.approx(0.8, abs=0.026)
    assert int(same.sum()) / count == pytest.approx(0.1, abs=0.02)
    again = masked(tokens, mask=1000, vocab_size=1000, share=0.15, kept=(7,), generator=seeded(1))
    assert torch.equal(again.tokens, found.tokens)


def pieces(kind: str) -> tuple[Tokenizer, torch.Tensor]:
    made: Tokenizer = ByteTokenizer() if kind == "bytes" else BytePairTokenizer(300)
    made.fit([TEXT * 20])
    return made, torch.from_numpy(made.encode(TEXT).astype("int64"))[None]


@pytest.mark.parametrize("kind", ["bytes", "pairs"])
def test_words_are_runs_of_letters_and_digits(kind: str) -> None:
    tokenizer, tokens = pieces(kind)
    words = words_in(tokens, word_edges(tokenizer))[0]
    spelled = [""] * (int(words.max()) + 1)
    content = [b""] * len(spelled)
    for word, token in zip(words.tolist(), tokens[0].tolist(), strict=True):
        content[word] += tokenizer.token_bytes(token)
    spelled = [part.decode().strip() for part in content]
    assert "".join(part.decode() for part in content) == TEXT
    for word in ("Captain", "Ahab", "white", "whale", "störm", "19th", "the", "end", "Call"):
        assert any(word in one for one in spelled), word
        if kind == "bytes":
            assert word in spelled


@pytest.mark.parametrize("kind", ["bytes", "pairs"])
def test_whole_words_are_hidden_together(kind: str) -> None:
    tokenizer, one = pieces(kind)
    tokens = one.expand(200, -1)
    edges = word_edges(tokenizer)
    words = words_in(tokens, edges)
    found = masked(tokens, mask=400, vocab_size=300, share=0.3, edges=edges, generator=seeded())
    chosen = found.labels != IGNORED
    for row in range(len(tokens)):
        for word in words[row].unique():
            assert chosen[row][words[row] == word].unique().numel() == 1
    # 200 rows of some 20 words at 30%; words differ in length, so the share of tokens is only near it.
    assert float(chosen.float().mean()) == pytest.approx(0.3, abs=0.05)


def test_an_order_is_a_permutation_and_the_last_are_guessed() -> None:
    tokens = torch.randint(0, 50, (8, 30), generator=seeded())
    found = permuted(tokens, share=1 / 6, kept=(3,), generator=seeded(1))
    assert torch.equal(found.rank.sort(1).values, torch.arange(30).expand(8, -1))
    guessed = found.labels != IGNORED
    assert torch.equal(guessed, (found.rank >= 25) & (tokens != 3))
    assert torch.equal(found.labels[guessed], tokens[guessed])


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_shares_are_checked(share: float) -> None:
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(MemtxError, match="share is"):
        masked(tokens, mask=1, vocab_size=1, share=share)
    with pytest.raises(MemtxError, match="share is"):
        permuted(tokens, share=share)

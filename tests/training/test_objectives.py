from __future__ import annotations

import pytest
import torch

from memtx.data.batch import IGNORE_INDEX
from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer, Tokenizer
from memtx.errors import MemtxError
from memtx.training.objectives import mask_tokens

TEXT = "Captain Ahab's white whale, störm 19th: the-end.\n\n Call me."


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_selected_tokens_are_masked_replaced_or_kept() -> None:
    tokens = torch.randint(0, 1000, (40, 1000), generator=seeded())
    masked = mask_tokens(
        tokens, mask_token_id=1000, vocab_size=1000, mask_prob=0.15, special_token_ids=(7,), generator=seeded(1)
    )
    chosen = masked.labels != IGNORE_INDEX
    assert torch.equal(masked.labels[chosen], tokens[chosen])
    assert torch.equal(masked.tokens[~chosen], tokens[~chosen])
    assert not chosen[tokens == 7].any()
    count = int(chosen.sum())
    # 40,000 draws: five standard deviations are 0.009.
    assert count / tokens.numel() == pytest.approx(0.15, abs=0.01)
    is_mask = (masked.tokens == 1000) & chosen
    is_unchanged = (masked.tokens == tokens) & chosen
    # 6,000 draws at 80% and 10%: five standard deviations.
    assert int(is_mask.sum()) / count == pytest.approx(0.8, abs=0.026)
    assert int(is_unchanged.sum()) / count == pytest.approx(0.1, abs=0.02)  # five standard deviations
    again = mask_tokens(
        tokens, mask_token_id=1000, vocab_size=1000, mask_prob=0.15, special_token_ids=(7,), generator=seeded(1)
    )
    assert torch.equal(again.tokens, masked.tokens)


def tokenized_text(kind: str) -> tuple[Tokenizer, torch.Tensor]:
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else BytePairTokenizer(300)
    tokenizer.train([TEXT * 20])
    return tokenizer, torch.from_numpy(tokenizer.encode(TEXT).astype("int64"))[None]


@pytest.mark.parametrize("kind", ["bytes", "pairs"])
def test_whole_words_are_masked_together(kind: str) -> None:
    tokenizer, text_tokens = tokenized_text(kind)
    tokens = text_tokens.expand(200, -1)
    words = torch.from_numpy(tokenizer.word_ids(text_tokens[0].tolist())).expand(200, -1)
    masked = mask_tokens(tokens, mask_token_id=400, vocab_size=300, mask_prob=0.3, word_ids=words, generator=seeded())
    chosen = masked.labels != IGNORE_INDEX
    for index in range(len(tokens)):
        for word in words[index].unique():
            assert chosen[index][words[index] == word].unique().numel() == 1
    # 200 texts of some 20 words at 30%; words differ in length, so the share of tokens is only near it.
    assert float(chosen.float().mean()) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_probabilities_are_checked(share: float) -> None:
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(MemtxError, match="mask_prob is"):
        mask_tokens(tokens, mask_token_id=1, vocab_size=1, mask_prob=share)

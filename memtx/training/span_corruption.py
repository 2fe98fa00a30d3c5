"""Span corruption: an encoder-decoder reads a text with holes and writes what was in them (T5); SpanBERT's spans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.errors import MemtxError, check_at_least
from memtx.models.encoder_decoder import EncoderDecoder
from memtx.training.initial_model import load_initial_model
from memtx.training.objectives import MaskedTokens
from memtx.training.pretraining import TokenPredictionModule


class CorruptedSpans(NamedTuple):
    """Texts with sentinels in place of spans, ``(batch, length)``, and the spans behind their sentinels, as targets."""

    inputs: Tensor
    targets: Tensor


def sample_noise_spans(
    length: int, noise_density: float = 0.15, mean_span_length: float = 3.0, generator: torch.Generator | None = None
) -> Tensor:
    """Sample the tokens of a text to remove: equally many in equally many spans, whatever the sample.

    Raffel et al. 2020, section 3.1.4 and their code. A text begins with a token that stays.

    Args:
        length: Tokens of the text, at least 2.
        noise_density: Fraction of the tokens to remove.
        mean_span_length: Mean length of a span.
        generator: Random number generator. Defaults to torch's own.

    Returns:
        True for tokens to remove, ``(length,)`` bool, on the generator's device.

    Raises:
        MemtxError: A number is out of range.
    """
    check_at_least(2, length=length)
    check_at_least(1, mean_span_length=mean_span_length)
    if not 0.0 < noise_density < 1.0:
        raise MemtxError(f"noise_density is {noise_density}.", "Choose a number between 0 and 1, such as 0.15.")
    num_noise = min(max(round(length * noise_density), 1), length - 1)
    num_spans = min(max(round(num_noise / mean_span_length), 1), num_noise, length - num_noise)
    device = generator.device if generator is not None else torch.device("cpu")

    def split(total: int) -> Tensor:
        """Return the lengths of ``num_spans`` parts of a total, each at least 1."""
        cuts = torch.randperm(total - 1, generator=generator, device=device)[: num_spans - 1].sort().values + 1
        ends = torch.tensor([0, total], device=device)
        return torch.cat([ends[:1], cuts, ends[1:]]).diff()

    lengths = torch.stack([split(length - num_noise), split(num_noise)], dim=1).flatten()
    is_noise = torch.tensor([False, True], device=device).repeat(num_spans)
    return is_noise.repeat_interleave(lengths)


def corrupt_spans(tokens: Tensor, is_noise: Tensor, sentinel_ids: Sequence[int]) -> CorruptedSpans:
    """Replace each span by a sentinel (Raffel et al. 2020, figure 2).

    The targets are the spans, each behind its sentinel, and the sentinel after the last one.

    Args:
        tokens: ``(batch, length)`` int64.
        is_noise: True for tokens of a span, ``(batch, length)`` bool; equally many in equally many spans of each text.
        sentinel_ids: Ids of the sentinels in order, one more than there are spans.

    Raises:
        MemtxError: There are too few sentinels, or texts with different numbers of spans or of their tokens.
    """
    is_start = is_noise & ~torch.nn.functional.pad(is_noise, (1, 0))[:, :-1]
    counts = [sorted(set(mask.sum(1).tolist())) for mask in (is_noise, is_start)]
    if any(len(count) != 1 for count in counts):
        message = f"The texts have {counts[1]} spans of {counts[0]} tokens in total."
        raise MemtxError(message, "Give texts with equally many, as sample_noise_spans does.")
    num_spans = counts[1][0]
    if num_spans >= len(sentinel_ids):
        message = f"There are {len(sentinel_ids)} sentinels for {num_spans} spans and the end."
        raise MemtxError(message, f"Give at least {num_spans + 1}, or longer spans.")
    sentinels = torch.tensor(sentinel_ids, device=tokens.device)
    span_ids = sentinels[(is_start.cumsum(1) - 1).clamp(min=0)]
    batch_size = len(tokens)
    inputs = torch.where(is_start, span_ids, tokens)[~is_noise | is_start].view(batch_size, -1)
    # The sentinel of a span is written before its first token.
    pairs = torch.stack([span_ids, tokens], dim=2).flatten(1)
    is_written = torch.stack([is_start, is_noise], dim=2).flatten(1)
    last = sentinels[num_spans].expand(batch_size, 1)
    return CorruptedSpans(inputs, torch.cat([pairs[is_written].view(batch_size, -1), last], dim=1))


def mask_geometric_spans(
    tokens: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    mask_prob: float = 0.15,
    success_prob: float = 0.2,
    max_span_length: int = 10,
    word_ids: Tensor | None = None,
    special_token_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """Mask spans of words of geometric lengths (SpanBERT, Joshi et al. 2020, section 3.1).

    Of the spans, 80% become ``mask_token_id``, 10% random tokens, and 10% stay, each as a whole.

    Args:
        tokens: ``(batch, length)`` int64.
        mask_token_id: Id of the mask token.
        vocab_size: Random tokens are sampled below it.
        mask_prob: Fraction of the tokens to select, about.
        success_prob: Parameter of the geometric distribution; its mean, cut at ``max_span_length``, is 3.8.
        max_span_length: Longest span, in words.
        word_ids: Index of each token's word in its text, ascending, ``(batch, length)`` int64. Defaults to one word a
            token.
        special_token_ids: Ids that are never selected; a span does not cross them.
        generator: Random number generator. Defaults to torch's own.

    Raises:
        MemtxError: A number is out of range.
    """
    for name, value in (("mask_prob", mask_prob), ("success_prob", success_prob)):
        if not 0.0 < value < 1.0:
            raise MemtxError(f"{name} is {value}.", "Choose a probability between 0 and 1.")
    check_at_least(1, max_span_length=max_span_length)
    length, device = tokens.shape[1], generator.device if generator is not None else torch.device("cpu")
    masked, labels = tokens.clone(), torch.full_like(tokens, IGNORE_INDEX)
    distribution = (1.0 - success_prob) ** torch.arange(max_span_length, dtype=torch.float64, device=device)
    for row in range(len(tokens)):
        words = torch.arange(length) if word_ids is None else word_ids[row].cpu()
        bounds = [0, *(words.diff() != 0).nonzero().flatten().add(1).tolist(), length]
        special = torch.isin(tokens[row].cpu(), torch.tensor([*special_token_ids], dtype=torch.int64)).tolist()
        budget, is_free = max(1, round(mask_prob * length)), [not is_special for is_special in special]
        # Spans in a random order of their first words, as many as fit into the budget.
        for first in torch.randperm(len(bounds) - 1, generator=generator, device=device).tolist():
            span_length = 1 + int(torch.multinomial(distribution, 1, generator=generator))
            start, stop = bounds[first], bounds[min(first + span_length, len(bounds) - 1)]
            if stop - start > budget or not all(is_free[start:stop]):
                continue
            is_free[start:stop], budget = [False] * (stop - start), budget - (stop - start)
            labels[row, start:stop] = tokens[row, start:stop]
            share = float(torch.rand((), generator=generator, device=device))
            if share < 0.8:
                masked[row, start:stop] = mask_token_id
            elif share < 0.9:
                random = torch.randint(vocab_size, (stop - start,), generator=generator, device=device)
                masked[row, start:stop] = random.to(tokens.device)
            if budget == 0:
                break
    return MaskedTokens(masked, labels)


class SpanCorruptionModule(TokenPredictionModule):
    """Pretrains an encoder-decoder by span corruption (T5, Raffel et al. 2020, section 3.1.4).

    Args:
        model: Creates the model from the vocabulary size, in which sentinels are included.
        pretrained: Folder, checkpoint or run folder of an encoder-decoder to begin with; ``model`` is then ignored.
        vocab_size: Vocabulary size; set from the data module.
        noise_density: Fraction of the tokens to remove. Defaults to 0.15.
        mean_span_length: Mean length of a span. Defaults to 3.
        sentinel_ids: Ids of the sentinels in order. None adds ``num_sentinels`` after the last id.
        num_sentinels: Number of sentinels to add. Defaults to 100.
        **options: ``optimizer`` and ``scheduler`` of :class:`BaseModule`.

    Raises:
        MemtxError: There is no model, or the pretrained one is no encoder-decoder or has a smaller vocabulary.
    """

    model: EncoderDecoder

    def __init__(
        self,
        model: Callable[[int], EncoderDecoder] | None = None,
        pretrained: str | None = None,
        vocab_size: int = 257,
        noise_density: float = 0.15,
        mean_span_length: float = 3.0,
        sentinel_ids: Sequence[int] | None = None,
        num_sentinels: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        sample_noise_spans(2, noise_density, mean_span_length)  # which checks the numbers
        added = [vocab_size + index for index in range(num_sentinels)] if sentinel_ids is None else []
        self.sentinel_ids = list(sentinel_ids) if sentinel_ids is not None else added
        num_tokens = max([vocab_size - 1, *self.sentinel_ids]) + 1
        if pretrained is not None:
            self.model = load_initial_model(pretrained, EncoderDecoder, "an encoder-decoder", num_tokens)
        elif model is not None:
            self.model = model(num_tokens)
        else:
            raise MemtxError("There is no model.", "Give model.model or model.pretrained.")
        self.noise_density, self.mean_span_length = noise_density, mean_span_length

    def predict_tokens(
        self, stage: str, batch: Batch, batch_idx: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Remove spans of each text and predict them."""
        length = batch.tokens.shape[1]
        spans = [sample_noise_spans(length, self.noise_density, self.mean_span_length, generator) for _ in batch.tokens]
        corrupted = corrupt_spans(batch.tokens, torch.stack(spans).to(batch.tokens.device), self.sentinel_ids)
        output = self.model(corrupted.inputs, labels=corrupted.targets)
        return output.logits.flatten(0, 1), corrupted.targets.flatten()

"""Span corruption: an encoder-decoder reads a text with holes and writes what was in them (T5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from memtx.data.batch import Batch
from memtx.errors import MemtxError, check_at_least
from memtx.models.encoder_decoder import EncoderDecoder
from memtx.training.initial_model import load_initial_model
from memtx.training.pretraining import TokenPredictionModule


class CorruptedSpans(NamedTuple):
    """Texts with sentinels in place of spans, ``(batch, length)``, and the spans behind their sentinels, as targets."""

    inputs: Tensor
    targets: Tensor


def count_noise(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Return the number of tokens to remove from a text and that of their spans; arguments as for the function below.

    Raises:
        MemtxError: A number is out of range.
    """
    check_at_least(2, length=length)
    check_at_least(1, mean_span_length=mean_span_length)
    if not 0.0 < noise_density < 1.0:
        raise MemtxError(f"noise_density is {noise_density}.", "Choose a number between 0 and 1, such as 0.15.")
    num_noise = min(max(round(length * noise_density), 1), length - 1)
    return num_noise, min(max(round(num_noise / mean_span_length), 1), num_noise, length - num_noise)


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
    num_noise, num_spans = count_noise(length, noise_density, mean_span_length)
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


class SpanCorruptionModule(TokenPredictionModule):
    """Pretrains an encoder-decoder by span corruption (T5, Raffel et al. 2020, section 3.1.4).

    Args:
        model: Creates the model from the vocabulary size, in which sentinels are included.
        pretrained: Folder, checkpoint or run folder of an encoder-decoder to begin with; ``model`` is then ignored.
        vocab_size: Vocabulary size; set from the data module.
        noise_density: Fraction of the tokens to remove. Defaults to 0.15.
        mean_span_length: Mean length of a span. Defaults to 3.
        sentinel_ids: Ids of the sentinels in order. Defaults to ``sentinel_token_ids``; if there are none,
            ``num_sentinels`` are added after the last id.
        num_sentinels: Number of sentinels to add. Defaults to 100.
        segment_length: Tokens of a text; set from the data module. None checks the number of sentinels at each step.
        sentinel_token_ids: Ids of the tokenizer's sentinels; set from the data module.
        **options: ``optimizer`` and ``scheduler`` of :class:`BaseModule`.

    Raises:
        MemtxError: There is no model, or the pretrained one is no encoder-decoder or has a smaller vocabulary, or
            there are too few sentinels.
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
        segment_length: int | None = None,
        sentinel_token_ids: Sequence[int] = (),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        known = sentinel_token_ids if sentinel_ids is None else sentinel_ids
        self.sentinel_ids = list(known) or [vocab_size + index for index in range(num_sentinels)]
        if len({*self.sentinel_ids}) < len(self.sentinel_ids) or min(self.sentinel_ids, default=0) < 0:
            raise MemtxError("sentinel_ids repeat an id or have a negative one.", "Give distinct ids of tokens.")
        _, num_spans = count_noise(segment_length or 2, noise_density, mean_span_length)
        if (missing := num_spans + 1 - len(self.sentinel_ids)) > 0:
            needed = f"{num_spans} spans in {segment_length or 2} tokens need {num_spans + 1} sentinels"
            message = f"{needed}, one after the last; there are {len(self.sentinel_ids)}, {missing} are missing."
            hint = "Give more model.sentinel_ids, or" if known else f"Set model.num_sentinels to {num_spans + 1}, or"
            raise MemtxError(message, f"{hint} raise model.mean_span_length or cut data.segment_length.")
        num_tokens = max([vocab_size - 1, *self.sentinel_ids]) + 1
        if pretrained is not None:
            self.model = load_initial_model(pretrained, EncoderDecoder, "an encoder-decoder", vocab_size)
            if (missing := num_tokens - self.model.vocab_size) > 0:
                ids = f"The sentinels have ids up to {num_tokens - 1}, '{pretrained}' has {self.model.vocab_size} ids"
                reason = "" if known else ", and the tokenizer has no <extra_id_0>"
                message = f"{ids}: {missing} are missing{reason}."
                raise MemtxError(message, "Give ids of tokens that texts do not use as model.sentinel_ids.")
        elif model is not None:
            self.model = model(num_tokens)
        else:
            raise MemtxError("There is no model.", "Give model.model or model.pretrained.")
        if not known:
            first = f"Sentinels of spans are added to the tokenizer's ids: {self.sentinel_ids[0]}"
            rank_zero_info(f"{first} to {self.sentinel_ids[-1]}.")
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

"""Greedy decoding, sampling and beam search for encoder-decoders, by the rules of the ``transformers`` library.

A hypothesis scores the sum of its tokens' log-probabilities over its length to the power of ``length_penalty`` (Wu et
al. 2016, section 7, without its constant).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least
from memtx.models.encoder_decoder import DecoderState, EncoderDecoder

ChooseTokens = Callable[[Tensor, Sequence[list[int]]], list[int]]
"""Returns a token for each row, given logits ``(rows, vocab)``, -inf where excluded, and the rows' ids."""

_EXCLUDED = -1e9
"""Score of hypotheses that have not begun or may not go on, far below any sum of log-probabilities."""


@dataclass(frozen=True)
class BeamSearchOptions:
    """Options of a search; the names are those of generation_config.json.

    Args:
        num_beams: Hypotheses that are followed. 1 decodes greedily.
        max_length: Maximum length of a target, its start token included.
        min_length: Length before which no end token is chosen, the start token included.
        length_penalty: Exponent of the length; above 0, longer targets gain.
        no_repeat_ngram_size: Length of the n-grams that may not occur twice. 0 allows all.
        early_stopping: If True, a text is done when it has ``num_beams`` finished hypotheses; if False, when no running
            one can score better at the present length; "never", when none can at any length.
        forced_bos_token_id: Token after the start token. None leaves it to the model.
        forced_eos_token_id: Token at ``max_length``. None leaves it to the model.

    Raises:
        MemtxError: A number is out of range.
    """

    num_beams: int = 1
    max_length: int = 20
    min_length: int = 0
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    early_stopping: bool | Literal["never"] = False
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None

    def __post_init__(self) -> None:
        check_at_least(1, num_beams=self.num_beams)
        check_at_least(2, max_length=self.max_length)
        check_at_least(0, min_length=self.min_length, no_repeat_ngram_size=self.no_repeat_ngram_size)


@dataclass
class _Text:
    """The hypotheses of one text.

    Attributes:
        running: Tokens of the hypotheses that go on, best first.
        scores: Sums of their log-probabilities.
        finished: Best finished hypotheses, best first: score and tokens.
        can_improve: False once no running hypothesis can score better than the finished ones.
    """

    running: list[list[int]]
    scores: list[float]
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    can_improve: bool = True

    def finish(self, score: float, tokens: list[int], num_beams: int) -> None:
        """Add a finished hypothesis if it is among the best."""
        self.finished = sorted([*self.finished, (score, tokens)], key=lambda item: -item[0])[:num_beams]


def check_max_length(model: EncoderDecoder, options: BeamSearchOptions) -> None:
    """Raise MemtxError if the decoder has fewer positions than ``max_length``."""
    if options.max_length > (limit := model.position_embeddings.num_embeddings):
        raise MemtxError(f"max_length is {options.max_length}, the decoder has {limit} positions.", f"Give {limit}.")


@torch.no_grad()
def generate_targets(
    model: EncoderDecoder,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    global_attention_mask: Tensor | None = None,
    *,
    options: BeamSearchOptions,
    eos_token_ids: Collection[int] = (),
    choose: ChooseTokens | None = None,
    before_step: Callable[[], object] | None = None,
) -> list[list[int]]:
    """Return the best target of every text: ids from the start token to the end token, if one was reached.

    Args:
        model: Model in eval mode.
        input_ids: ``(batch, length)`` int64.
        attention_mask: ``(batch, length)``, 1 for a token and 0 for padding. None for no padding.
        global_attention_mask: ``(batch, length)``, 1 for a token that sees and is seen by all.
        options: Options of the search.
        eos_token_ids: Tokens that end a target.
        choose: Chooses the next tokens, such as a sampler; with a single beam. None takes the most likely ones.
        before_step: Called before every token; what it raises ends the search. None for nothing.

    Raises:
        MemtxError: A text or ``max_length`` is longer than the model's positions, or several beams were to be sampled.
    """
    if choose is not None and options.num_beams > 1:
        raise MemtxError(f"num_beams is {options.num_beams}, but a single target is sampled.", "Give num_beams 1.")
    check_max_length(model, options)
    hidden = model.encode(input_ids, attention_mask, global_attention_mask)
    state = model.start(hidden, attention_mask)
    beams = options.num_beams
    texts = [_Text([[model.start_token_id]] * beams, [0.0] + [_EXCLUDED] * (beams - 1)) for _ in input_ids]
    for length in range(1, options.max_length):
        if before_step is not None:
            before_step()
        prefixes = [hypothesis for text in texts for hypothesis in text.running]
        last_tokens = torch.tensor([[prefix[-1]] for prefix in prefixes], device=input_ids.device)
        logits, state = model.decode(last_tokens, state)
        scores = logits[:, -1].float()
        log_probs = scores if beams == 1 else F.log_softmax(scores, dim=-1)
        _apply_rules(log_probs, prefixes, options, eos_token_ids)
        if beams == 1:
            tokens = scores.argmax(dim=-1).tolist() if choose is None else choose(scores, prefixes)
            _append(texts, tokens, eos_token_ids)
            if all(text.finished for text in texts):
                break
            continue
        state, is_done = _extend(texts, log_probs, state, length, options, eos_token_ids)
        if is_done:
            break
    return [text.finished[0][1] if text.finished else text.running[0] for text in texts]


def _apply_rules(
    log_probs: Tensor, prefixes: Sequence[list[int]], options: BeamSearchOptions, eos_token_ids: Collection[int]
) -> None:
    """Exclude tokens by the options, in place, given logits ``(rows, vocab)`` up to a constant and the rows' ids."""
    length, size = len(prefixes[0]), options.no_repeat_ngram_size
    if size:
        for row, prefix in enumerate(prefixes):
            context = prefix[length - size + 1 :] if size > 1 else []
            ends = [
                prefix[start + size - 1]
                for start in range(length - size + 1)
                if prefix[start : start + size - 1] == context
            ]
            log_probs[row, ends] = -torch.inf
    if length < options.min_length:
        log_probs[:, list(eos_token_ids)] = -torch.inf
    forced = options.forced_bos_token_id if length == 1 else None
    if length == options.max_length - 1 and options.forced_eos_token_id is not None:
        forced = options.forced_eos_token_id
    if forced is not None:
        log_probs.fill_(-torch.inf)
        log_probs[:, forced] = 0.0


def _append(texts: Sequence[_Text], tokens: Sequence[int], eos_token_ids: Collection[int]) -> None:
    for text, token in zip(texts, tokens, strict=True):
        text.running = [[*text.running[0], token]]
        if token in eos_token_ids and not text.finished:
            text.finish(0.0, text.running[0], 1)


def _extend(
    texts: Sequence[_Text],
    log_probs: Tensor,
    state: DecoderState,
    length: int,
    options: BeamSearchOptions,
    eos_token_ids: Collection[int],
) -> tuple[DecoderState, bool]:
    """Extend every running hypothesis by a token; return the state of the best and whether all texts are done."""
    beams, num_texts = options.num_beams, len(texts)
    sums = torch.tensor([text.scores for text in texts], device=log_probs.device)[..., None]
    totals = (log_probs.view(num_texts, beams, -1) + sums).flatten(1)
    # Enough that as many as there are beams can go on, whatever ends.
    scores, indices = totals.topk(max(2, 1 + len(eos_token_ids)) * beams)
    vocab_size, is_last = log_probs.shape[-1], length + 1 == options.max_length
    parents, all_ended = [], True
    for index, (text, candidate_scores, candidates) in enumerate(
        zip(texts, scores.tolist(), indices.tolist(), strict=True)
    ):
        is_full = options.early_stopping is True and len(text.finished) == beams
        going_on: list[tuple[float, int, list[int]]] = []
        for rank, (score, candidate) in enumerate(zip(candidate_scores, candidates, strict=True)):
            beam, token = divmod(candidate, vocab_size)
            tokens = [*text.running[beam], token]
            if has_ended := is_last or token in eos_token_ids:
                if rank < beams and text.can_improve and not is_full:
                    text.finish(score / length**options.length_penalty, tokens, beams)
                score += _EXCLUDED
            all_ended = all_ended and has_ended
            going_on.append((score, beam, tokens))
        best = sorted(going_on, key=lambda item: -item[0])[:beams]
        text.scores, text.running = [score for score, _, _ in best], [tokens for _, _, tokens in best]
        parents += [index * beams + beam for _, beam, _ in best]
        _update_can_improve(text, length, options)
    is_done = all_ended or not any(text.can_improve for text in texts)
    if options.early_stopping is True:
        is_done = is_done or all(len(text.finished) == beams for text in texts)
    return state.select(torch.tensor(parents, device=log_probs.device)), is_done


def _update_can_improve(text: _Text, length: int, options: BeamSearchOptions) -> None:
    if options.early_stopping == "never" and options.length_penalty > 0.0:
        length = options.max_length - 1
    best = text.scores[0] / length**options.length_penalty
    if len(text.finished) == options.num_beams:
        text.can_improve = text.can_improve and best > text.finished[-1][0]

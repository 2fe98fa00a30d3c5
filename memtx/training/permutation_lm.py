"""Permuted language modeling: XLNet's pretraining (Yang et al. 2019, sections 2.2 to 2.5 and 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.data.batch import Batch
from memtx.data.hf_tokenizers import HFTokenizer
from memtx.errors import MemtxError, check_at_least
from memtx.models.xlnet import XLNet
from memtx.state import MemoryState
from memtx.training.pretraining import TokenPredictionModule
from memtx.training.recurrent_module import RecurrentModule


def sample_spans(
    is_start: Tensor,
    *,
    context_ratio: int = 6,
    max_span: int = 5,
    num_targets: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Select spans to predict, ``(batch, length)`` bool (section 3.1).

    A span has L tokens, 1 to ``max_span`` with probability proportional to 1 / L as in the original code, and lies
    anywhere in a context of ``context_ratio`` L tokens; contexts follow each other. It moves on to the next start.

    Args:
        is_start: True where a span may begin, ``(batch, length)`` bool.
        context_ratio: Tokens per predicted token, K in the paper.
        max_span: Tokens of the longest span.
        num_targets: Number of tokens to select, of which single ones fill up what spans do not cover; None for those
            of the spans.
        generator: Random number generator on the device of ``is_start``. Defaults to torch's own.

    Raises:
        MemtxError: A number is out of range.
    """
    check_at_least(2, context_ratio=context_ratio)
    check_at_least(1, max_span=max_span, num_targets=num_targets or 1)
    batch_size, length = is_start.shape
    goal = length if num_targets is None else min(num_targets, length)
    shape = batch_size, length // context_ratio + 1, 2
    uniform = torch.rand(shape, generator=generator, device=is_start.device).tolist()
    probs = 1 / np.arange(1, max_span + 1)
    bounds = np.cumsum(probs / probs.sum())
    selected = np.zeros((batch_size, length), dtype=np.bool_)
    for row, row_starts in enumerate(is_start.cpu().numpy()):
        position = 0
        for size_draw, place_draw in uniform[row]:
            size = min(int(np.searchsorted(bounds[:-1], size_draw, "right")) + 1, goal - int(selected[row].sum()))
            before = int(place_draw * ((context_ratio - 1) * size + 1))
            (candidates,) = row_starts[position + before :].nonzero()
            if size < 1 or not len(candidates) or (first := position + before + int(candidates[0])) + size > length:
                break
            selected[row, first : first + size] = True
            position = first + context_ratio * size - before
    result = torch.from_numpy(selected).to(is_start.device)
    if num_targets is None:
        return result
    order = torch.rand(result.shape, generator=generator, device=is_start.device) + result
    return torch.zeros_like(result).scatter(1, order.topk(goal, dim=1).indices, value=True)


def sample_permutation(
    is_target: Tensor, is_special: Tensor, parts: Sequence[int], generator: torch.Generator | None = None
) -> Tensor:
    """Sample a factorization order and return which tokens do not see which, ``(batch, length, length)`` bool.

    As in the original code, tokens that are not predicted come first, so all see them and they see each other alone;
    special tokens are in the order with the targets, and see themselves.

    Args:
        is_target: True for a token that is predicted, ``(batch, length)`` bool.
        is_special: True for a separator or the like, ``(batch, length)`` bool.
        parts: Lengths of the parts that are permuted apart; each sees all of those before it.
        generator: Random number generator on the tensors' device. Defaults to torch's own.
    """
    is_ordered = is_target | is_special
    rank = torch.rand(is_target.shape, generator=generator, device=is_target.device).argsort(1).argsort(1)
    rank = rank.masked_fill(~is_ordered, -1)
    limit = rank + ~is_target
    is_hidden = (limit[:, :, None] <= rank[:, None]) & is_ordered[:, None]
    part = torch.arange(len(parts), device=rank.device).repeat_interleave(torch.tensor(parts, device=rank.device))
    return torch.where(part[:, None] == part, is_hidden, part[:, None] < part)


class PreviousTokens(NamedTuple):
    """Tokens ``(batch, length)`` of the previous batch, where documents began there, and True ``(batch,)`` if any."""

    tokens: Tensor
    document_starts: Tensor
    exists: Tensor


class _ModelWithTokens:
    """The carried state of a model that reads every token twice: its own, and the previous tokens."""

    def __init__(self, model: XLNet, length: int) -> None:
        self._model, self._length = model, length

    def init_state(self, batch_size: int, **options: Any) -> MemoryState:
        """Return the state of fresh streams."""
        state = self._model.init_state(batch_size, **options)
        tokens = torch.zeros(batch_size, self._length, dtype=torch.int64, device=state.position.device)
        previous = PreviousTokens(tokens, tokens.bool(), torch.zeros_like(state.position, dtype=torch.bool))
        return MemoryState(state.position, (*state.layers, (previous,)))


class PermutedModule(RecurrentModule, TokenPredictionModule):
    """Permuted language modeling (XLNet, Yang et al. 2019), with the memory carried from batch to batch.

    With ``reuse_length`` of the model, which is then the data's ``segment_length``, a call reads the tokens of the
    previous batch and those of this one, and its first half enters the memory: every token is read twice, first with
    the tokens before it and then with those after it. The memory, and what a token sees, end where a document begins.

    Args:
        model: Creates the model from the vocabulary size.
        vocab_size: Vocabulary size; set from the data module.
        segment_length: Tokens per call that are new; set from the data module.
        context_ratio: Tokens per predicted token, K in the paper.
        max_span: Tokens of the longest span of predicted tokens.
        num_targets: Tokens to predict of each stream in a call, half of them in each half; None for about
            1 / ``context_ratio``, another number in each call.
        whole_words: If True, spans begin at the beginning of a word.
        add_special_tokens: If True, the new tokens of a call become two texts, A ``[SEP]`` B ``[SEP]`` ``[CLS]``, with
            a segment each (section 2.5). B follows A in half of the cases, and is of another stream in the others.
        **options: ``optimizer`` and ``scheduler`` of :class:`memtx.training.base_module.BaseModule`, and
            ``state_reset_prob`` of :class:`RecurrentModule`.

    Raises:
        MemtxError: A number is out of range, or the model's memory does not fit ``segment_length``.
    """

    model: XLNet

    def __init__(
        self,
        model: Callable[[int], XLNet] = XLNet,
        vocab_size: int = 257,
        segment_length: int = 512,
        context_ratio: int = 6,
        max_span: int = 5,
        num_targets: int | None = None,
        whole_words: bool = False,
        add_special_tokens: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model(vocab_size), segment_length, distillation=None, **options)
        check_at_least(8 if add_special_tokens else 1, segment_length=segment_length)
        reuse_length = self.model.reuse_length
        if reuse_length not in (None, segment_length):
            message = f"The model's reuse_length is {reuse_length}, data.segment_length {segment_length}."
            raise MemtxError(message, "Set both to the same number: the new tokens of a call.")
        if self.model.memory_length is None:
            raise MemtxError("memory_length is null: its state would grow forever.", "Set the model's memory_length.")
        self.reads_twice = reuse_length is not None
        self.span_options = {"context_ratio": context_ratio, "max_span": max_span}
        self.num_targets, self.whole_words, self.add_special_tokens = num_targets, whole_words, add_special_tokens

    @property
    def _stateful(self) -> Any:
        return _ModelWithTokens(self.model, self.segment_length) if self.reads_twice else self.model

    def setup(self, stage: str) -> None:
        """Check that the tokenizer has the special tokens."""
        if self.add_special_tokens and not isinstance(getattr(self.datamodule, "tokenizer", None), HFTokenizer):
            raise MemtxError(
                "model.add_special_tokens needs a tokenizer with [CLS] and [SEP].",
                "Set data.tokenizer to an HFTokenizer or a WordPieceTokenizer, or add_special_tokens to false.",
            )
        super().setup(stage)

    def predict_tokens(
        self, stage: str, batch: Batch, batch_idx: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Predict spans of every segment in a random order."""
        state = self._initial_state(stage, batch, batch_idx)
        logits, labels = [], []
        for start in range(0, batch.tokens.shape[1], self.segment_length):
            part = slice(start, start + self.segment_length)
            tokens, document_starts = batch.tokens[:, part], batch.document_starts[:, part]
            segment_logits, segment_labels, state = self._predict_segment(tokens, document_starts, state, generator)
            logits.append(segment_logits)
            labels.append(segment_labels)
        self.carry.set_state(stage, state.detach())
        return torch.cat(logits), torch.cat(labels)

    def _predict_segment(
        self, tokens: Tensor, document_starts: Tensor, state: MemoryState, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, MemoryState]:
        """Return logits and labels of the targets of one call, and the next state."""
        inputs, segments, input_starts = self._add_second_text(tokens, document_starts, generator)
        parts, is_token, layers = [inputs.shape[1]], torch.ones_like(inputs, dtype=torch.bool), state.layers
        if self.reads_twice:
            layers, (previous,) = state.layers[:-1], state.layers[-1]
            parts = [previous.tokens.shape[1], *parts]
            inputs = torch.cat([previous.tokens, inputs], dim=1)
            input_starts = torch.cat([previous.document_starts, input_starts], dim=1)
            segments = F.pad(segments, (parts[0], 0))
            is_token = torch.cat([previous.exists[:, None].expand(-1, parts[0]), is_token], dim=1)
        is_special = self._is_special(inputs)
        is_target = self._sample_targets(inputs, parts, generator) & is_token & ~is_special
        num_targets = int(is_target.sum(1).max())
        is_chosen, positions = is_target.int().topk(max(1, num_targets), dim=1)
        output = self.model(
            inputs,
            is_token if self.reads_twice else None,
            segments,
            state=MemoryState(state.position, layers),
            document_starts=input_starts,
            perm_mask=sample_permutation(is_target, is_special, parts, generator),
            target_mapping=F.one_hot(positions, inputs.shape[1]),
        )
        assert output.logits is not None
        assert output.state is not None
        next_state: MemoryState = output.state
        if self.reads_twice:
            # Nothing is carried of what did not exist.
            next_state = next_state.reset(~previous.exists)
            following = PreviousTokens(tokens, document_starts, torch.ones_like(previous.exists))
            next_state = MemoryState(next_state.position, (*next_state.layers, (following,)))
        chosen = is_chosen > 0
        return output.logits[chosen], inputs.gather(1, positions)[chosen], next_state

    def _add_second_text(
        self, tokens: Tensor, document_starts: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new tokens of a call, their segments of text, and where documents begin."""
        if not self.add_special_tokens:
            return tokens, torch.zeros_like(tokens), document_starts
        (batch_size, length), tokenizer = tokens.shape, self.datamodule.tokenizer
        draws = torch.rand(batch_size, 2, generator=generator, device=tokens.device)
        # Of length - 3 tokens, both texts have one at least.
        end = 1 + (draws[:, :1] * (length - 4)).long()
        position = torch.arange(length, device=tokens.device)
        source = (position - (position > end).long()).clamp(max=length - 1).expand(batch_size, -1)
        others = tokens.roll(1, dims=0).gather(1, source)
        continued = tokens.gather(1, source)
        second = torch.where(draws[:, 1:] < 0.5, continued, others)
        inputs = torch.where(position < end, tokens, second)
        is_separator = (position == end) | (position == length - 2)
        inputs = inputs.masked_fill(is_separator, tokenizer.sep_token_id)
        inputs[:, -1] = tokenizer.cls_token_id
        segments = (position > end).long() + (position == length - 1)
        # The second text is read as one with the first, wherever documents begin in it.
        return inputs, segments, document_starts & (position < end)

    def _sample_targets(self, inputs: Tensor, parts: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """Return the tokens to predict, ``(batch, length)`` bool, special ones among them."""
        is_start = torch.ones_like(inputs, dtype=torch.bool)
        if self.whole_words:
            word_ids = np.stack([self.datamodule.tokenizer.word_ids(sequence) for sequence in inputs.tolist()])
            is_start[:, 1:] = torch.from_numpy(np.diff(word_ids, axis=1) != 0).to(inputs.device)
        counts: list[int | None] = [None] * len(parts)
        if self.num_targets is not None:
            counts = [self.num_targets]
            if len(parts) == 2:
                counts = [self.num_targets - self.num_targets // 2, self.num_targets // 2]
        return torch.cat(
            [
                sample_spans(part_starts, num_targets=count, generator=generator, **self.span_options)
                for part_starts, count in zip(torch.split(is_start, list(parts), dim=1), counts, strict=True)
            ],
            dim=1,
        )

    def _is_special(self, inputs: Tensor) -> Tensor:
        tokenizer = getattr(self.datamodule, "tokenizer", None)
        ids = tokenizer.special_token_ids if isinstance(tokenizer, HFTokenizer) else (self.bos_token_id(),)
        return torch.isin(inputs, torch.tensor(ids, device=inputs.device))

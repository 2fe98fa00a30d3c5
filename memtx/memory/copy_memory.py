"""A memory of the output: what followed earlier positions whose hidden states resemble the present one.

The continuous cache of Grave et al. 2017 (section 3) with keys of its own, trained together with the model on the
mixed prediction as in TRIME (Zhong et al. 2022, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least
from memtx.memory.kv_ring import DecodeBuffers, DecodeStep, slot_positions
from memtx.memory.parts import gather_entries
from memtx.memory.recurrent import count_past_tokens, sliding_window, update_cache
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.ops.copying import copied_distribution, copied_probability
from memtx.ops.cpu.linear import Linear
from memtx.segment import INFINITE_OFFSET, Segment
from memtx.state import state_dataclass


@state_dataclass
class CopyState:
    """The newest positions of the open document, newest last.

    Attributes:
        keys: ``(batch, entries, key_dim)`` in the dtype of :meth:`CopyMemory.init_state`.
        tokens: ``(batch, entries)`` int32, token + 1; 0 where there is none.
    """

    keys: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class CopyView:
    """A copy memory opened for one segment.

    Attributes:
        q: Scaled queries, ``(batch, length, key_dim)``.
        past_keys: Carried keys, ``(batch, past, key_dim)``.
        keys: The segment's keys, ``(batch, length, key_dim)``.
        next_tokens: Token after each key, ``(batch, past + length)``; the last one is unused.
        visibility: Visibility of all keys.
        gate: Logits of the share of copying without the match's part, ``(batch, length)``.
        match_gate: Function that adds the part of each query's best score to the logits.
        has_entries: True where anything can be copied, ``(batch, length)`` bool.
        next_state: State after the segment.
    """

    q: Tensor
    past_keys: Tensor
    keys: Tensor
    next_tokens: Tensor
    visibility: Visibility
    gate: Tensor
    match_gate: Callable[[Tensor, Tensor], Tensor]
    has_entries: Tensor
    next_state: CopyState

    def label_log_shares(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-share of the model's own prediction and the log-probability that copying adds to each label.

        Labels and results are ``(batch, length)``.
        """
        keys = (self.past_keys, self.keys)
        copied, best = copied_probability(self.q, *keys, self.next_tokens, labels, self.visibility)
        log_share, log_copy_share = _log_shares(self.match_gate(self.gate, best), self.has_entries)
        return log_share, log_copy_share + _safe_log(copied)

    def mix(self, logits: Tensor) -> Tensor:
        """Return the logarithm of the mixed prediction, ``(batch, length, vocab)``, given the model's logits."""
        all_keys = torch.cat([self.past_keys, self.keys], dim=1)
        probs, best = copied_distribution(self.q, all_keys, self.next_tokens, self.visibility, logits.shape[-1])
        return _mix(logits, probs, self.match_gate(self.gate, best), self.has_entries)


class CopyMemory(nn.Module):
    """A memory of the newest positions, each with the token that followed, that is mixed into the prediction.

    p(token) = (1 - g) * softmax(logits) + g * (sum of the softmax weights of positions that this token followed), where
    scores are scaled products of normalized keys, and the gate g is a sigmoid of the hidden state and the best score.

    Attributes:
        is_hidden: If True, the prediction is the model's own (see :func:`memtx.models.sources.without_source`).

    Args:
        dim: Width of the hidden states.
        num_entries: Number of newest positions kept.
        train_entries: Number kept in training. Defaults to ``num_entries``.
        key_dim: Width of the keys. None takes the hidden states themselves, as a cache that needs no training does.
        gate_init: Initial logit of the gate.
        scale_init: Initial scale of the scores.

    Raises:
        MemtxError: A number is not positive.
    """

    is_hidden: bool = False
    gate_parameters = ("gate", "match_weight", "log_scale")

    def __init__(
        self,
        dim: int,
        num_entries: int = 6144,
        train_entries: int | None = 1536,
        key_dim: int | None = 48,
        gate_init: float = -3.0,
        scale_init: float = 10.0,
    ) -> None:
        super().__init__()
        check_at_least(2, num_entries=num_entries)
        check_at_least(2, train_entries=2 if train_entries is None else train_entries)
        check_at_least(1, key_dim=1 if key_dim is None else key_dim)
        if scale_init <= 0:
            raise MemtxError(f"scale_init is {scale_init}, expected a positive number.", "The default is 10.")
        self.num_entries = num_entries
        self.train_entries = num_entries if train_entries is None else train_entries
        self.key_dim = dim if key_dim is None else key_dim
        # Four standard deviations of a component of a unit vector are in the range of int8.
        self.levels = 127 / min(1.0, 4 / math.sqrt(self.key_dim))
        self.key = nn.Identity() if key_dim is None else Linear(dim, key_dim, bias=False)
        self.gate = Linear(dim, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, gate_init)
        self.match_weight = nn.Parameter(torch.zeros(()))
        self.log_scale = nn.Parameter(torch.tensor(scale_init).log())

    def extra_repr(self) -> str:
        """Return the numbers of entries."""
        return f"num_entries={self.num_entries}, train_entries={self.train_entries}"

    @property
    def capacity(self) -> int:
        """Number of positions kept in the present mode."""
        return self.train_entries if self.training else self.num_entries

    def init_state(self, batch_size: int, *, like: Tensor) -> CopyState:
        """Return an empty state for the present mode.

        Its keys are int8 in eval mode and bfloat16 in training, or where they are the hidden states themselves, and
        float64 in a float64 model.
        """
        keys = like.new_zeros(batch_size, self.capacity, self.key_dim, dtype=self._key_dtype(like.dtype))
        return CopyState(keys, like.new_zeros(batch_size, self.capacity, dtype=torch.int32))

    def read(self, state: CopyState, x: Tensor, tokens: Tensor, segment: Segment) -> CopyView:
        """Open the memory for a segment.

        A state of another mode is read as far as it goes.

        Args:
            state: State after the previous segment.
            x: Normalized outputs of the last layer, ``(batch, length, dim)``.
            tokens: The segment's tokens, ``(batch, length)`` int64.
            segment: Positions of the tokens.
        """
        q, gate = self._project(x)
        # Rounded before use, so that a key is the same within its segment and after it.
        keys = self._encode(q, self._key_dtype(q.dtype))
        past_keys, past_tokens = self._to_present_mode(state, keys.dtype)
        next_state = CopyState(
            update_cache(past_keys, keys, segment),
            update_cache(past_tokens[..., None], (tokens[..., None] + 1).to(torch.int32), segment)[..., 0],
        )
        num_past = min(count_past_tokens(segment), self.capacity)
        past_tokens = past_tokens[:, self.capacity - num_past :]
        visibility = sliding_window(segment, num_past, self.capacity - 1, min_age=1).visibility
        # A state of another mode may hold fewer positions than there were.
        exists = F.pad(past_tokens > 0, (0, segment.length), value=True)
        visible_until = visibility.visible_until.masked_fill(~exists, -INFINITE_OFFSET)
        visibility = replace(visibility, visible_until=visible_until)
        return CopyView(
            q * self.log_scale.exp().to(q.dtype),
            self._decode(past_keys[:, self.capacity - num_past :], q.dtype),
            self._decode(keys, q.dtype),
            # The token after a position is the next position's.
            torch.cat([(past_tokens - 1).clamp(min=0), tokens, tokens[:, :1]], dim=1)[:, 1:],
            visibility,
            gate,
            self._add_match,
            segment.position > 0,
            next_state,
        )

    def open_ring(self, state: CopyState, past_length: Tensor) -> DecodeBuffers:
        """Return the buffers of a state: position p's key, and the token after it, in slot p modulo their number.

        ``past_length`` is the number of tokens of each stream's document read so far, ``(batch,)`` int64.
        """
        keys, tokens = self._to_present_mode(state, self._key_dtype(self.gate.weight.dtype))
        position = slot_positions(past_length - 1, self.num_entries)
        index = position - (past_length[:, None] - self.num_entries)
        # The newest slot, whose next token is unknown, holds the token of the oldest position.
        next_tokens = torch.cat([tokens, tokens[:, :1]], dim=1).gather(1, index + 1)
        is_missing = (tokens.gather(1, index) == 0) & (position >= 0)
        return DecodeBuffers((gather_entries(keys, index), next_tokens.masked_fill(is_missing, 0)))

    def close_ring(self, ring: DecodeBuffers, past_length: Tensor) -> CopyState:
        """Return the state in the buffers: the inverse of :meth:`open_ring`."""
        keys, next_tokens = ring.buffers
        position = past_length[:, None] + torch.arange(-self.num_entries, 0, device=keys.device)
        tokens = next_tokens.gather(1, (position - 1) % self.num_entries)
        exists = position >= 0
        keys = gather_entries(keys, position % self.num_entries).masked_fill(~exists[..., None], 0.0)
        return CopyState(keys, tokens.masked_fill(~exists, 0))

    def step(self, x: Tensor, logits: Tensor, tokens: Tensor, ring: DecodeBuffers, step: DecodeStep) -> Tensor:
        """Return the logarithm of the mixed prediction, ``(batch, vocab)``, after one more token per stream.

        The buffers are changed in place. Hidden states x are ``(batch, dim)``, the model's logits ``(batch, vocab)``,
        tokens ``(batch,)`` int64.
        """
        keys, next_tokens = ring.buffers
        stream = step.memo("stream", lambda: torch.arange(x.shape[0], device=x.device))
        q, gate = self._project(x[:, None])
        next_tokens[stream, (step.position - 1) % self.num_entries] = (tokens + 1).to(next_tokens.dtype)
        keys[stream, step.position % self.num_entries] = self._encode(q[:, 0], keys.dtype)
        if self.is_hidden:
            return logits
        slot_position = slot_positions(step.position, self.num_entries)
        is_visible = (slot_position >= 0) & (slot_position < step.position[:, None]) & (next_tokens > 0)
        visible_from = torch.where(is_visible, 0, 1)
        visibility = Visibility(visible_from, torch.ones_like(visible_from), 1, (KeyRange(self.num_entries),))
        q = q * self.log_scale.exp().to(q.dtype)
        next_tokens = next_tokens.clamp(min=1) - 1
        probs, best = copied_distribution(q, self._decode(keys, q.dtype), next_tokens, visibility, logits.shape[-1])
        return _mix(logits[:, None], probs, self._add_match(gate, best), step.position[:, None] > 0)[:, 0]

    def _key_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype == torch.float64:
            return dtype
        return torch.bfloat16 if self.training or isinstance(self.key, nn.Identity) else torch.int8

    def _to_present_mode(self, state: CopyState, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a state's newest keys in a dtype, and tokens, with zeros before them where it is shorter."""
        keys, tokens = state.keys, state.tokens
        if keys.dtype != dtype:
            keys = self._encode(self._decode(keys, torch.promote_types(dtype, torch.float32)), dtype)
        if missing := self.capacity - tokens.shape[1]:
            # A negative pad removes the oldest.
            keys, tokens = F.pad(keys, (0, 0, missing, 0)), F.pad(tokens, (missing, 0))
        return keys, tokens

    def _encode(self, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """Round normalized keys to the dtype of a state."""
        return (keys * self.levels).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else keys.to(dtype)

    def _decode(self, keys: Tensor, dtype: torch.dtype) -> Tensor:
        return keys.to(dtype) / self.levels if keys.dtype == torch.int8 else keys.to(dtype)

    def _add_match(self, gate: Tensor, best: Tensor) -> Tensor:
        """Return the gate's logits, ``(batch, length)``, given the best scores, which count from half the scale."""
        return gate + self.match_weight.to(gate.dtype) * (best - 0.5 * self.log_scale.detach().exp()).to(gate.dtype)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalized queries, ``(batch, length, key_dim)``, and the gate's logits, float32 or wider."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.normalize(self.key(x).to(dtype), dim=-1), self.gate(x)[..., 0].to(dtype)


def _log_shares(gate: Tensor, has_entries: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-shares of the model's own prediction and of copying, ``(batch, length)``."""
    copies = F.logsigmoid(gate).masked_fill(~has_entries, -torch.inf)
    return F.logsigmoid(-gate).masked_fill(~has_entries, 0.0), copies


def _safe_log(probs: Tensor) -> Tensor:
    """Return the logarithm, with a finite value and gradient at 0."""
    return probs.clamp(min=torch.finfo(probs.dtype).tiny).log()


def _mix(logits: Tensor, probs: Tensor, gate: Tensor, has_entries: Tensor) -> Tensor:
    """Return the logarithm of the mixed prediction, ``(batch, length, vocab)``; copying has probabilities ``probs``."""
    log_share, log_copy_share = _log_shares(gate, has_entries)
    model = logits.to(probs.dtype).log_softmax(-1) + log_share[..., None]
    return torch.logaddexp(model, log_copy_share[..., None] + _safe_log(probs))

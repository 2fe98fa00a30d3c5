"""Score segments of several streams in one call, and select the segments that share a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.recurrent_lm import RecurrentLanguageModel
from memtx.ops.cross_entropy import IGNORE_INDEX
from memtx.state import MemoryState

CPU_CALL_COST_TOKENS = 32
"""Number of tokens that cost as much as the overhead of a call on a CPU: more padding to save a call does not pay off.
Measured with 2.4 M parameters and one thread: 2 to 3 ms per call, 0.06 ms per token."""

MAX_PADDING_RATIO = 0.5
"""Maximum padding on an accelerator, where calls cost more than tokens, as a fraction of the next segment."""


@dataclass(frozen=True)
class ScoreRequest:
    """The next segment of one stream.

    Attributes:
        state: State of the stream, batch size 1.
        tokens: ``(length,)`` int64, the input tokens.
        labels: ``(length,)`` int64, the token after each input token.
        num_logprobs: Number of most likely tokens to return per position.
        vocab_size: Number of ids that these are chosen from; the model's vocabulary may be padded beyond the
            tokenizer's. None for all.
        return_hidden_states: If True, return the hidden states.
        discard_state: If True, the stream ends here and its next state is not needed.
    """

    state: MemoryState
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    num_logprobs: int = 0
    return_hidden_states: bool = False
    discard_state: bool = False
    vocab_size: int | None = None


@dataclass(frozen=True)
class ScoreOutput:
    """The model's output for one request.

    Attributes:
        state: Next state of the stream; the request's state if ``discard_state``.
        nll: ``(length,)`` float32, negative log-likelihood of each label in nats.
        top_tokens: If requested, ``(length, num_logprobs)`` int64, most likely tokens per position, best first.
        top_logprobs: If requested, ``(length, num_logprobs)`` float32, their log-probabilities in nats.
        hidden_states: If requested, ``(length, dim)`` float32, output of the last layer at each input token.
    """

    state: MemoryState
    nll: NDArray[np.float32]
    top_tokens: NDArray[np.int64] | None = None
    top_logprobs: NDArray[np.float32] | None = None
    hidden_states: NDArray[np.float32] | None = None


def accepts_padding(model: RecurrentLanguageModel) -> bool:
    """Return whether the model reads segments of different lengths in one call (``valid_length``)."""
    return isinstance(model, MemoryTransformer) and model.supports_padding


@torch.inference_mode()
def score_segments(model: RecurrentLanguageModel, requests: Sequence[ScoreRequest]) -> list[ScoreOutput]:
    """Score the next segments of several streams in one call of a model in eval mode.

    Outputs equal those of separate calls, up to rounding. All requests must have the same output options. If the model
    does not support padding, only segments with ``discard_state`` may be shorter than the longest.
    """
    first, lengths = requests[0], [len(request.tokens) for request in requests]
    device = first.state.position.device
    tokens = pad_sequence([torch.from_numpy(request.tokens) for request in requests], batch_first=True)
    unpadded_labels = [torch.from_numpy(request.labels) for request in requests]
    labels = pad_sequence(unpadded_labels, batch_first=True, padding_value=IGNORE_INDEX).to(device)
    padding: dict[str, Any] = {}
    if any(len(request.tokens) < max(lengths) and not request.discard_state for request in requests):
        assert accepts_padding(model), "the padding of a shorter segment would enter its state"
        padding = {"valid_length": torch.tensor(lengths, device=device)}
    output = model(
        tokens.to(device),
        first.state if len(requests) == 1 else MemoryState.concat([request.state for request in requests]),
        # With labels the model never materializes the logits.
        labels=None if first.num_logprobs else labels,
        return_hidden_states=first.return_hidden_states,
        **padding,
    )
    top_tokens = top_logprobs = None
    if output.logits is not None:
        logprobs = output.logits.float().log_softmax(-1)
        nll = -logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        ranked = logprobs[..., : first.vocab_size]
        top = ranked.topk(min(first.num_logprobs, ranked.shape[-1]), dim=-1)
        top_logprobs, top_tokens = top.values.cpu().numpy(), top.indices.cpu().numpy()
    else:
        assert output.nll is not None
        nll = output.nll
    hidden = output.hidden_states[-1].float().cpu().numpy() if output.hidden_states is not None else None
    batch_nll = nll.float().cpu().numpy()

    outputs = []
    for index, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        state = request.state if request.discard_state else output.state
        if len(requests) > 1 and not request.discard_state:
            # Copied: a view would keep the whole batch in memory while the stream waits.
            state = output.state.select([index])
        optional: list[Any] = [top_tokens, top_logprobs, hidden]
        optional = [array if array is None else array[index, :length].copy() for array in optional]
        outputs.append(ScoreOutput(state, batch_nll[index, :length], *optional))
    return outputs


def default_batch_tokens(is_cpu: bool) -> int:
    """Return the default maximum number of tokens per call; on a CPU, larger calls only add latency."""
    return 1024 if is_cpu else 4096


def padding_limit(length: int, is_cpu: bool) -> int:
    """Return the maximum difference of lengths in a call, in tokens; ``length`` is that of the next segment."""
    return CPU_CALL_COST_TOKENS if is_cpu else int(MAX_PADDING_RATIO * length)


def select_batch(
    requests: Sequence[ScoreRequest], *, max_tokens: int, max_padding: int, supports_padding: bool
) -> list[int]:
    """Return the ascending indices of the requests to score in one call.

    Args:
        requests: One or more requests, next first, which is always selected.
        max_tokens: Maximum number of tokens in the padded batch; a single segment may exceed it.
        max_padding: Maximum difference in length, in tokens.
        supports_padding: If False, only segments with ``discard_state`` may be padded.
    """
    first, selected = requests[0], [0]
    if first.num_logprobs:
        return selected  # The logits are large: score these segments one by one.
    first_length = min_length = max_length = len(first.tokens)
    # Segments of the most similar length first: they need the least padding.
    for index in sorted(range(1, len(requests)), key=lambda index: abs(len(requests[index].tokens) - first_length)):
        request, length = requests[index], len(requests[index].tokens)
        if request.num_logprobs or request.return_hidden_states != first.return_hidden_states:
            continue
        low, high = min(min_length, length), max(max_length, length)
        can_pad = supports_padding or (request.discard_state and length < first_length)
        is_allowed = (can_pad or length == first_length) and high - low <= max_padding
        if is_allowed and (len(selected) + 1) * high <= max_tokens:
            selected.append(index)
            min_length, max_length = low, high
    return sorted(selected)

"""One segment of several streams through the model: every token's surprise, and where each stream then stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from memtx.models.memory_transformer import MemoryTransformer
from memtx.ops.cross_entropy import IGNORE_INDEX
from memtx.state import MemoryState


@dataclass(frozen=True)
class ScoreRequest:
    """One stream's next segment.

    Attributes:
        state: where the stream stands, one row.
        tokens: (n,) int64, the tokens to be read.
        labels: (n,) int64, the tokens that follow each of them.
        num_logprobs: how many of the likeliest tokens to name at every place.
        return_hidden_states: whether hidden states are asked for.
        discard_state: whether the stream ends here, so that the state after it is not needed.
    """

    state: MemoryState
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    num_logprobs: int = 0
    return_hidden_states: bool = False
    discard_state: bool = False


@dataclass(frozen=True)
class ScoreOutput:
    """What the model said.

    Attributes:
        state: where the stream stands now; where it ended, where it stood before.
        nll: (n,) float32, each label's negative log-likelihood in nats.
        top_tokens: where asked for, (n, num_logprobs) int64, the likeliest tokens at each place, likeliest first.
        top_logprobs: likewise their log-probabilities, (n, num_logprobs) float32, in nats.
        hidden_states: where asked for, (n, dim) float32, the last layer's output that each label was predicted from: it
            knows all before the label, not the label.
    """

    state: MemoryState
    nll: NDArray[np.float32]
    top_tokens: NDArray[np.int64] | None = None
    top_logprobs: NDArray[np.float32] | None = None
    hidden_states: NDArray[np.float32] | None = None


@torch.inference_mode()
def score_segments(model: MemoryTransformer, requests: Sequence[ScoreRequest]) -> list[ScoreOutput]:
    """Read segments of several streams in one call.

    Args:
        model: in eval mode.
        requests: at least one; all ask for the same. A model without ``supports_padding`` reads streams that go on in
            segments of one length; one that ends may be shorter, since nothing looks at what is put behind it.

    Returns:
        One result a request. Rows are independent: each is what it is alone, up to rounding.
    """
    first = requests[0]
    width = max(len(one.tokens) for one in requests)
    device = first.state.position.device
    inputs = np.zeros((len(requests), width), dtype=np.int64)
    labels = np.full((len(requests), width), IGNORE_INDEX, dtype=np.int64)
    for row, one in enumerate(requests):
        inputs[row, : len(one.tokens)] = one.tokens
        labels[row, : len(one.labels)] = one.labels
    lengths = None
    if any(len(one.tokens) < width and not one.discard_state for one in requests):
        assert model.supports_padding, "what follows a shorter segment would enter its state"
        lengths = torch.tensor([len(one.tokens) for one in requests], device=device)
    state = first.state if len(requests) == 1 else MemoryState.concat([one.state for one in requests])
    target = torch.from_numpy(labels).to(device)
    output = model(
        torch.from_numpy(inputs).to(device),
        state,
        # Whole logits are made only where they are looked at.
        labels=None if first.num_logprobs else target,
        valid_length=lengths,
        return_hidden_states=first.return_hidden_states,
    )
    top = values = None
    if output.logits is not None:
        logprobs = output.logits.float().log_softmax(-1)
        nll = -logprobs.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        values, top = (part.cpu() for part in logprobs.topk(min(first.num_logprobs, logprobs.shape[-1]), dim=-1))
    else:
        assert output.nll is not None
        nll = output.nll
    hidden = output.hidden_states[-1].float().cpu().numpy() if output.hidden_states is not None else None
    scores = nll.float().cpu().numpy()
    results = []
    for row, one in enumerate(requests):
        n = len(one.tokens)
        results.append(
            ScoreOutput(
                # A row's own copy: a view would keep the whole batch in memory for as long as the stream waits.
                one.state if one.discard_state else output.state if len(requests) == 1 else output.state.select([row]),
                scores[row, :n],
                top[row, :n].numpy() if top is not None else None,
                values[row, :n].numpy() if values is not None else None,
                hidden[row, :n].copy() if hidden is not None else None,
            )
        )
    return results

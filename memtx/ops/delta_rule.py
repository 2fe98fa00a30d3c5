"""Fast weights by the gated delta rule: one matrix per head, written at every token and read by queries.

With decay a_t in (0, 1] and write strength b_t in [0, 2] (Gated Delta Networks, Yang et al. 2024, equation 10):

    S_t = a_t S_(t-1) + k_t u_t',    u_t = b_t (v_t - a_t S_(t-1)' k_t),    o_t = S_t' q_t

A write removes the value stored under its key. A strength above 1 flips the sign of that value (Grazzi et al. 2024),
and with keys of norm 1 the matrix does not grow. Without removal, u_t = b_t v_t, this is linear attention
(Katharopoulos et al. 2020, section 3.3). The matrix is zero at a document's first token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtx.ops import fla
from memtx.ops.cpu import delta_rule as cpu_delta_rule

CHUNK_SIZE = 32
"""Tokens per chunk: fastest of 8 to 128 on one CPU thread, forward and backward, with heads of 32 and 64."""


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, document_starts: Tensor,
    *, delta_rule: bool = True, compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write and read all tokens in order, with the fastest implementation for the device and dtype.

    Args:
        q: ``(batch, key_heads, length, key_dim)``; each key head serves ``heads / key_heads`` matrices.
        k: ``(batch, key_heads, length, key_dim)``; for the delta rule of norm at most 1, or writes overshoot.
        v: ``(batch, heads, length, value_dim)``.
        beta: ``(batch, heads, length)``, the write strengths b.
        log_decay: ``(batch, heads, length)``, log a, finite and at most 0, or ``(batch, heads, length, key_dim)`` for a
            decay per key channel (Kimi Linear, Kimi Team 2025, section 3). None disables decay.
        state: ``(batch, heads, key_dim, value_dim)``, the matrix before the first token.
        document_starts: ``(batch, length)`` bool, True for the first token of a document.
        delta_rule: If True, remove the value stored under a key before writing.
        compute_dtype: Dtype that products may be rounded to on CUDA, where :mod:`memtx.ops.fla` then computes them.
            Defaults to that of the inputs.

    Returns:
        ``(batch, heads, length, value_dim)``, each token's read after its own write, and the final matrix. Both have
        the common dtype of the inputs; autocast is disabled.
    """
    dtypes = {x.dtype for x in (q, k, v, beta, state)} | ({log_decay.dtype} if log_decay is not None else set())
    if q.device.type == "cpu" and dtypes == {torch.float32} and cpu_delta_rule.is_available():
        inputs = (q, k, v, beta, log_decay, state, document_starts)
        return cpu_delta_rule.recurrent_gated_delta_rule(*inputs, delta_rule=delta_rule)
    if delta_rule and fla.is_supported(q, log_decay, compute_dtype or q.dtype):
        return fla.fla_gated_delta_rule(q, k, v, beta, log_decay, state, document_starts, compute_dtype or q.dtype)
    ratio = v.shape[1] // q.shape[1]
    q, k = q.repeat_interleave(ratio, dim=1), k.repeat_interleave(ratio, dim=1)
    return chunk_gated_delta_rule(q, k, v, beta, log_decay, state, document_starts, delta_rule=delta_rule)


def naive_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, document_starts: Tensor,
    *, delta_rule: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute :func:`gated_delta_rule` token by token, with as many key heads as matrices; the reference for tests."""
    outputs = []
    for t in range(q.shape[2]):
        state = state.masked_fill(document_starts[:, t, None, None, None], 0.0)
        if log_decay is not None:
            state = state * log_decay[:, :, t].reshape(*state.shape[:2], -1, 1).exp()
        update = v[:, :, t]
        if delta_rule:
            update = update - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t])
        update = beta[:, :, t, None] * update
        state = state + k[:, :, t, :, None] * update[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(outputs, dim=2), state


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, document_starts: Tensor,
    *, delta_rule: bool = True, chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute :func:`gated_delta_rule`, in parallel within a chunk and recurrently from chunk to chunk.

    Within a chunk every u depends on the earlier ones, u = b (v - ... k'k u), a unit lower triangular system. It is
    solved for all chunks at once, separately for the values and for the incoming state (WY form, Yang et al. 2024b,
    section 3.2), so that only small products remain sequential. Tokens of other documents are masked.

    Args:
        q: ``(batch, heads, length, key_dim)``; other arguments and results as in :func:`gated_delta_rule`.
        k: Keys.
        v: Values.
        beta: Write strengths.
        log_decay: Log decays.
        state: Matrix before the first token.
        document_starts: First tokens of documents.
        delta_rule: If True, remove the value stored under a key before writing.
        chunk_size: Tokens per chunk.
    """
    length = q.shape[2]
    chunk_size = min(chunk_size, length)
    num_chunks = -(-length // chunk_size)
    padding = num_chunks * chunk_size - length

    def split_chunks(x: Tensor) -> Tensor:
        """Reshape (batch, heads, length, ...) to (batch, heads, chunks, chunk_size, ...); padding writes nothing."""
        if padding:
            x = torch.cat([x, x.new_zeros(*x.shape[:2], padding, *x.shape[3:])], dim=2)
        return x.reshape(*x.shape[:2], num_chunks, chunk_size, *x.shape[3:])

    with torch.autocast(q.device.type, enabled=False):
        q, k, v, b = split_chunks(q), split_chunks(k), split_chunks(v), split_chunks(beta)[..., None]
        document_id = split_chunks(document_starts[:, None].int()).cumsum(-1)  # (batch, 1, chunks, chunk_size)
        causal = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).tril()
        mask = (document_id[..., :, None] == document_id[..., None, :]) & causal
        sees_state = (document_id == 0)[..., None].to(q.dtype)
        # Decay from write j to read i, from the incoming state to read i, and from write j to the end of the chunk.
        if log_decay is None:
            decay, decay_from_state, decay_to_end = mask.to(q.dtype), sees_state, mask[..., -1, :, None].to(q.dtype)
        elif log_decay.dim() == 4:
            total = split_chunks(log_decay).cumsum(-2)
            gap = total[..., :, None, :] - total[..., None, :, :]
            decay = gap.masked_fill(~mask[..., None], float("-inf")).exp()
            decay_from_state, decay_to_end = sees_state * total.exp(), decay[..., -1, :, :]
        else:
            total = split_chunks(log_decay).cumsum(-1)
            # The sum over j + 1 .. i as a difference of logarithms, so that nothing overflows.
            gap = (total[..., :, None] - total[..., None, :]).masked_fill(~mask, float("-inf"))
            decay, decay_from_state = gap.exp(), sees_state * total[..., None].exp()
            decay_to_end = decay[..., -1, :, None]
        weights = _decayed_products(q, k, decay)
        if delta_rule:
            system = (b * _decayed_products(k, k, decay)).tril(-1)
            right_side = torch.cat([b * v, b * decay_from_state * k], dim=-1)
            # unitriangular: the diagonal is taken as ones without being read.
            solution = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
            u, w = solution.split([v.shape[-1], k.shape[-1]], dim=-1)
            w_chunks = w.unbind(2)
        else:
            u, w_chunks = b * v, None
        # unbind, since slicing chunk by chunk would allocate a full-size gradient per slice.
        operands = (u, weights, decay_from_state * q, (decay_to_end * k).mT, decay_from_state[..., -1:, :].mT)
        chunks, outputs = zip(*(x.unbind(2) for x in operands), strict=True), []
        for index, (values, weight, query, key, state_decay) in enumerate(chunks):
            update = values if w_chunks is None else values - w_chunks[index] @ state
            outputs.append(query @ state + weight @ update)
            state = state_decay * state + key @ update
        return torch.cat(outputs, dim=2)[:, :, :length], state


def _decayed_products(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """Return the products of queries and keys within chunks, decayed per pair or, with one dimension more, channel."""
    if decay.dim() == q.dim():
        return (q @ k.mT) * decay
    return torch.einsum("...ik,...jk,...ijk->...ij", q, k, decay)

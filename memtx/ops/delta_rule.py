"""Fast weights by the gated delta rule: a matrix a head that is written at every token and read by queries.

With decay a_t in (0, 1] and writing strength b_t in [0, 2] (Gated Delta Networks, Yang et al. 2024, equation 10):

    S_t = a_t S_(t-1) + k_t u_t',    u_t = b_t (v_t - a_t S_(t-1)' k_t),    o_t = S_t' q_t

What the key held before is taken out as the new value is put in; above 1 its sign turns (Grazzi et al. 2024), which
keeps lengths at most as they are for keys of length 1. Without that, u_t = b_t v_t, it is linear
attention (Katharopoulos et al. 2020, section 3.3). A document's first token finds the matrix empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_SIZE = 32
"""Tokens a chunk: of 8 to 128 measured fastest on one CPU thread, heads of 32 and of 64, forward and backward."""


def naive_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    document_starts: Tensor,
    *,
    delta_rule: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`chunk_gated_delta_rule` token by token: the twin that it is tested against."""
    outputs = []
    for t in range(q.shape[2]):
        state = state.masked_fill(document_starts[:, t, None, None, None], 0.0)
        if log_decay is not None:
            state = state * log_decay[:, :, t, None, None].exp()
        new = v[:, :, t]
        if delta_rule:
            new = new - torch.einsum("rhkv,rhk->rhv", state, k[:, :, t])
        new = beta[:, :, t, None] * new
        state = state + k[:, :, t, :, None] * new[:, :, None]
        outputs.append(torch.einsum("rhkv,rhk->rhv", state, q[:, :, t]))
    return torch.stack(outputs, dim=2), state


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    document_starts: Tensor,
    *,
    delta_rule: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Write and read every token, a chunk at a time: within a chunk in parallel, from chunk to chunk by the matrix.

    Within a chunk every u depends on those before it: u = b (v - ... k'k u), a unit lower triangular system. It is
    solved once for all chunks, without the matrix that comes in and for it (the WY form, Yang et al. 2024b,
    section 3.2), so only small products remain to be done in order. Tokens of other documents have no part in it.

    Args:
        q: (rows, heads, tokens, key_dim).
        k: (rows, heads, tokens, key_dim); for the delta rule at most of length 1, or writing overshoots.
        v: (rows, heads, tokens, value_dim).
        beta: (rows, heads, tokens), b.
        log_decay: (rows, heads, tokens), the logarithm of a: finite, at most 0; None for no decay.
        state: (rows, heads, key_dim, value_dim), as the tokens before left it.
        document_starts: (rows, tokens) bool, where a document begins.
        delta_rule: whether what the key held is taken out (the delta rule).
        chunk_size: tokens a chunk.

    Returns:
        (rows, heads, tokens, value_dim), each token's read after its own write, and the last matrix. All in the
        type of the inputs, which is one; products are not done by autocast.
    """
    length = q.shape[2]
    chunk_size = min(chunk_size, length)
    count = -(-length // chunk_size)
    missing = count * chunk_size - length

    def cut(x: Tensor) -> Tensor:
        """(rows, heads, tokens, ...) -> (rows, heads, chunks, chunk, ...); tokens added write nothing."""
        if missing:
            x = torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], dim=2)
        return x.reshape(*x.shape[:2], count, chunk_size, *x.shape[3:])

    with torch.autocast(q.device.type, enabled=False):
        q, k, v, b = cut(q), cut(k), cut(v), cut(beta)[..., None]
        document = cut(document_starts[:, None].int()).cumsum(-1)  # (rows, 1, chunks, chunk)
        lower = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).tril()
        reached = (document[..., :, None] == document[..., None, :]) & lower
        carried = (document == 0)[..., None].to(q.dtype)
        if log_decay is None:
            between, since, until = reached.to(q.dtype), carried, reached[..., -1, :, None].to(q.dtype)
        else:
            total = cut(log_decay).cumsum(-1)
            # From write j to read i the decays of j + 1 .. i: a difference, so that none overflows.
            gap = (total[..., :, None] - total[..., None, :]).masked_fill(~reached, float("-inf"))
            between, since = gap.exp(), carried * total[..., None].exp()
            until = between[..., -1, :, None]
        weights = (q @ k.mT) * between
        if delta_rule:
            system = (b * (k @ k.mT) * between).tril(-1)
            known = torch.cat([b * v, b * since * k], dim=-1)
            # The diagonal is taken for ones without being read.
            solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
            new, undone = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
        else:
            new, undone = b * v, None
        # Unbound at once: a gradient of slices taken one by one would be as wide as all of them each time.
        shares = [x.unbind(2) for x in (new, weights, since * q, (until * k).mT, since[..., -1:, :])]
        undoing = undone.unbind(2) if undone is not None else None
        outputs = []
        for at, (own, weight, read, written, kept) in enumerate(zip(*shares, strict=True)):
            change = own if undoing is None else own - undoing[at] @ state
            outputs.append(read @ state + weight @ change)
            state = kept * state + written @ change
        return torch.cat(outputs, dim=2)[:, :, :length], state

"""Attention that intervals cannot express: random blocks, merged by log-sum-exp, and global queries.

Both gather their operands, so the cost is proportional to the visible pairs: queries x r blocks of keys, and global
queries x all keys. :func:`sample_random_blocks` samples Big Bird's blocks as its checkpoints expect them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.ops.attention.bias import ExpireBias, ScoreBias
from memtx.ops.attention.mask import SparsePattern, Visibility, is_inside
from memtx.ops.attention.reference import repeat_kv, softmax_attention
from memtx.ops.attention.scores import DistanceScores, compute_scores

PLANNED_LENGTHS = (1024, 3072, 4096)
"""Lengths in tokens, rounded up to whole blocks, that use the first rule of :func:`sample_random_blocks`."""

MAX_PLANNED_POSITION = 1024
"""Under the first rule, random blocks lie within this many tokens of the start."""


def mask_duplicates(indices: Tensor) -> Tensor:
    """Replace repeated indices in ``(..., n)`` by -1."""
    repeated = (indices[..., :, None] == indices[..., None, :]).tril(-1).any(-1)
    return indices.masked_fill(repeated, -1)


@dataclass(frozen=True)
class KeyBlocks:
    """The key blocks that a pattern's query blocks see.

    Attributes:
        table: ``(heads or 1, query blocks, r)`` int64, indices of key blocks, in range even where masked.
        mask: ``(batch or 1, heads or 1, query blocks, block_size or 1, r * block_size)`` bool.
    """

    table: Tensor
    num_key_blocks: int
    mask: Tensor


def _gather_per_key(x: Tensor, pattern: SparsePattern, table: Tensor, num_key_blocks: int) -> Tensor:
    """Gather (batch, keys) to (batch, heads or 1, query blocks, 1, r * block_size); padding keys get 0."""
    size = pattern.block_size
    x = F.pad(x[:, pattern.first_key :], (0, num_key_blocks * size - x.shape[1] + pattern.first_key))
    return x.view(x.shape[0], num_key_blocks, size)[:, table].flatten(3, 4)[..., None, :]


def find_key_blocks(visibility: Visibility) -> KeyBlocks:
    """Find the key blocks of a pattern.

    Unless duplicates count, repeated blocks count once, and keys already visible by their intervals are masked.
    """
    pattern = visibility.pattern
    assert pattern is not None
    assert pattern.random_blocks is not None
    size = pattern.block_size
    num_key_blocks = max(-(-(visibility.num_keys - pattern.first_key) // size), 1)
    blocks = pattern.random_blocks if pattern.count_duplicates else mask_duplicates(pattern.random_blocks)
    table = blocks.clamp(0, num_key_blocks - 1)

    def gather(x: Tensor) -> Tensor:
        return _gather_per_key(x, pattern, table, num_key_blocks)

    # Padding keys get 0 for both ends of every interval, so they are in no document.
    start, end = pattern.document_start, pattern.document_end
    offset = torch.arange(table.shape[1] * size, device=table.device).view(-1, size, 1)
    spans_call = (start <= 0) & (end >= visibility.num_queries)
    # Reading values to get a smaller mask would synchronize a GPU and break a compiled graph.
    may_read = table.device.type == "cpu" and not torch.compiler.is_compiling()
    if may_read and pattern.count_duplicates and bool((spans_call | (end <= start)).all()):
        mask = gather(spans_call.to(torch.int64)) > 0
    else:
        mask = is_inside(offset, gather(start), gather(end))
    if not pattern.count_duplicates:
        mask = mask & ~is_inside(offset, gather(visibility.visible_from), gather(visibility.visible_until))
    exists = (blocks >= 0) & (blocks < num_key_blocks)
    return KeyBlocks(table, num_key_blocks, mask & exists.repeat_interleave(size, dim=-1)[..., None, :])


def attend_random_blocks(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Compute attention and log-sum-exp over the keys of the pattern's random blocks."""
    pattern, blocks, (heads, queries) = visibility.pattern, find_key_blocks(visibility), q.shape[1:3]
    assert pattern is not None
    size, table, num_key_blocks = pattern.block_size, blocks.table, blocks.num_key_blocks

    def split_blocks(x: Tensor, num_blocks: int) -> Tensor:
        """Reshape (..., n, head_dim) to (..., blocks, block_size, head_dim)."""
        x = F.pad(x, (0, 0, 0, num_blocks * size - x.shape[-2]))
        return x.reshape(*x.shape[:-2], num_blocks, size, x.shape[-1])

    def gather_keys(x: Tensor) -> Tensor:
        """Gather (batch, kv_heads, keys, head_dim) to (batch, heads, query blocks, r * block_size, head_dim)."""
        head = torch.arange(heads, device=x.device) * x.shape[1] // heads
        key_blocks = split_blocks(x[:, :, pattern.first_key :], num_key_blocks)
        return key_blocks[:, head[:, None, None], table].flatten(3, 4)

    scores = compute_scores(split_blocks(q, table.shape[1]), gather_keys(k), scale)
    assert not isinstance(bias, ExpireBias), "spans belong to a causal window"
    if bias is not None:
        assert not isinstance(bias, DistanceScores)
        offset = torch.arange(table.shape[1] * size, device=q.device).view(-1, size, 1)
        distance = offset - _gather_per_key(bias.key_offset, pattern, table, num_key_blocks)
        scores = scores + bias.compute_bias(distance).to(scores.dtype)
    out, lse = softmax_attention(scores, blocks.mask, gather_keys(v), dropout)
    return out.flatten(2, 3)[:, :, :queries], lse.flatten(2, 3)[:, :, :queries]


def attend_global_queries(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, scale: float, dropout: float,
    local_attention: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Replace the rows of ``local_attention`` (output, log-sum-exp) at global queries by their global attention."""
    pattern = visibility.pattern
    assert pattern is not None
    assert pattern.global_queries is not None
    offset = mask_duplicates(pattern.global_queries).expand(q.shape[0], -1)  # (batch, n)
    index = offset.clamp(min=0)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    mask = is_inside(offset[..., None], pattern.document_start[:, None], pattern.document_end[:, None])
    mask = mask | is_inside(offset[..., None], visibility.visible_from[:, None], visibility.visible_until[:, None])
    scores = compute_scores(q.gather(2, index), repeat_kv(k, q.shape[1]), scale)
    assert not isinstance(bias, ExpireBias), "spans belong to a causal window"
    if bias is not None:
        assert not isinstance(bias, DistanceScores)
        distance = (offset[..., None] - bias.key_offset[:, None])[:, None]
        scores = scores + bias.compute_bias(distance).to(scores.dtype)
    global_out, global_lse = softmax_attention(scores, mask[:, None], repeat_kv(v, q.shape[1]), dropout)
    # Ignored entries are written after the last query and cut off.
    target = torch.where(offset < 0, q.shape[2], offset)[:, None, :, None]

    def scatter(x: Tensor, values: Tensor) -> Tensor:
        """Write values (batch, heads, n, head_dim) into x (batch, heads, queries, head_dim)."""
        return F.pad(x, (0, 0, 0, 1)).scatter(2, target.expand_as(values), values)[:, :, :-1]

    out, lse = local_attention
    return scatter(out, global_out.to(out.dtype)), scatter(lse[..., None], global_lse[..., None])[..., 0]


def sample_random_blocks(
    length: int, block_size: int, num_random_blocks: int, heads: int, *, max_length: int, seed: int
) -> Tensor:
    """Sample ``(heads, blocks - 2, num_random_blocks)`` int64, the random blocks that each query block sees.

    The first and the last query block have no row (Big Bird, section 2). The tables equal those that the
    ``transformers`` library samples in training with the layer's index as seed, so a checkpoint sees the blocks it was
    trained with. There are two rules: one for texts of 1024, 3072 and 4096 tokens, the lengths of the paper's runs, and
    one for all other lengths. Raises MemtxError if the first rule leaves a block fewer candidates than random blocks.

    Args:
        length: Tokens of the text, a multiple of ``block_size`` above ``(5 + 2 * num_random_blocks) * block_size``.
        block_size: Tokens per block.
        num_random_blocks: Number of random blocks per query block.
        heads: Number of heads, each with its own table.
        max_length: Maximum length of the model; the first rule samples for this length.
        seed: Seed of the whole table.
    """
    # RandomState's sequence is fixed across numpy versions, and it is not the global generator.
    generator = np.random.RandomState(seed)
    blocks = length // block_size
    if length in PLANNED_LENGTHS:
        num_planned = max_length // block_size
        tables = [list(_sample_planned(generator, num_planned, block_size, num_random_blocks)) for _ in range(heads)]
        return torch.from_numpy(np.array(tables, dtype=np.int64).reshape(heads, -1, num_random_blocks)[:, : blocks - 2])
    table = np.zeros((heads, blocks, num_random_blocks), dtype=np.int64)
    if num_random_blocks:
        # The last block needs none, but sampling for it advances the generator as in transformers.
        for block in range(1, blocks):
            for head in range(heads):
                table[head, block] = _sample_outside_window(generator, block, num_random_blocks)
    return torch.from_numpy(table[:, 1:-1])


def _sample_outside_window(generator: np.random.RandomState, block: int, num_random_blocks: int) -> np.ndarray:
    """Sample from the first ``5 + 2 * num_random_blocks`` blocks, except those that the query block already sees."""
    num_candidates = 5 + 2 * num_random_blocks
    excluded = {block - 1, block, block + 1, 0, num_candidates - 1}
    if block == 1:
        excluded.add(num_candidates - 2)
    if block == num_candidates - 2:
        excluded.add(1)
    order = generator.permutation(np.arange(num_candidates, dtype=np.int32))
    return np.array([candidate for candidate in order if candidate not in excluded][:num_random_blocks])


def _sample_planned(
    generator: np.random.RandomState, num_blocks: int, block_size: int, num_random_blocks: int
) -> Iterator[np.ndarray]:
    """Yield the random blocks of every query block but the first and the last, by the first rule.

    Near the end of the text the rule does not exclude the window, so a block may be visible already.
    """
    middle = np.arange(1, num_blocks - 1, dtype=np.int32)
    last = MAX_PLANNED_POSITION // block_size - 1 if 2 * block_size < MAX_PLANNED_POSITION else num_blocks - 1
    for block in range(1, num_blocks - 1):
        if block > 2 and (block >= num_blocks - 3 or block - 2 > last):
            candidates = middle[:last]
        else:
            candidates = np.concatenate((middle[: max(block - 2, 0)], middle[block + 1 : last]))
        sample = generator.permutation(candidates)[:num_random_blocks]
        if len(sample) not in (1, num_random_blocks):
            message = f"Big Bird's block {block} of {num_blocks} has {len(sample)} candidates"
            hint = "Use smaller blocks, fewer random blocks, or pass random_blocks."
            raise MemtxError(f"{message} for {num_random_blocks} random blocks.", hint)
        # A single candidate is repeated.
        yield np.broadcast_to(sample, (num_random_blocks,))

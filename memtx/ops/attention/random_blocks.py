"""Which random blocks each block of queries sees in Big Bird, as the published models were trained with them.

Zaheer et al. 2020, section 2. The tables are those that the ``transformers`` library draws in training, from the
layer's number as seed, so that a checkpoint's weights meet the blocks they learned with. Two rules: the one of the
article's own runs for texts of 1024, 3072 and 4096 tokens, and one for all other lengths.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from memtx.errors import MemtxError

PLANNED_LENGTHS = (1024, 3072, 4096)
"""Lengths in tokens, rounded up to whole blocks, that the first rule is for."""

MAX_PLANNED_POSITION = 1024
"""Under the first rule, random blocks lie within this many tokens from the beginning."""


def sample_random_blocks(
    length: int, block_size: int, num_random_blocks: int, heads: int, *, max_length: int, seed: int
) -> Tensor:
    """Return the blocks that each block of queries but the first and the last sees at random.

    Args:
        length: tokens of the text, a multiple of ``block_size``, more than
            ``(5 + 2 * num_random_blocks) * block_size``.
        block_size: tokens a block.
        num_random_blocks: random blocks that each block of queries sees.
        heads: each has a table of its own.
        max_length: tokens of the longest text that the model is for; the first rule draws for that many.
        seed: of the whole table.

    Returns:
        (heads, blocks - 2, num_random_blocks) int64.

    Raises:
        MemtxError: the first rule leaves a block fewer to choose from than there are to be drawn.
    """
    # Its stream of numbers is fixed for good, and it is not the global one.
    generator = np.random.RandomState(seed)
    blocks = length // block_size
    if length in PLANNED_LENGTHS:
        tables = [
            list(_sample_planned(generator, max_length // block_size, block_size, num_random_blocks))
            for _ in range(heads)
        ]
        return torch.from_numpy(np.array(tables, dtype=np.int64).reshape(heads, -1, num_random_blocks)[:, : blocks - 2])
    table = np.zeros((heads, blocks, num_random_blocks), dtype=np.int64)
    if num_random_blocks:
        # Drawn for the last block too, though it needs none: the stream of numbers goes on through it.
        for block in range(1, blocks):
            for head in range(heads):
                table[head, block] = _sample_outside_window(
                    generator, block, 2 * num_random_blocks + 5, num_random_blocks
                )
    return torch.from_numpy(table[:, 1:-1])


def _sample_outside_window(
    generator: np.random.RandomState, block: int, num_candidates: int, num_random_blocks: int
) -> np.ndarray:
    """Return ``num_random_blocks`` of the first ``num_candidates`` blocks that the queries do not see otherwise."""
    barred = {block - 1, block, block + 1, 0, num_candidates - 1}
    if block == 1:
        barred.add(num_candidates - 2)
    if block == num_candidates - 2:
        barred.add(1)
    order = generator.permutation(np.arange(num_candidates, dtype=np.int32))
    return np.array([each for each in order if each not in barred][:num_random_blocks])


def _sample_planned(
    generator: np.random.RandomState, num_blocks: int, block_size: int, num_random_blocks: int
) -> Iterator[np.ndarray]:
    """Yield the random blocks of every block of queries but the first and the last, by the first rule.

    Near the text's end it does not leave out the window, so a block may be drawn that is seen already.
    """
    middle = np.arange(1, num_blocks - 1, dtype=np.int32)
    last = MAX_PLANNED_POSITION // block_size - 1 if 2 * block_size < MAX_PLANNED_POSITION else num_blocks - 1
    for block in range(1, num_blocks - 1):
        start = block - 2
        if block <= 2:
            among = middle[block + 1 : last]
        elif block >= num_blocks - 3 or start > last:
            among = middle[:last]
        elif block + 1 == last:
            among = middle[:start]
        else:
            among = np.concatenate((middle[:start], middle[block + 1 : last]))
        drawn = generator.permutation(among)[:num_random_blocks]
        if len(drawn) not in (1, num_random_blocks):
            raise MemtxError(
                f"Big Bird's block {block} of {num_blocks} has {len(drawn)} blocks to choose from, "
                f"{num_random_blocks} are to be drawn.",
                "Use smaller blocks, fewer random ones, or give random_blocks.",
            )
        # One that is left stands for all that are asked for.
        yield np.broadcast_to(drawn, (num_random_blocks,))

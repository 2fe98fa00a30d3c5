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

PLANNED = (1024, 3072, 4096)
"""Lengths in tokens, rounded up to whole blocks, that the first rule is for."""

REACH = 1024
"""Under the first rule, random blocks lie within this many tokens from the beginning."""


def draw(length: int, size: int, count: int, heads: int, *, longest: int, seed: int) -> Tensor:
    """Return the blocks that each block of queries but the first and the last sees at random.

    Args:
        length: tokens of the text, a multiple of ``size``, more than ``(5 + 2 * count) * size``.
        size: tokens a block.
        count: random blocks that each block of queries sees.
        heads: each has a table of its own.
        longest: tokens of the longest text that the model is for; the first rule draws for that many.
        seed: of the whole table.

    Returns:
        (heads, blocks - 2, count) int64.

    Raises:
        MemtxError: the first rule leaves a block fewer to choose from than there are to be drawn.
    """
    # Its stream of numbers is fixed for good, and it is not the global one.
    generator = np.random.RandomState(seed)
    blocks = length // size
    if length in PLANNED:
        tables = [list(_planned(generator, longest // size, size, count)) for _ in range(heads)]
        return torch.from_numpy(np.array(tables, dtype=np.int64).reshape(heads, -1, count)[:, : blocks - 2])
    table = np.zeros((heads, blocks, count), dtype=np.int64)
    if count:
        # Drawn for the last block too, though it needs none: the stream of numbers goes on through it.
        for block in range(1, blocks):
            for head in range(heads):
                table[head, block] = _chosen(generator, block, 2 * count + 5, count)
    return torch.from_numpy(table[:, 1:-1])


def _chosen(generator: np.random.RandomState, block: int, among: int, count: int) -> np.ndarray:
    """Return ``count`` of the first ``among`` blocks that the block of queries does not see otherwise."""
    barred = {block - 1, block, block + 1, 0, among - 1}
    if block == 1:
        barred.add(among - 2)
    if block == among - 2:
        barred.add(1)
    order = generator.permutation(np.arange(among, dtype=np.int32))
    return np.array([each for each in order if each not in barred][:count])


def _planned(generator: np.random.RandomState, blocks: int, size: int, count: int) -> Iterator[np.ndarray]:
    """Yield the random blocks of every block of queries but the first and the last, by the first rule.

    Near the text's end it does not leave out the window, so a block may be drawn that is seen already.
    """
    middle = np.arange(1, blocks - 1, dtype=np.int32)
    last = REACH // size - 1 if 2 * size < REACH else blocks - 1
    for block in range(1, blocks - 1):
        start = block - 2
        if block <= 2:
            among = middle[block + 1 : last]
        elif block >= blocks - 3 or start > last:
            among = middle[:last]
        elif block + 1 == last:
            among = middle[:start]
        else:
            among = np.concatenate((middle[:start], middle[block + 1 : last]))
        drawn = generator.permutation(among)[:count]
        if len(drawn) not in (1, count):
            raise MemtxError(
                f"Big Bird's block {block} of {blocks} has {len(drawn)} blocks to choose from, "
                f"{count} are to be drawn.",
                "Use smaller blocks, fewer random ones, or give random_blocks.",
            )
        # One that is left stands for all that are asked for.
        yield np.broadcast_to(drawn, (count,))

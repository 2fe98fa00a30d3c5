"""Random damage to the bytes of a file."""

from __future__ import annotations

import random


def truncate(content: bytes, rng: random.Random) -> bytes:
    """Cut short, by at most 200 bytes every other time."""
    length = rng.randrange(len(content)) if rng.random() < 0.5 else len(content) - rng.randrange(1, 200)
    return content[: max(length, 0)]


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    """One bit flipped: in the first 2,000 bytes, in the last 200 or anywhere."""
    size = len(content)
    low, high = rng.choice(((0, min(size, 2000)), (max(0, size - 200), size), (0, size)))
    index = rng.randrange(low, high)
    return content[:index] + bytes([content[index] ^ 1 << rng.randrange(8)]) + content[index + 1 :]


def overwrite_with_noise(content: bytes, rng: random.Random) -> bytes:
    """Up to 5,000 bytes overwritten with random ones."""
    start, size = rng.randrange(len(content)), rng.randrange(1, 5000)
    return content[:start] + rng.randbytes(len(content[start : start + size])) + content[start + size :]


def append_bytes(content: bytes, rng: random.Random) -> bytes:
    """Random bytes appended."""
    return content + rng.randbytes(rng.randrange(1, 200))

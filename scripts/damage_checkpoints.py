"""Damages checkpoints of a real run in every way and looks for the newest whole one: each damage must be noticed.

    python scripts/damage_checkpoints.py [--count 1000] [--seed 0] [--run RUN] [--json FILE] [--markdown FILE]

Of a run's checkpoints, by default a small one trained here on the texts that come with Python, the newest is cut short,
emptied, filled up with zeros, changed by a bit or by a stretch of bytes, written over by another one's half, given
blocks in another order, made longer, robbed of its seal, or exchanged for another one. Noticed is what makes
`--ckpt_path last` go on from the one before, with the reason said. For comparison: how many of the same files
`torch.load` reads without a word. Ctrl-C ends it with what was found so far.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from kill_runs import config, ended, start
from measuring import deliver, headline, machine, positive, progress

from memtx import sealed
from memtx.training import recovery

Damage = Callable[[bytes, bytes, random.Random], bytes]


def cut(content: bytes, other: bytes, drawn: random.Random) -> bytes:
    """Cut short, by a few bytes every other time."""
    return content[: drawn.randrange(len(content)) if drawn.random() < 0.5 else -drawn.randrange(1, 200)]


def empty(content: bytes, other: bytes, drawn: random.Random) -> bytes:
    """Nothing left."""
    return b""


def zeros(content: bytes, other: bytes, drawn: random.Random) -> bytes:
    """As long as it was, zeros from some place on: what a file system may leave after a power cut."""
    place = drawn.randrange(len(content))
    return content[:place] + bytes(len(content) - place)


def bit(content: bytes, other: bytes, drawn: random.Random) -> bytes:
    """One bit flipped, every third time in the last 200 bytes."""
    changed = bytearray(content)
    place = drawn.randrange(len(content)) if drawn.random() < 0.67 else len(content) - drawn.randrange(1, 200)
    changed[place] ^= 1 << drawn.randrange(8)
    return bytes(changed)


def noise(content: bytes, other: bytes, drawn: random.Random) -> bytes:
    """Random bytes over a stretch."""
    start, size = drawn.randrange(len(content)), drawn.randrange(1, 5000)
    return content[:start] + drawn.randbytes(len(content[start : start + size])) + content[start + size :]


def halves(content: bytes, other: bytes, drawn: random.Random) -> bytes:
    """Begins as the new one and ends as the old one, or the other way round."""
    place = drawn.randrange(1, min(len(content), len(other)))
    one, two = (content, other) if drawn.random() < 0.5 else (other, content)
    return one[:place] + two[place:]


def blocks(content: bytes, other: bytes, drawn: random.Random) -> bytes:
    """Two blocks of 512 bytes in each other's place."""
    first, second = sorted(drawn.sample(range(len(content) // 512), 2))
    a, b = (content[512 * at : 512 * (at + 1)] for at in (first, second))
    between = content[512 * (first + 1) : 512 * second]
    return content[: 512 * first] + b + between + a + content[512 * (second + 1) :]


def longer(content: bytes, other: bytes, drawn: random.Random) -> bytes:
    """Bytes behind its end."""
    return content + drawn.randbytes(drawn.randrange(1, 200))


def unsealed(content: bytes, other: bytes, drawn: random.Random) -> bytes:
    """Without its seal and with a bit flipped: as a file of an earlier release that was damaged."""
    end = content.rindex(sealed.END)
    plain = bytearray(content[: end + 20] + b"\0\0")
    # In the numbers: between the zip's records there are bytes that nothing reads.
    with zipfile.ZipFile(io.BytesIO(plain)) as archive:
        most = max(archive.infolist(), key=lambda one: one.file_size)
    head = most.header_offset + 30
    names, extra = (int.from_bytes(plain[head - at : head - at + 2], "little") for at in (4, 2))
    place = head + names + extra + drawn.randrange(most.file_size)
    plain[place] ^= 1 << drawn.randrange(8)
    return bytes(plain)


def exchanged(content: bytes, other: bytes, drawn: random.Random) -> bytes:
    """Another step's checkpoint under its name."""
    return other


KINDS: tuple[Damage, ...] = (cut, empty, zeros, bit, noise, halves, blocks, longer, unsealed, exchanged)


def trained(at: Path) -> Path:
    """Train a small run and return its folder."""
    import yaml

    (at / "run.yaml").write_text(yaml.safe_dump(config(12, at / "cache", "in place")), encoding="utf-8")
    if code := ended(start(at, "run")):
        sys.exit(f"The run ended with {code}:\n{(at / 'run.log').read_text()}")
    return at / "run"


def damaged(content: bytes, other: bytes, kind: Damage, drawn: random.Random) -> bytes:
    """Return what differs from the content, as few draws do not."""
    while (made := kind(content, other, drawn)) == content:
        pass
    return made


def silent(path: Path) -> bool:
    """Return whether torch alone reads a file without noticing anything."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=positive, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="a run's folder with at least two checkpoints")
    parser.add_argument("--json", metavar="FILE", help="all counts; - for standard output, instead of the table")
    parser.add_argument("--markdown", metavar="FILE", help="the table")
    arguments = parser.parse_args()
    drawn, stopped = random.Random(arguments.seed), False
    made, noticed, unnoticed, wrong = Counter[str](), Counter[str](), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as name, progress() as bar:
        task = bar.add_task("damaged checkpoints", total=arguments.count)
        run = arguments.run or trained(Path(name))
        found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda one: sealed.stated_step(one) or 0)
        steps = {sealed.stated_step(one): one for one in found}
        if len(steps) < 2 or None in steps:
            sys.exit(f"'{run}' has {len(steps)} checkpoints with a seal of different steps, expected at least two.")
        older, newer = list(steps)[-2:]
        content, other = steps[newer].read_bytes(), steps[older].read_bytes()
        folder = Path(name) / "checkpoints"
        folder.mkdir()
        earlier, last = folder / f"earlier-{older:08d}.ckpt", folder / f"earlier-{newer:08d}.ckpt"
        earlier.write_bytes(other)
        try:
            for number in range(arguments.count):
                kind = KINDS[number % len(KINDS)]
                last.write_bytes(damaged(content, other, kind, drawn))
                made[kind.__name__] += 1
                unnoticed[kind.__name__] += silent(last)
                went = recovery.newest_whole(folder)
                good = went is not None and went.path == earlier and [path for path, _ in went.damaged] == [last]
                noticed[kind.__name__] += good
                if not good:
                    wrong.append(f"{kind.__name__}, number {number}: {went and (went.path, went.damaged)}")
                bar.advance(task)
        except KeyboardInterrupt:
            stopped = True
    where = machine(torch.device("cpu"))
    lines = [
        f"{headline(where)}; checkpoints of {len(content):,} bytes, seed {arguments.seed}"
        f"{', stopped early' if stopped else ''}",
        "",
        "| damage | checkpoints | noticed | read by torch.load without a word |",
        "|---|---|---|---|",
    ]
    for kind in KINDS:
        which = kind.__name__
        lines.append(f"| {which}: {kind.__doc__} | {made[which]} | {noticed[which]} | {unnoticed[which]} |")
    lines.append(f"| all | {made.total()} | {noticed.total()} | {unnoticed.total()} |")
    results = {"machine": where, "seed": arguments.seed, "made": made, "noticed": noticed, "by_torch": unnoticed}
    deliver(arguments, {**results, "wrong": wrong}, lines)
    for one in wrong[:10]:
        print(one, file=sys.stderr)
    return 0 if noticed == made else 1


if __name__ == "__main__":
    sys.exit(main())

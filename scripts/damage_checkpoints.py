"""Damages checkpoints of a real run in every way and looks for the newest whole one: each damage must be noticed.

    python scripts/damage_checkpoints.py [--count 1000] [--seed 0] [--run-dir RUN] [--json FILE] [--markdown FILE]

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
from kill_runs import make_config, start_run, wait_for_exit
from measuring import format_machine, machine_info, positive_int, progress_bar, write_results

from memtx.checkpoint import checksummed_zip, recovery

Damage = Callable[[bytes, bytes, random.Random], bytes]


def truncate(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Cut short, by a few bytes every other time."""
    return content[: rng.randrange(len(content)) if rng.random() < 0.5 else -rng.randrange(1, 200)]


def empty(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Nothing left."""
    return b""


def zero_tail(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """As long as it was, zeros from some place on: what a file system may leave after a power cut."""
    place = rng.randrange(len(content))
    return content[:place] + bytes(len(content) - place)


def flip_bit(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """One bit flipped, every third time in the last 200 bytes."""
    changed = bytearray(content)
    place = rng.randrange(len(content)) if rng.random() < 0.67 else len(content) - rng.randrange(1, 200)
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite_with_noise(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Random bytes over a stretch."""
    start, size = rng.randrange(len(content)), rng.randrange(1, 5000)
    return content[:start] + rng.randbytes(len(content[start : start + size])) + content[start + size :]


def splice(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Begins as the new one and ends as the old one, or the other way round."""
    place = rng.randrange(1, min(len(content), len(other)))
    one, two = (content, other) if rng.random() < 0.5 else (other, content)
    return one[:place] + two[place:]


def swap_blocks(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Two blocks of 512 bytes in each other's place."""
    first, second = sorted(rng.sample(range(len(content) // 512), 2))
    a, b = (content[512 * at : 512 * (at + 1)] for at in (first, second))
    between = content[512 * (first + 1) : 512 * second]
    return content[: 512 * first] + b + between + a + content[512 * (second + 1) :]


def append_bytes(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Bytes behind its end."""
    return content + rng.randbytes(rng.randrange(1, 200))


def strip_checksum(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Without its seal and with a bit flipped: as a file of an earlier release that was damaged."""
    end = content.rindex(checksummed_zip.END_OF_CENTRAL_DIRECTORY)
    plain = bytearray(content[: end + 20] + b"\0\0")
    # In the numbers: between the zip's records there are bytes that nothing reads.
    with zipfile.ZipFile(io.BytesIO(plain)) as archive:
        most = max(archive.infolist(), key=lambda one: one.file_size)
    head = most.header_offset + 30
    names, extra = (int.from_bytes(plain[head - at : head - at + 2], "little") for at in (4, 2))
    place = head + names + extra + rng.randrange(most.file_size)
    plain[place] ^= 1 << rng.randrange(8)
    return bytes(plain)


def replace_with_other(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Another step's checkpoint under its name."""
    return other


DAMAGES: tuple[Damage, ...] = (
    truncate,
    empty,
    zero_tail,
    flip_bit,
    overwrite_with_noise,
    splice,
    swap_blocks,
    append_bytes,
    strip_checksum,
    replace_with_other,
)


def train_run(folder: Path) -> Path:
    """Train a small run and return its folder."""
    import yaml

    (folder / "run.yaml").write_text(yaml.safe_dump(make_config(12, folder / "cache", "in place")), encoding="utf-8")
    if code := wait_for_exit(start_run(folder, "run")):
        sys.exit(f"The run ended with {code}:\n{(folder / 'run.log').read_text()}")
    return folder / "run"


def apply_damage(content: bytes, other: bytes, damage: Damage, rng: random.Random) -> bytes:
    """Return what differs from the content, as few draws do not."""
    while (made := damage(content, other, rng)) == content:
        pass
    return made


def torch_loads(path: Path) -> bool:
    """Return whether torch alone reads a file without noticing anything."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=positive_int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, help="a run's folder with at least two checkpoints")
    parser.add_argument("--json", metavar="FILE", help="all counts; - for standard output, instead of the table")
    parser.add_argument("--markdown", metavar="FILE", help="the table")
    arguments = parser.parse_args()
    drawn, stopped = random.Random(arguments.seed), False
    made, noticed, unnoticed, wrong = Counter[str](), Counter[str](), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as name, progress_bar() as bar:
        task = bar.add_task("damaged checkpoints", total=arguments.count)
        run = arguments.run_dir or train_run(Path(name))
        found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda one: checksummed_zip.read_step(one) or 0)
        steps = {checksummed_zip.read_step(one): one for one in found}
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
                kind = DAMAGES[number % len(DAMAGES)]
                last.write_bytes(apply_damage(content, other, kind, drawn))
                made[kind.__name__] += 1
                unnoticed[kind.__name__] += torch_loads(last)
                went = recovery.find_latest_valid(folder)
                good = went is not None and went.path == earlier and [path for path, _ in went.damaged] == [last]
                noticed[kind.__name__] += good
                if not good:
                    wrong.append(f"{kind.__name__}, number {number}: {went and (went.path, went.damaged)}")
                bar.advance(task)
        except KeyboardInterrupt:
            stopped = True
    where = machine_info(torch.device("cpu"))
    lines = [
        f"{format_machine(where)}; checkpoints of {len(content):,} bytes, seed {arguments.seed}"
        f"{', stopped early' if stopped else ''}",
        "",
        "| damage | checkpoints | noticed | read by torch.load without a word |",
        "|---|---|---|---|",
    ]
    for kind in DAMAGES:
        which = kind.__name__
        lines.append(f"| {which}: {kind.__doc__} | {made[which]} | {noticed[which]} | {unnoticed[which]} |")
    lines.append(f"| all | {made.total()} | {noticed.total()} | {unnoticed.total()} |")
    results = {
        "machine": where,
        "seed": arguments.seed,
        "damaged": made,
        "detected": noticed,
        "loaded_by_torch": unnoticed,
    }
    write_results(arguments, {**results, "failures": wrong}, lines)
    for one in wrong[:10]:
        print(one, file=sys.stderr)
    return 0 if noticed == made else 1


if __name__ == "__main__":
    sys.exit(main())

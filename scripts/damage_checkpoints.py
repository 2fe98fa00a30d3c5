"""Damage checkpoints in many ways and look for the newest valid one: all damage must be detected.

    python scripts/damage_checkpoints.py [--count 1000] [--seed 0] [--run-dir RUN] [--json FILE] [--markdown FILE]

The newest checkpoint of a run, by default of a small one trained here on the texts that come with Python, is truncated,
emptied, filled with zeros, changed by a bit or by noise, spliced with another one, reordered, extended, stripped of its
checksum, or replaced with another one. Damage is detected if `--ckpt_path last` would fall back to the previous
checkpoint and report the reason. For comparison, the files that `torch.load` reads without an error are counted. Ctrl-C
ends the script with the results so far.
"""

from __future__ import annotations

import argparse
import functools
import io
import random
import struct
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import corruption
import torch
import yaml
from benchmarking import add_output_options, add_size_options, format_machine, machine_info, progress_bar, write_results
from kill_runs import make_config, start_run, wait_for_exit

from memtx.checkpoint import checksummed_zip, recovery

Damage = Callable[[bytes, bytes, random.Random], bytes]


def ignore_other(damage: Callable[[bytes, random.Random], bytes]) -> Damage:
    """Return a damage function that ignores the other checkpoint."""

    @functools.wraps(damage)
    def apply(content: bytes, other: bytes, rng: random.Random) -> bytes:
        return damage(content, rng)

    return apply


def empty(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """No bytes left."""
    return b""


def zero_tail(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Same length, zeros from some byte on, as a file system may leave it after a power cut."""
    start = rng.randrange(len(content))
    return content[:start] + bytes(len(content) - start)


def splice(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Beginning of the new checkpoint and end of the old one, or the reverse."""
    border = rng.randrange(1, min(len(content), len(other)))
    first, second = (content, other) if rng.random() < 0.5 else (other, content)
    return first[:border] + second[border:]


def swap_blocks(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Two blocks of 512 bytes swapped."""
    first, second = (512 * index for index in sorted(rng.sample(range(len(content) // 512), 2)))
    blocks = content[second : second + 512], content[first + 512 : second], content[first : first + 512]
    return content[:first] + b"".join(blocks) + content[second + 512 :]


def strip_checksum(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Checksum removed and one bit flipped, like a damaged file of torch's own format."""
    end = content.rindex(checksummed_zip.END_OF_CENTRAL_DIRECTORY)
    plain = bytearray(content[: end + 20] + b"\0\0")
    # Within an entry: nothing reads the bytes between the zip's records.
    with zipfile.ZipFile(io.BytesIO(plain)) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    name_length, extra_length = struct.unpack_from("<HH", plain, largest.header_offset + 26)
    index = largest.header_offset + 30 + name_length + extra_length + rng.randrange(largest.file_size)
    plain[index] ^= 1 << rng.randrange(8)
    return bytes(plain)


def replace_with_other(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Checkpoint of another step under the same name."""
    return other


DAMAGES: tuple[Damage, ...] = (
    ignore_other(corruption.truncate), empty, zero_tail, ignore_other(corruption.flip_bit),
    ignore_other(corruption.overwrite_with_noise), splice, swap_blocks, ignore_other(corruption.append_bytes),
    strip_checksum, replace_with_other,
)  # fmt: skip


def train_run(folder: Path) -> Path:
    """Train a small run and return its folder."""
    (folder / "run.yaml").write_text(yaml.safe_dump(make_config(12, folder / "cache", "in place")), encoding="utf-8")
    if code := wait_for_exit(start_run(folder, "run")):
        sys.exit(f"The run exited with code {code}:\n{(folder / 'run.log').read_text()}")
    return folder / "run"


def apply_damage(content: bytes, other: bytes, damage: Damage, rng: random.Random) -> bytes:
    """Damage the content until it differs, which it nearly always does at the first try."""
    while (damaged := damage(content, other, rng)) == content:
        pass
    return damaged


def torch_loads(path: Path) -> bool:
    """Return True if torch.load reads a file without an error."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, count=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, help="folder of a run with at least two checkpoints")
    add_output_options(parser)
    arguments = parser.parse_args()
    rng, is_interrupted = random.Random(arguments.seed), False
    damaged, detected, loaded, failures = Counter[str](), Counter[str](), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as name, progress_bar() as bar:
        task = bar.add_task("damaged checkpoints", total=arguments.count)
        run = arguments.run_dir or train_run(Path(name))
        paths = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: checksummed_zip.read_step(path) or 0)
        by_step = {checksummed_zip.read_step(path): path for path in paths}
        if len(by_step) < 2 or None in by_step:
            sys.exit(f"'{run}' has {len(by_step)} checksummed checkpoints of different steps; at least two are needed.")
        older, newer = list(by_step)[-2:]
        content, other = by_step[newer].read_bytes(), by_step[older].read_bytes()
        folder = Path(name) / "checkpoints"
        folder.mkdir()
        earlier, last = folder / f"earlier-{older:08d}.ckpt", folder / f"earlier-{newer:08d}.ckpt"
        earlier.write_bytes(other)
        try:
            for index in range(arguments.count):
                damage = DAMAGES[index % len(DAMAGES)]
                kind = damage.__name__
                last.write_bytes(apply_damage(content, other, damage, rng))
                damaged[kind] += 1
                loaded[kind] += torch_loads(last)
                latest = recovery.find_latest_valid(folder)
                passed = (
                    latest is not None and latest.path == earlier and [path for path, _ in latest.damaged] == [last]
                )
                detected[kind] += passed
                if not passed:
                    failures.append(f"{kind}, number {index}: {latest and (latest.path, latest.damaged)}")
                bar.advance(task)
        except KeyboardInterrupt:
            is_interrupted = True
    machine = machine_info(torch.device("cpu"))
    lines = [
        f"{format_machine(machine)}; checkpoints of {len(content):,} bytes, seed {arguments.seed}"
        f"{', interrupted' if is_interrupted else ''}",
        "",
        "| damage | checkpoints | detected | read by torch.load without an error |",
        "|---|---|---|---|",
    ]
    for damage in DAMAGES:
        kind = damage.__name__
        lines.append(f"| {kind}: {damage.__doc__} | {damaged[kind]} | {detected[kind]} | {loaded[kind]} |")
    lines.append(f"| all | {damaged.total()} | {detected.total()} | {loaded.total()} |")
    counts = {"damaged": damaged, "detected": detected, "loaded_by_torch": loaded, "failures": failures}
    write_results(arguments, {"machine": machine, "seed": arguments.seed, **counts}, lines)
    for failure in failures[:10]:
        print(failure, file=sys.stderr)
    return 0 if detected == damaged else 1


if __name__ == "__main__":
    sys.exit(main())

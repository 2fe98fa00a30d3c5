"""Compare memories on BABILong: facts of bAbI in book text, trained with and without a curriculum of lengths.

    python scripts/compare_babilong.py [--memories NAME ...] [--curricula yes no] [--seconds 300]

Every row trains one small model for the same CPU seconds on one thread, on the answers alone: with a curriculum on 1,
2, 3, 5 and then 7 segments (Bulatov et al. 2023, section 4, train RMT so), or on 7 from the start. Then it writes
answers to questions of the test set, hidden in test books, scored as the benchmark does, at the trained length and
beyond. The training stories are new ones of the same world, as in bAbI's set of 10,000 questions, since small models
learn the 1,000 of the folder by heart.

Rows are saved in --output-dir as soon as they are measured, so the script can be interrupted and restarted; the table
shows all saved rows. Seconds are CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import benchmarking
import torch
from benchmarking import count_parameters
from memory_stacks import MemoryFactory

from memtx import files
from memtx.data.babilong import BabilongDataModule
from memtx.data.episodes import TEST, TRAINING
from memtx.data.tokenizers import BytePairTokenizer
from memtx.evaluation.babilong import evaluate_babilong
from memtx.layers.feed_forward import FeedForward
from memtx.memory.associative import AssociativeMemory
from memtx.memory.gated_delta_net import GatedDeltaNet
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.rmt import ARMTMemory, RMTMemory
from memtx.models.memory_transformer import MemoryTransformer

DEPTH = 3
CURRICULUM = {1: 0.4, 2: 0.6, 3: 0.75, 5: 0.88, 7: 1.0}
"""Segments of an episode -> share of the seconds at which the next number follows at the latest."""

LEARNED = 0.9
"""Probability of the answer, over the last 50 batches, from which the next number of segments follows."""

FACTORS = (1, 2, 10)
"""Lengths of the test, as multiples of the trained one."""


def build_stacks(segment_length: int) -> dict[str, list[list[MemoryFactory]]]:
    """Return the compared memories, one stack for all layers or one per layer."""
    window: MemoryFactory = partial(RecurrentMemory, window=segment_length)
    delta: MemoryFactory = partial(GatedDeltaNet, heads=2)
    associative: MemoryFactory = partial(AssociativeMemory, heads=4, decay_gate=None)
    return {
        "RMT": [[partial(RMTMemory, num_tokens=8, interval=segment_length)]],
        "ARMT": [[partial(ARMTMemory, num_tokens=8, interval=segment_length, key_dim=32)]],
        "gated delta net": [[delta], [delta], [window]],
        "associative": [[window, associative]],
        "window": [[window]],
    }


def write_stories(source: Path, folder: Path, num_stories: int, seed: int) -> None:
    """Write the test stories of qa1, and random training stories of five questions from the words of the given ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (test,) = source.glob("qa1_*_test.txt")
    (training,) = source.glob("qa1_*_train.txt")
    words = re.findall(r"^\d+ (\w+) (.+) (\w+)\.$", training.read_text(), re.MULTILINE)
    people, moves, rooms = (sorted(set(column)) for column in zip(*words, strict=True))
    generator, lines = random.Random(seed), []
    for _ in range(num_stories):
        room_of: dict[str, str] = {}
        for number in range(1, 16):
            if number % 3:
                person = generator.choice(people)
                room_of[person] = generator.choice([room for room in rooms if room != room_of.get(person)])
                lines.append(f"{number} {person} {generator.choice(moves)} {room_of[person]}.")
            else:
                person = generator.choice(sorted(room_of))
                lines.append(f"{number} Where is {person}? \t{room_of[person]}\t1")
    files.write_text(folder / training.name, "\n".join(lines) + "\n")
    files.write_text(folder / test.name, test.read_text())


def train(
    model: MemoryTransformer,
    data: BabilongDataModule,
    curriculum: dict[int, float],
    arguments: argparse.Namespace,
    seed: int,
) -> dict[str, Any]:
    """Train a model for ``--seconds`` and leave it in eval mode; returns its steps and training accuracy by length."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    recent: deque[float] = deque(maxlen=50)
    probability: dict[int, float] = {}
    stages = list(curriculum)
    start, step, seconds = time.process_time(), 0, 0.0
    while seconds < arguments.seconds:
        share, num_segments = seconds / arguments.seconds, stages[0]
        is_learned = len(recent) == recent.maxlen and probability[num_segments] > LEARNED
        if len(stages) > 1 and (is_learned or share > curriculum[num_segments]):
            del stages[0]
            num_segments = stages[0]
            recent.clear()
        # As many tokens in a batch of every length, down to a minimum of episodes.
        batch_size = max(arguments.batch_size // num_segments, arguments.batch_size // 4)
        batch = data.sample_batch(batch_size, num_segments, (seed, TRAINING, 0, step))
        # Warm-up, then a decay to a tenth.
        scale = min(1.0, (step + 1) / 100) * (1.0 - 0.9 * max(0.0, share - 0.8) / 0.2)
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * scale
        output = model(batch.tokens, document_starts=batch.document_starts, labels=batch.labels)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seconds = step + 1, time.process_time() - start
        # The likelihood of whole answers, the geometric mean over the batch, is cheaper than accuracy.
        recent.append(float((-output.nll.sum(1)).exp().mean()))
        probability[num_segments] = sum(recent) / len(recent)
        if step % 100 == 0:
            progress = f"{seconds:6.0f} s, step {step}, {num_segments} segments: {probability[num_segments]:.3f}"
            print(progress, file=sys.stderr)
    model.eval()
    return {"steps": step, "train_seconds": seconds, "answer_probability": probability}


def run_row(memory: str, with_curriculum: bool, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and test a memory; returns its figures."""
    num_segments = max(CURRICULUM)
    curriculum = CURRICULUM if with_curriculum else {num_segments: 1.0}
    length = arguments.segment_length
    stories_dir = arguments.output_dir / f"stories-{seed}"
    write_stories(arguments.babi_dir, stories_dir, arguments.num_stories, seed)
    data = BabilongDataModule(
        str(stories_dir), str(arguments.root), tokenizer=BytePairTokenizer(arguments.vocab_size),
        segment_length=length, seed=seed, max_trailing=length // 2,
    )  # fmt: skip
    data.prepare_data()
    torch.manual_seed(seed)
    model = MemoryTransformer(
        data.vocab_size, arguments.dim, DEPTH, 4, memories=build_stacks(length)[memory], feed_forward=FeedForward
    )
    figures = train(model, data, curriculum, arguments, seed)
    tokenizer, stories = data.tokenizer, data._stories[TEST]
    reserved = max(len(story.question) + len(story.answer) for story in data._get_stories(TEST))
    reserved += len(tokenizer.bos_token_ids)
    contexts = [factor * num_segments * length - reserved for factor in FACTORS]
    start = time.process_time()
    with torch.no_grad():
        results = evaluate_babilong(
            model, tokenizer, data._get_haystack(TEST), {1: stories}, contexts, num_samples=arguments.num_samples,
            seed=seed, segment_length=length,
        )  # fmt: skip
    return {
        **figures,
        "test_seconds": time.process_time() - start,
        "parameters": count_parameters(model),
        "chance": results[0].chance,
        "accuracy": {factor: result.accuracy for factor, result in zip(FACTORS, results, strict=True)},
    }


def format_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Format the rows: accuracy at every length, by memory and curriculum."""
    lines = [
        f"| memory | curriculum | {' | '.join(f'{factor} x' for factor in FACTORS)} | chance | steps | seed |",
        "|---" * (len(FACTORS) + 5) + "|",
    ]
    for key, row in rows.items():
        memory, curriculum, seed = key.split("/")
        accuracy = " | ".join(f"{row['accuracy'][str(factor)]:.2f}" for factor in FACTORS)
        lines.append(f"| {memory} | {curriculum} | {accuracy} | {row['chance']:.2f} | {row['steps']:,} | {seed} |")
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(build_stacks(1))
    benchmarking.add_data_option(parser, "--babi-dir", "babi", text="folder of the bAbI tasks")
    benchmarking.add_data_option(parser, "--root", "pg19-mini", text="folder of the books")
    benchmarking.add_output_options(parser)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare-babilong"), help="folder of the rows")
    parser.add_argument("--memories", nargs="+", choices=names, default=names[:3], metavar="NAME")
    parser.add_argument("--curricula", nargs="+", choices=["yes", "no"], default=["yes", "no"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    benchmarking.add_size_options(
        parser,
        seconds=300,
        segment_length=64,
        batch_size=64,
        dim=64,
        vocab_size=1024,
        num_samples=100,
        num_stories=2000,
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "rows.json"
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for seed in arguments.seeds:
        for memory in arguments.memories:
            for curriculum in arguments.curricula:
                key = f"{memory}/{curriculum}/{seed}"
                if key not in rows:
                    print(key, file=sys.stderr)
                    row = run_row(memory, curriculum == "yes", seed, arguments)
                    rows[key] = json.loads(json.dumps(row))  # as a restarted script would read them
                    files.write_json(path, rows)
    machine = benchmarking.machine_info(torch.device("cpu"))
    lines = [f"{benchmarking.format_machine(machine)}.", "", *format_table(rows)]
    benchmarking.write_results(arguments, {"rows": rows, "machine": machine}, lines)


if __name__ == "__main__":
    main()

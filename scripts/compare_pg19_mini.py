"""Memory against none on real books: validation bits per byte, three seeds, equal parameters, equal steps.

    python scripts/compare_pg19_mini.py --root PATH/pg19-mini [--output-dir runs/compare] [--steps N] [--num-parallel N]

Trains configs/pg19-mini.yaml (compressed memory, mean pooling), the same with an exact cache of as many entries alone,
with nothing carried between segments, and with a convolution that compresses, whose parameters are taken from the
feed-forward part. Runs that are finished are not run again, so that the script can be stopped and started. Writes
results.json, table.md and comparison.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from learning import last_value, run_fit

CONFIG = "configs/pg19-mini.yaml"
MODEL = "--model.model.init_args"
MEMORY = f"{MODEL}.memories"
CONVOLUTION = (
    '{"class_path":"memtx.CompressedMemory","init_args":{"window":64,"compression_rate":4,"num_entries":32,'
    '"compression":"memtx.memory.compression.StridedConvolution"}}'
)
VARIANTS: dict[str, list[str]] = {
    "compressed memory": [],
    "exact cache alone": [f'{MEMORY}=[{{"class_path":"memtx.RecurrentMemory","init_args":{{"window":100}}}}]'],
    "nothing carried": [f'{MEMORY}=[{{"class_path":"memtx.NoMemory"}}]'],
    # 768 - 256: three maps of 192 x 256 weights less, one of (4 x 192) x 192 more.
    "compressed by a convolution": [f"{MEMORY}=[{CONVOLUTION}]", f"{MODEL}.feed_forward.init_args.hidden_dim=512"],
}


def train_variant(variant: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Train one run, if it is not there yet, and return its figures."""
    run = arguments.output_dir / f"{variant.replace(' ', '-')}-{seed}"
    done = run / "figures.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    began = time.time()
    settings = list(VARIANTS[variant])
    if arguments.steps:
        settings += ["--trainer.max_steps", str(arguments.steps), "--trainer.val_check_interval", str(arguments.steps)]
    # One thread a run wastes nothing on waiting for the other; together they use the cores.
    threads = max(1, (os.cpu_count() or 1) // arguments.num_parallel)
    rows = run_fit(run, CONFIG, arguments.root, seed, settings, threads)
    figures = {
        "bits_per_byte": last_value(rows, "val_bits_per_byte"),
        "word_perplexity": last_value(rows, "val_word_perplexity"),
        "tokens_per_second": statistics.median(
            float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")
        ),
        "minutes": (time.time() - began) / 60,
    }
    done.write_text(json.dumps(figures, indent=2))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the folder of books")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="instead of the config's")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--num-parallel", type=int, default=1, help="runs at a time, the cores shared between them")
    arguments = parser.parse_args()
    results: dict[str, dict[int, dict[str, float]]] = {variant: {} for variant in arguments.variants}
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.num_parallel) as pool:
        jobs = {
            (variant, seed): pool.submit(train_variant, variant, seed, arguments)
            for seed in arguments.seeds  # seed by seed, so that a stopped comparison has whole seeds
            for variant in arguments.variants
        }
        for (variant, seed), job in jobs.items():
            results[variant][seed] = job.result()
            print(variant, seed, results[variant][seed], flush=True)
    # Seeds differ in the books they read, far more than memories do: only differences within a seed say anything.
    base = results["nothing carried"]
    table = ["| memory | " + " | ".join(f"seed {seed}" for seed in arguments.seeds)]
    table[0] += " | mean | against nothing carried, by seed |"
    table.append("|---" * (len(arguments.seeds) + 3) + "|")
    gains: dict[str, list[float]] = {}
    for variant, by_seed in results.items():
        scores = [figures["bits_per_byte"] for figures in by_seed.values()]
        gains[variant] = [figures["bits_per_byte"] - base[seed]["bits_per_byte"] for seed, figures in by_seed.items()]
        cells = " | ".join(f"{score:.4f}" for score in scores)
        paired = ", ".join(f"{gain:+.4f}" for gain in gains[variant])
        table.append(f"| {variant} | {cells} | {statistics.mean(scores):.4f} | {paired} |")
    (arguments.output_dir / "table.md").write_text("\n".join(table) + "\n")
    (arguments.output_dir / "results.json").write_text(
        json.dumps({"machine": platform.platform(), **results}, indent=2)
    )
    print("\n".join(table))

    from memtx import plots

    plots.plot_seed_comparison(
        arguments.output_dir / "comparison.png",
        {variant: gain for variant, gain in gains.items() if variant != "nothing carried"},
        unit="bits per byte against nothing carried",
        title="What memory gains on pg19-mini's validation books, seed by seed",
    )


if __name__ == "__main__":
    main()

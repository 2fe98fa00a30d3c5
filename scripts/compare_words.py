"""Compare word-level Transformer-XL with x-transformers on WikiText-2 at equal CPU seconds and about 10 M parameters.

    python scripts/compare_words.py [--root PATH/wikitext-2] [--systems NAME ...] [--seeds 0] [--cpu-seconds 3600]
        [--num-parallel 2] [--markdown FILE]

PATH holds valid.txt and test.txt. The training text of WikiText-2 is not part of it, so all learn from test.txt and the
first 80% of valid.txt and are tested on its rest: figures compare only with figures of this script. All see the same
batches in the same order (16 streams, 128 tokens a step), with Adam, a warm-up, a cosine over the seconds, gradients
clipped at 0.25, bfloat16 autocast, and one thread. Perplexity is that of Transformer-XL's protocol: per word with line
ends, the text read once, one stream, the memory carried; also with a memory of four segments, and equally many visible
positions for every word. It is measured --num-readings times, not counted as time; the best one is reported, too.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import benchmarking
import torch
from book_tables import format_table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from memtx import files
from memtx.data.books import BookDataModule
from memtx.data.tokenizers import WordTokenizer
from memtx.models.memory_length import set_memory_length
from memtx.models.transformer_xl import TransformerXL
from memtx.ops.cpu.malloc import retain_freed_memory

DIM, DEPTH, HEADS, HIDDEN_DIM = 256, 6, 4, 1024
SEGMENT_LENGTH = 128
DROPOUT, LEARNING_RATE = 0.3, 1e-3
TRAINING_FRACTION = 0.8
LONG_MEMORY = 4 * SEGMENT_LENGTH
AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16)


def build_memtx(vocab_size: int) -> tuple[nn.Module, Any]:
    """Build Transformer-XL with a softmax over all words."""
    model = TransformerXL(
        vocab_size, DIM, DEPTH, HEADS, hidden_dim=HIDDEN_DIM, memory_length=SEGMENT_LENGTH, share_biases=True,
        dropout=DROPOUT,
    )  # fmt: skip

    def read(tokens: Tensor, labels: Tensor, state: Any) -> tuple[Tensor, Any]:
        output = model(tokens, state, labels=labels)
        assert output.loss is not None
        return output.loss, output.state

    return model, read


def build_x_transformers(vocab_size: int) -> tuple[nn.Module, Any]:
    """Build x-transformers' decoder with Transformer-XL's cache, rotary positions and tied embeddings."""
    library: Any = importlib.import_module("x_transformers")
    layers = library.Decoder(
        dim=DIM, depth=DEPTH, heads=HEADS, attn_dim_head=DIM // HEADS, rotary_pos_emb=True, attn_dropout=DROPOUT,
        ff_dropout=DROPOUT, verbose=False,
    )  # fmt: skip
    model = library.TransformerWrapper(
        num_tokens=vocab_size, max_seq_len=SEGMENT_LENGTH, max_mem_len=SEGMENT_LENGTH, attn_layers=layers,
        use_abs_pos_emb=False, tie_embedding=True, emb_dropout=DROPOUT,
    )  # fmt: skip

    def read(tokens: Tensor, labels: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = model(tokens, mems=state, return_mems=True)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()), state

    return model, read


SYSTEMS = {"memtx": build_memtx, "x-transformers": build_x_transformers}


def set_memory(model: nn.Module, length: int, *, same_length: bool) -> None:
    """Let a model carry ``length`` positions."""
    if isinstance(model, TransformerXL):
        set_memory_length(model, length, clamp_length=SEGMENT_LENGTH if same_length else 0, same_length=same_length)
    else:
        model.max_mem_len = length  # type: ignore[assignment]


@torch.inference_mode()
def measure_perplexity(model: nn.Module, read: Any, tokens: Tensor, length: int, *, same_length: bool) -> float:
    """Return the perplexity of tokens ``(1, n)`` with a memory of ``length`` positions."""
    model.eval()
    set_memory(model, length, same_length=same_length)
    total, state = 0.0, None
    for start in range(0, tokens.shape[1] - 1, SEGMENT_LENGTH):
        part = tokens[:, start : start + SEGMENT_LENGTH + 1]
        loss, state = read(part[:, :-1], part[:, 1:], state)
        total += loss.item() * (part.shape[1] - 1)
    set_memory(model, SEGMENT_LENGTH, same_length=False)
    model.train()
    return math.exp(total / (tokens.shape[1] - 1))


def measure(name: str, seed: int, root: Path, cpu_seconds: float, num_readings: int) -> dict[str, Any]:
    """Train a system for the given time and return its perplexities."""
    torch.set_num_threads(1)
    retain_freed_memory(include_large_blocks=True)
    with tempfile.TemporaryDirectory() as folder:
        lines = (root / "valid.txt").read_text().splitlines(keepends=True)
        end = round(TRAINING_FRACTION * len(lines))
        (Path(folder) / "train").mkdir()
        text = (root / "test.txt").read_text() + "".join(lines[:end])
        (Path(folder) / "train" / "wiki.txt").write_text(text)
        data = BookDataModule(
            folder,
            WordTokenizer(),
            batch_size=16,
            segment_length=SEGMENT_LENGTH,
            seed=seed,
            cache_dir=f"{folder}/cache",
        )
        vocab_size = data.vocab_size
        tokens = torch.from_numpy(data.tokenizer.encode("".join(lines[end:])))[None]
        torch.manual_seed(seed)
        model, read = SYSTEMS[name](vocab_size)
        optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        state, seconds = None, 0.0
        losses: list[float] = []
        readings: list[dict[str, float]] = []
        batches = itertools.chain.from_iterable(itertools.starmap(data.train_dataloader, itertools.repeat(())))
        for step, batch in enumerate(batches, 1):
            progress = min(1.0, seconds / cpu_seconds)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, step / 100) * (1 + math.cos(math.pi * progress)) / 2
            start = time.process_time()
            with AUTOCAST():
                loss, state = read(batch.tokens, batch.labels, state)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            state = pytree.tree_map_only(Tensor, Tensor.detach, state)
            seconds += time.process_time() - start
            losses.append(loss.item())
            if seconds >= cpu_seconds * (len(readings) + 1) / num_readings:
                trained = measure_perplexity(model, read, tokens, SEGMENT_LENGTH, same_length=False)
                longer = measure_perplexity(model, read, tokens, LONG_MEMORY, same_length=True)
                mean_loss = sum(losses[-50:]) / len(losses[-50:])
                readings.append({"step": step, "training_loss": mean_loss, "perplexity": trained, "longer": longer})
            if len(readings) == num_readings:
                break
    parameters = benchmarking.count_parameters(model)
    return {"system": name, "seed": seed, "vocab_size": vocab_size, "parameters": parameters, "readings": readings}


def format_results(runs: list[dict[str, Any]], cpu_seconds: float) -> list[str]:
    """Format the results as Markdown."""
    columns = ["system", "seed", "parameters", "steps", "training loss", "perplexity", "memory x 4", "best"]
    cells = []
    for run in runs:
        last, best = run["readings"][-1], min(min(part["perplexity"], part["longer"]) for part in run["readings"])
        figures = [f"{last[name]:.2f}" for name in ("training_loss", "perplexity", "longer")]
        cells.append(
            [run["system"], str(run["seed"]), f"{run['parameters']:,}", str(last["step"]), *figures, f"{best:.2f}"]
        )
    return [f"After {cpu_seconds:g} CPU seconds:", "", *format_table(columns, cells)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarking.add_output_options(parser)
    benchmarking.add_data_option(parser, "--root", "wikitext-2", text="valid.txt and test.txt of WikiText-2")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare-words"), help="folder of the results")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--cpu-seconds", type=float, default=3600.0)
    benchmarking.add_size_options(parser, num_parallel=2, num_readings=8)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    jobs = list(itertools.product(arguments.seeds, arguments.systems))
    runs = []
    with ProcessPoolExecutor(arguments.num_parallel) as pool:
        futures = {
            (seed, name): pool.submit(
                measure, name, seed, arguments.root, arguments.cpu_seconds, arguments.num_readings
            )
            for seed, name in jobs
        }
        for (seed, name), future in futures.items():
            runs.append(future.result())
            path = arguments.output_dir / f"{name}-{seed}-{arguments.cpu_seconds:g}.json"
            files.write_text(path, json.dumps(runs[-1]))
    machine = benchmarking.machine_info(torch.device("cpu"))
    lines = [benchmarking.format_machine(machine), "", *format_results(runs, arguments.cpu_seconds)]
    benchmarking.write_results(arguments, {"runs": runs, "machine": machine}, lines)


if __name__ == "__main__":
    main()

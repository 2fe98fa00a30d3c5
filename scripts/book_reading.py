"""Readings of a trained run: nats of every token of the validation books, with and without the model's sources."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from benchmarking import count_parameters
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from training_runs import read_metrics

from memtx import files
from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.checkpoint.pretrained import read_metadata
from memtx.data.batch import IGNORE_INDEX
from memtx.data.tokenizers import Tokenizer
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.sources import list_sources, without_source

NUM_BYTES = 120_000
"""Bytes read of every book."""
WINDOW = 64
POSITIONS = (0, 512, 2048, 8192)
"""First positions of the ranges that are told apart."""
KINDS = ("near", "seen", "new")
CELLS = (len(POSITIONS), len(KINDS), len(KINDS))
"""Classes of tokens: range of positions, kind of the pair with the previous token, kind of the token alone."""
TRAINED, WINDOWS_ALONE = "trained", "windows alone"

FloatArray = NDArray[np.float32]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Book:
    """The beginning of a book.

    Attributes:
        name: Stem of its file.
        tokens: Tokens, after the begin token, ``(length + 1,)`` int64.
        num_bytes: Bytes of the text.
        cells: Class of every token but the first, an index in the flat ``CELLS``, ``(length,)``.
    """

    name: str
    tokens: Tensor
    num_bytes: int
    cells: NDArray[np.int64]


def classify(tokens: Sequence[Any]) -> NDArray[np.int64]:
    """Return the kind of every token but the first, an index in ``KINDS``.

    A token is near if it occurred before among the last ``WINDOW`` tokens, seen if it occurred earlier, and else new.
    """
    last_position, kinds = {tokens[0]: 0}, np.full(len(tokens) - 1, KINDS.index("new"))
    for position in range(1, len(tokens)):
        if (earlier := last_position.get(tokens[position])) is not None:
            kinds[position - 1] = KINDS.index("near" if position - earlier < WINDOW else "seen")
        last_position[tokens[position]] = position
    return kinds


def load_books(root: Path, tokenizer: Tokenizer) -> list[Book]:
    """Return the beginnings of the validation books."""
    books = []
    for path in sorted((root / "validation").glob("*.txt")):
        text = path.read_bytes()[:NUM_BYTES].decode("utf-8", "ignore")
        tokens = [*tokenizer.bos_token_ids, *map(int, tokenizer.encode(text))]
        ranges = np.searchsorted(POSITIONS, np.arange(len(tokens) - 1), side="right") - 1
        pairs = classify([*zip([-1, *tokens[:-1]], tokens, strict=True)])
        cells = np.ravel_multi_index((ranges, pairs, classify(tokens)), CELLS)
        books.append(Book(path.stem, torch.tensor(tokens), len(text.encode()), cells))
    return books


@torch.no_grad()
def read_side_by_side(
    read: Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]], books: Sequence[Book], length: int
) -> list[FloatArray]:
    """Return the nats of every token but the first of each book, read side by side with the state carried.

    ``read`` maps tokens and labels, ``(books, length)`` each, and the state, None at first, to the nats of every label
    and the next state.
    """
    tokens, labels = (pad_sequence([book.tokens for book in books], True, pad) for pad in (0, IGNORE_INDEX))
    state, nats = None, []
    for start in range(0, tokens.shape[1] - 1, length):
        stop = min(start + length, tokens.shape[1] - 1)
        values, state = read(tokens[:, start:stop], labels[:, start + 1 : stop + 1], state)
        nats.append(values)
    streams = torch.cat(nats, dim=1).numpy()
    return [stream[: len(book.cells)] for stream, book in zip(streams, books, strict=True)]


def read_books(model: MemoryTransformer, books: Sequence[Book], length: int = 256) -> list[FloatArray]:
    """Return the nats of every token but the first of each book, as a model reads them."""

    def read(tokens: Tensor, labels: Tensor, state: Any) -> tuple[Tensor, Any]:
        output = model(tokens, state, labels=labels)
        assert output.nll is not None
        return output.nll, output.state

    return read_side_by_side(read, books, length)


def sum_cells(book: Book, values: FloatArray | None = None) -> list[float]:
    """Return the sums of values per token, or the numbers of tokens, by class."""
    sums: list[float] = np.bincount(book.cells, values, math.prod(CELLS)).tolist()
    return sums


def _without(model: MemoryTransformer, *sources: str) -> MemoryTransformer:
    for source in sources:
        model = without_source(model, source)
    return model


def _with_entries(model: MemoryTransformer, num_entries: int) -> MemoryTransformer:
    changed = copy.deepcopy(model)
    cast(Any, changed).output_memory.num_entries = num_entries
    return changed


def _average_weights(paths: Sequence[Path]) -> MemoryTransformer:
    models = [load_model_and_tokenizer(path)[0] for path in paths]
    states = [model.state_dict() for model in models]
    mean = {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}
    models[-1].load_state_dict(mean)
    return models[-1]


def list_readings(
    model: MemoryTransformer, checkpoints: dict[int, Path], curve: Sequence[int], entries: Sequence[int]
) -> dict[str, Callable[[], MemoryTransformer]]:
    """Return the readings of a run by name.

    These are the trained model; its checkpoints of the steps in ``curve``; the mean of the weights over the last fifth
    of the steps; the trained model without each source and without all; and with fewer entries in its copy memory,
    which has the last number of ``entries``.
    """
    steps, sources = max(checkpoints), list_sources(model)
    readings: dict[str, Callable[[], MemoryTransformer]] = {TRAINED: lambda: model}
    readings |= {f"without {source}": partial(_without, model, source) for source in sources}
    if len(sources) > 1:
        readings[WINDOWS_ALONE] = partial(_without, model, *sources)
    if "copy" in sources:
        readings |= {f"copy {size}": partial(_with_entries, model, size) for size in entries[:-1]}
    for step in curve:
        if step in checkpoints:
            readings[f"step {step}"] = lambda path=checkpoints[step]: load_model_and_tokenizer(path)[0]  # type: ignore[misc]
    last = [path for step, path in sorted(checkpoints.items()) if step >= 0.8 * steps]
    if len(last) > 1:
        readings["averaged"] = partial(_average_weights, last)
    return readings


def read_run(folder: Path, root: Path, curve: Sequence[int], entries: Sequence[int]) -> Figures:
    """Read the books with a finished run as often as needed, and return its figures, which are saved beside it.

    Only what the saved figures lack is read. Checkpoints but the last are removed in the end.
    """
    path = folder.with_suffix(".json")
    last = folder / "checkpoints" / "last.ckpt"
    checkpoints = {int(file.stem.partition("-")[2]): file for file in last.parent.glob("earlier-*.ckpt")}
    checkpoints[int(read_metadata(last)["global_step"])] = last
    model, tokenizer = load_model_and_tokenizer(last)
    books = load_books(root, tokenizer)
    rows = [row for row in read_metrics(folder) if row["cpu_seconds"]]
    figures: Figures = {
        "steps": max(checkpoints),
        "parameters": count_parameters(model),
        "state_bytes": model.init_state(1).nbytes,
        "seconds": {int(row["step"]) + 1: float(row["cpu_seconds"]) for row in rows},
        "books": [book.name for book in books],
        "bytes": [book.num_bytes for book in books],
        "tokens": [sum_cells(book) for book in books],
        "readings": json.loads(path.read_text())["readings"] if path.exists() else {},
    }
    for name, load in list_readings(model, checkpoints, curve, entries).items():
        if name not in figures["readings"]:
            nats = read_books(load(), books)
            figures["readings"][name] = [sum_cells(book, values) for book, values in zip(books, nats, strict=True)]
            with files.atomic_open(folder / f"{name.replace(' ', '-')}.npz") as handle:
                cast(Any, np.savez_compressed)(handle, **dict(zip(figures["books"], nats, strict=True)))
            files.write_text(path, json.dumps(figures))
    files.write_text(path, json.dumps({**figures, "complete": True}))
    for file in last.parent.glob("earlier-*.ckpt"):
        file.unlink()
    return figures

"""Models of equal size for the comparisons on vectors: a memory, the window alone, and a GRU."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memtx import files
from memtx.layers.feed_forward import FeedForward
from memtx.memory.associative import AssociativeMemory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.recurrent_lm import MemoryOutput
from memtx.models.sequence_model import SequenceModel
from memtx.plots import plot_seed_comparison
from memtx.state import MemoryState

DIM, DEPTH, HEADS = 48, 2, 2

MEMORIES: dict[str, Callable[[int], Any]] = {
    "compressed memory": lambda window: partial(CompressedMemory, window=window, compression_rate=2, num_entries=32),
    "associative memory": lambda window: [
        partial(RecurrentMemory, window=window),
        partial(AssociativeMemory, heads=2, decay_gate=None),
    ],
    "window": lambda window: partial(RecurrentMemory, window=window),
}


class GRUBackbone(nn.Module):
    """A stack of GRU layers (Cho et al. 2014) with the interface of a memory transformer's layers.

    Args:
        vocab_size: Without effect.
        dim: Width of the inputs and the hidden states.
        depth: Number of layers.
    """

    supports_padding = False

    def __init__(self, vocab_size: int, dim: int = DIM, depth: int = DEPTH) -> None:
        super().__init__()
        self.dim, self.depth = dim, depth
        self.gru = nn.GRU(dim, dim, depth, batch_first=True)

    def init_state(self, batch_size: int, *, dtype: Any = None, device: Any = None) -> MemoryState:
        """Return the state of fresh streams."""
        weight = next(self.gru.parameters())
        shape = batch_size, self.depth, self.dim
        hidden = torch.zeros(shape, dtype=dtype or weight.dtype, device=device or weight.device)
        return MemoryState(torch.zeros(batch_size, dtype=torch.int64, device=hidden.device), ((hidden,),))

    def forward(
        self,
        tokens: None,
        state: MemoryState | None = None,
        *,
        inputs_embeds: Tensor,
        document_starts: Tensor | None = None,
        valid_length: None = None,
        return_hidden_states: bool = False,
    ) -> MemoryOutput:
        """Read one segment; a stream is reset where a document begins."""
        batch_size, length, _ = inputs_embeds.shape
        state = self.init_state(batch_size) if state is None else state
        hidden, position = state.layers[0][0].transpose(0, 1).contiguous(), state.position
        columns = [] if document_starts is None else document_starts.any(0).nonzero().flatten().tolist()
        outputs = []
        for start, stop in itertools.pairwise(sorted({0, *columns, length})):
            if document_starts is not None:
                begins = document_starts[:, start]
                hidden, position = hidden.masked_fill(begins[None, :, None], 0.0), position.masked_fill(begins, 0)
            output, hidden = self.gru(inputs_embeds[:, start:stop], hidden)
            position = position + (stop - start)
            outputs.append(output)
        next_state = MemoryState(position, ((hidden.transpose(0, 1),),))
        return MemoryOutput(torch.cat(outputs, dim=1), None, next_state, None, None, None, {})


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def build_models(
    names: Sequence[str], make: Callable[[Callable[[int], nn.Module]], SequenceModel], window: int
) -> dict[str, Callable[[], SequenceModel]]:
    """Return the factory of each model; feed-forward parts and the GRU are as wide as the first model's size allows.

    Args:
        names: Names in ``MEMORIES``, or "GRU"; the first is the model whose size the others take.
        make: Builds a model around a backbone.
        window: Exact steps of each layer.
    """

    def transformer(name: str, hidden_dim: int) -> Callable[[int], nn.Module]:
        return partial(
            MemoryTransformer, dim=DIM, depth=DEPTH, heads=HEADS, memories=[MEMORIES[name](window)],
            feed_forward=partial(FeedForward, hidden_dim=hidden_dim),
        )  # fmt: skip

    size = count_parameters(make(transformer(names[0], 2 * DIM)))

    def closest(backbones: Sequence[Callable[[int], nn.Module]]) -> Callable[[int], nn.Module]:
        return min(backbones, key=lambda backbone: abs(count_parameters(make(backbone)) - size))

    backbones = {}
    for name in names:
        candidates = [transformer(name, width) for width in range(DIM, 6 * DIM, 4)] if name in MEMORIES else []
        backbones[name] = closest(candidates or [partial(GRUBackbone, dim=dim) for dim in range(16, 160, 2)])
    return {name: partial(make, backbone) for name, backbone in backbones.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a comparison."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)


def compare(
    arguments: argparse.Namespace,
    cases: Iterable[str],
    models: Mapping[str, Callable[[], nn.Module]],
    train: Callable[[str, Callable[[], Any], int], tuple[float, float]],
    *,
    names: tuple[str, str, str],
    keys: tuple[str, str, str],
    **plot_options: Any,
) -> None:
    """Train every model in every case with every seed, and write table, figures and plot.

    Args:
        arguments: Options of :func:`add_options`.
        cases: Names of the cases.
        models: Makers of the models by name.
        train: Returns the figure and the CPU seconds of a run from case, maker and seed.
        names: Headings of case, model and figure in the table.
        keys: Their keys in the JSON file.
        **plot_options: Options of :func:`memtx.plots.plot_seed_comparison`.
    """
    case_name, model_name, figure_name = names
    header = f"| {case_name} | {model_name} | parameters | {figure_name} | by seed | CPU s |"
    table, results, curves = [header, "|---|---|---|---|---|---|"], [], {}
    for case in cases:
        for model, make in models.items():
            values, seconds = zip(*(train(case, make, seed) for seed in range(arguments.seeds)), strict=True)
            results.append({**dict(zip(keys, (case, model, values), strict=True)), "seconds": seconds})
            curves[f"{case}: {model}"] = values
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            by_seed = ", ".join(f"{value:.3f}" for value in values)
            cells = (case, model, f"{count_parameters(make()):,}", f"{statistics.mean(values):.3f} ± {spread:.3f}")
            table.append(f"| {' | '.join((*cells, by_seed, f'{statistics.mean(seconds):.0f}'))} |")
            print(table[-1], flush=True)
            if arguments.json:
                files.write_json(arguments.json, json.loads(json.dumps(results)))
    if arguments.markdown:
        files.write_text(arguments.markdown, "\n".join([*table, ""]))
    if arguments.plot:
        plot_seed_comparison(arguments.plot, curves, **plot_options)

"""Draw how a compressed memory reads a segment: its entries, the queries that see them, and the next state.

    python scripts/draw_segment.py PNG

A small memory (window 5, bank of 4 entries of 2 positions) reads segments of 8 tokens; the picture shows the third. The
cells are the mask that attention uses. Every input is its own position, which identifies all entries by their values.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from memtx.layers.attention import MemoryAttention
from memtx.layers.positions.base import NoPositions
from memtx.memory.base import LayerActivations
from memtx.memory.compressed import CompressedMemory
from memtx.memory.compression import MeanPooling
from memtx.ops.attention.mask import create_mask
from memtx.plots import BLUE, DPI, MUTED_COLOR, ORANGE, PALETTE, TEXT_COLOR
from memtx.segment import Segment

LENGTH, COMPRESSION_RATE = 8, 2
PARTS = {"carried bank": ORANGE, "evicted blocks": PALETTE[4], "carried cache": PALETTE[2], "segment": BLUE}
GAP, CELL, HIDDEN_COLOR = 0.7, 0.9, "#f1f4f8"


@dataclass(frozen=True)
class Column:
    """One entry of the memory as the segment reads it."""

    x: float
    color: str
    label: str
    visible: list[bool]
    is_kept: bool


def read_segment(num_segments: int = 3) -> list[list[Column]]:
    """Read segments and return the columns of the last one, by part."""
    memory = CompressedMemory(1, 5, COMPRESSION_RATE, 4, MeanPooling)
    attention = MemoryAttention(1, 1, 1, memory, NoPositions(1, 1))
    state, position = memory.init_state(1, like=torch.zeros(1)), torch.zeros(1, dtype=torch.long)
    for _ in range(num_segments):
        segment = Segment.from_document_starts(position, LENGTH)
        inputs = segment.position[..., None].float()
        view = memory.read(state, inputs, segment, attention)
        state, _ = memory.write(view, segment, LayerActivations(inputs, inputs, attention))
        position = segment.next_position
    remaining = {*state.bank.flatten().tolist(), *state.hidden.flatten().tolist()}
    visible = create_mask(view.entry_positions.visibility)[0].T.tolist()
    parts: list[list[Column]] = []
    for part, (entries, color) in enumerate(zip(view.parts, PARTS.values(), strict=True)):
        start = sum(map(len, parts))
        values = entries.flatten().tolist()
        columns = []
        for index, value in enumerate(values, start):
            label = format_positions(value)
            columns.append(Column(index + GAP * part, color, label, visible[index], value in remaining))
        parts.append(columns)
    return parts


def format_positions(value: float) -> str:
    """Format a position, or the mean of the two positions of a compressed entry."""
    return f"{value:.0f}" if value.is_integer() else f"{value - 0.5:.0f}-{value + 0.5:.0f}"


def draw(axes: Axes, parts: list[list[Column]]) -> None:
    """Draw a column for each entry, a row for each query, and below them the entries of the next state."""
    first_position = int(parts[-1][0].label)
    for (name, color), columns in zip(PARTS.items(), parts, strict=True):
        left, right = columns[0].x, columns[-1].x + CELL
        axes.text((left + right) / 2, -1.35, name, ha="center", fontsize=10, fontweight="bold", color=color)
        axes.plot([left, right], [-1.15, -1.15], color=color, linewidth=2)
        for column in columns:
            axes.text(column.x + CELL / 2, -0.3, column.label, ha="center", fontsize=7.5, color=MUTED_COLOR)
            for query, is_visible in enumerate(column.visible):
                cell_color = color if is_visible else HIDDEN_COLOR
                axes.add_patch(Rectangle((column.x, query), CELL, CELL, color=cell_color, linewidth=0))
            if column.is_kept:
                axes.add_patch(Rectangle((column.x, LENGTH + 0.6), CELL, CELL, color=color, alpha=0.45, linewidth=0))
    for query in range(LENGTH):
        label = f"token {first_position + query} sees"
        axes.text(-0.4, query + CELL / 2, label, ha="right", va="center", fontsize=8.5, color=TEXT_COLOR)
    for label, columns in (("next bank", parts[0] + parts[1]), ("next cache", parts[2] + parts[3])):
        remaining = [column.x for column in columns if column.is_kept]
        middle = (remaining[0] + remaining[-1] + CELL) / 2
        axes.text(middle, LENGTH + 1.05, label, ha="center", va="center", fontsize=8.5, color=TEXT_COLOR)
    axes.text(-0.4, LENGTH + 1.05, "next state keeps", ha="right", va="center", fontsize=8.5, color=TEXT_COLOR)
    axes.set_xlim(-4.6, parts[-1][-1].x + 1.2)
    axes.set_ylim(LENGTH + 1.8, -2)
    axes.set_aspect("equal")
    axes.axis("off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="PNG", help="picture to write")
    arguments = parser.parse_args()
    figure = Figure(figsize=(10.5, 4.3), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    draw(figure.subplots(), read_segment())
    figure.savefig(arguments.path)


if __name__ == "__main__":
    main()

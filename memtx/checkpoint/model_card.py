"""Model card: README.md of a folder, with its data, figures, state size and how to stream."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from memtx.models.memory_transformer import MemoryTransformer

FIGURES = {
    "val_loss": "loss (nats per token)",
    "val_bits_per_byte": "bits per byte",
    "val_bits_per_character": "bits per character",
    "val_word_perplexity": "word perplexity",
    "val_memory_gain": "memory gain (nats per token)",
}
"""Columns of metrics.csv that a card has, and their names there."""

TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- memtx
- memory
---

# {name}

A language model that reads texts of any length, segment by segment, with a state of constant size: {model_class} of
{num_parameters:,} parameters (depth {depth}, width {dim}, {vocab_size:,} tokens, {dtype}).

## State

One stream carries {state_bytes:,} bytes, however much was read.

| layers | memories |
|---|---|
{memories}

## Data

{data}

## Figures

{figures}

## Use

    pip install 'memtx[hf]'

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

Stream a text of any length piece by piece; `cache` is the state (`past_key_values` in earlier releases of
transformers):

```python
cache = None
for piece in token_ids.split(4096, dim=1):  # (batch, length)
    cache = model(piece, cache=cache, logits_to_keep=1).cache
model.generate(next_ids, cache=cache.continued(), max_new_tokens=50)  # only the ids that follow
```

`Trainer` and peft work as with any causal language model (`LoraConfig(task_type="CAUSAL_LM",
target_modules="all-linear")`). The folder is one of memtx too: `memtx.from_pretrained("{name}")`,
`memtx generate --checkpoint {name}`.
"""


@dataclass(frozen=True)
class TrainingFacts:
    """Facts of a run.

    Attributes:
        data: Sentence on the data; empty if it is unknown.
        figures: Name -> value.
        segment_length: Tokens per segment in training; None if it is unknown.
    """

    data: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    segment_length: int | None = None


def read_training_facts(path: Path, metadata: Mapping[str, Any]) -> TrainingFacts:
    """Return the facts that a training checkpoint and the run folder that it lies in hold.

    Args:
        path: Checkpoint.
        metadata: Its content without weights.
    """
    name, entry = next(
        ((key, value) for key, value in metadata.items() if isinstance(value, Mapping) and "tokenizer" in value),
        ("", {}),
    )
    run_dir = next((parent for parent in list(path.parents)[:2] if (parent / "config.yaml").is_file()), None)
    config = {} if run_dir is None else _read_yaml(run_dir / "config.yaml")
    data = config.get("data")
    root = data.get("root") or data.get("source") if isinstance(data, Mapping) else None
    parts = [name, f"`{Path(root).name}`" if isinstance(root, str) else "", _to_steps(metadata)]
    figures = _read_figures(run_dir / "metrics.csv", metadata) if run_dir is not None else {}
    length = entry.get("length")
    return TrainingFacts(", ".join(filter(None, parts)), figures, length if isinstance(length, int) else None)


def _to_steps(metadata: Mapping[str, Any]) -> str:
    steps = metadata.get("global_step")
    return f"{steps:,} optimizer steps" if isinstance(steps, int) else ""


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # a card can do without
    return content if isinstance(content, Mapping) else {}


def _read_figures(path: Path, metadata: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of the last validation up to the checkpoint's step."""
    last_step = metadata.get("global_step")
    figures: dict[str, float] = {}
    try:
        with open(path, encoding="utf-8", newline="") as handle:
            for row in csv.DictReader(handle):
                values = {FIGURES[key]: float(value) for key, value in row.items() if key in FIGURES and value}
                if values and (not isinstance(last_step, int) or float(row.get("step") or 0) <= last_step):
                    figures = values
    except (OSError, ValueError):
        return {}
    return figures


def write_card(model: MemoryTransformer, name: str, facts: TrainingFacts) -> str:
    """Return a card's text.

    Args:
        model: Model that the card describes.
        name: Folder or repository that the examples open.
        facts: Facts of its training.
    """
    parameters = list(model.parameters())
    figures = "\n".join(f"| {key} | {value:,.4f} |" for key, value in facts.figures.items())
    table = f"On the validation split:\n\n| | |\n|---|---|\n{figures}"
    return TEMPLATE.format(
        name=name,
        model_class=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in parameters),
        depth=model.depth,
        dim=model.dim,
        vocab_size=model.vocab_size,
        dtype=str(parameters[0].dtype).removeprefix("torch."),
        state_bytes=model.init_state(1).nbytes,
        memories=_memory_table(model),
        data=f"{facts.data}." if facts.data else "Not recorded.",
        figures=table if figures else "Not recorded.",
    )


def _memory_table(model: MemoryTransformer) -> str:
    """Return the rows of consecutive layers with equal memories."""
    blocks: Any = model.blocks
    layers = ["; ".join(_describe(memory) for memory in block.attention.memories) for block in blocks]
    runs: list[tuple[int, int, str]] = []
    for index, text in enumerate(layers):
        if runs and runs[-1][2] == text:
            runs[-1] = (runs[-1][0], index, text)
        else:
            runs.append((index, index, text))
    lines = [f"| {first if first == last else f'{first} to {last}'} | {text} |" for first, last, text in runs]
    if model.output_memory is not None:
        lines.append(f"| output | {_describe(model.output_memory)} |")
    return "\n".join(lines)


def _describe(memory: object) -> str:
    """Return a memory's class and the sizes of what it carries."""
    names = ("window", "compression_rate", "num_entries", "num_slots", "num_sinks", "num_tokens", "memory_length")
    sizes = [f"{name} {value}" for name in names if isinstance(value := getattr(memory, name, None), int)]
    return type(memory).__name__ + (f" ({', '.join(sizes)})" if sizes else "")

"""A folder with everything that another program needs to stream texts through a model.

It holds the programs of a segment and of a single token, a description of their inputs and outputs (``export.json``)
and the tokenizer. Decoding token by token needs a program of its own, since lengths are fixed: a program plans its
blocks, chunks and compressed entries for its length.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.export import ExportedProgram

from memtx import files
from memtx.checkpoint.convert import open_target
from memtx.checkpoint.load import LoadedCheckpoint, load
from memtx.data.tokenizer_export import describe_tokenizer
from memtx.data.tokenizer_files import TOKENIZER_FILE
from memtx.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_from_json
from memtx.errors import DataError
from memtx.export import onnx
from memtx.export.program import export_step
from memtx.models.memory_transformer import MemoryTransformer

ExportFormat = Literal["onnx", "pt2"]

FORMAT, FORMAT_VERSION = "memtx.export", 1
DESCRIPTION_FILE = "export.json"
COPIED_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
"""Files of a published tokenizer that are copied as they are."""


@dataclass(frozen=True)
class ExportResult:
    """Summary of an export.

    ``num_bytes`` are the sizes of the files by name, ``state_bytes`` the size of the state of one stream.
    """

    source: Path
    model_class: str
    num_parameters: int
    num_bytes: dict[str, int]
    state_bytes: int


def export_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: ExportFormat = "onnx",
    segment_length: int = 512,
    batch_size: int = 1,
    window: int | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Write a stored language model for another runtime, completely or not at all.

    Args:
        source: Anything that :func:`memtx.checkpoint.load.load` takes.
        target: Folder to write.
        format: "onnx" for graphs, "pt2" for programs that ``torch.export.load`` reads.
        segment_length: Tokens per segment.
        batch_size: Number of streams.
        window: Exact positions seen by a Hugging Face decoder. Defaults to its trained length.
        overwrite: If True, replace an existing target.

    Raises:
        CheckpointError: The source cannot be loaded.
        MemtxError: The model or a part of it cannot be exported, or the target exists or cannot be written.
    """
    with open_target(source, target, overwrite=overwrite) as (path, folder):
        checkpoint = load(path, window)
        model, tokenizer = checkpoint.model, _find_tokenizer(checkpoint)
        names = {"segment": segment_length, "step": 1} if segment_length > 1 else {"step": 1}
        programs = {name: export_step(model, length, batch_size) for name, length in names.items()}
        assert isinstance(model, MemoryTransformer)  # export_step refuses others
        description = _describe(model, tokenizer, names, batch_size, format)
        folder.mkdir(parents=True)
        if format == "onnx":
            inputs, outputs = ([entry["name"] for entry in description[side]] for side in ("inputs", "outputs"))
            onnx.save_graphs(programs, folder, inputs, outputs)
        else:
            _save_programs(programs, folder)
        if tokenizer is not None:
            files.write_text(folder / TOKENIZER_FILE, json.dumps(describe_tokenizer(tokenizer), ensure_ascii=False))
            for name in COPIED_FILES:
                if (path / name).is_file():
                    shutil.copyfile(path / name, folder / name)
        files.write_json(folder / DESCRIPTION_FILE, description)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_bytes = {file.name: file.stat().st_size for file in sorted(Path(target).iterdir())}
    state_bytes = model.init_state(1, device="meta", dtype=torch.float32).nbytes
    return ExportResult(path, type(model).__name__, num_parameters, num_bytes, state_bytes)


def _save_programs(programs: dict[str, ExportedProgram], folder: Path) -> None:
    for name, program in programs.items():
        with open(folder / f"{name}.pt2", "wb") as handle:
            torch.export.save(program, handle)
            handle.flush()
            os.fsync(handle.fileno())


def _describe(
    model: MemoryTransformer, tokenizer: Tokenizer | None, lengths: dict[str, int], batch_size: int, format: str
) -> dict[str, Any]:
    """Return the content of ``export.json``."""

    def entry(name: str, dtype: torch.dtype, *shape: int | str) -> dict[str, Any]:
        return {"name": name, "dtype": str(dtype).removeprefix("torch."), "shape": [batch_size, *shape]}

    memories = [memory for block in model._layers() for memory in block.attention.memories]
    state = model.init_state(1, device="meta", dtype=torch.float32).named_tensors()
    tokens = entry("tokens", torch.int64, "length"), entry("document_starts", torch.bool, "length")
    logits = entry("logits", torch.float32, "length", model.vocab_size)
    before, after = (
        [entry(f"{side}.{name}", leaf.dtype, *leaf.shape[1:]) for name, leaf in state.items()]
        for side in ("state", "next_state")
    )
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "programs": {name: {"file": f"{name}.{format}", "length": length} for name, length in lengths.items()},
        "batch_size": batch_size,
        "vocab_size": model.vocab_size,
        "inputs": [*tokens, *before],
        "outputs": [logits, *after],
        "initial_state": "zeros",
        "depends_on_segmentation": any(memory.depends_on_segmentation for memory in memories),
        "tokenizer": None
        if tokenizer is None
        else {
            "file": TOKENIZER_FILE,
            "vocab_size": tokenizer.vocab_size,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_ids": sorted(tokenizer.eos_token_ids),
        },
    }


def _find_tokenizer(checkpoint: LoadedCheckpoint) -> Tokenizer | None:
    """Return the tokenizer stored with a model, if any; raises DataError if it is damaged."""
    if (text := checkpoint.sidecars.get("tokenizer")) is not None and "memtx." in text[:40]:
        return tokenizer_from_json(text)
    if not checkpoint.path.is_dir():
        return None
    try:
        return load_tokenizer(checkpoint.path)
    except DataError:
        if text is not None:
            raise
        return None

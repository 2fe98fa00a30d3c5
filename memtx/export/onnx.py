"""Programs as ONNX graphs that share one file of weights."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from memtx.errors import MemtxError, missing_package_error
from memtx.export.decompositions import ONNX_DECOMPOSITIONS

if TYPE_CHECKING:
    import onnx_ir

WEIGHTS_FILE = "weights.bin"
MIN_SHARED_BYTES = 4096
"""Smaller tensors stay in the graph; larger ones begin at a multiple of this in the file, so that it can be mapped."""


def save_graphs(
    programs: Mapping[str, ExportedProgram], folder: Path, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    """Write each program as ``NAME.onnx``, with the weights of all in ``weights.bin``; the files are synced.

    Args:
        programs: Programs by name, with equal inputs and outputs.
        folder: Existing folder.
        inputs: Names of the inputs, in order.
        outputs: Names of the outputs, in order.

    Raises:
        MemtxError: A package is missing, or ONNX has no operator for a part of a program.
    """
    try:
        import onnx_ir
        import onnxscript  # noqa: F401 (which torch imports in the middle of the conversion)
    except ImportError as error:
        raise missing_package_error("Export to ONNX", error, "onnx") from error
    models = {f"{name}.onnx": _to_onnx(program, inputs, outputs) for name, program in programs.items()}
    _share_weights(list(models.values()), folder / WEIGHTS_FILE)
    for name, model in models.items():
        onnx_ir.save(model, folder / name)
        with open(folder / name, "rb+") as handle:
            os.fsync(handle.fileno())


def _to_onnx(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> onnx_ir.Model:
    """Return the graph of a program."""
    with _silence():
        try:
            program = program.run_decompositions(ONNX_DECOMPOSITIONS)
            converted = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=list(inputs), output_names=list(outputs)
            )
        except torch.onnx.errors.OnnxExporterError as error:
            message = f"ONNX cannot hold the model: {_find_cause(error)}."
            raise MemtxError(message, "Export it with --to pt2.") from error
    assert converted is not None
    for node in (graph := converted.model.graph):
        node.metadata_props.clear()  # stack traces with this machine's paths, half of the graph's size
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    return converted.model


def _find_cause(error: BaseException) -> str:
    """Return the first line of the exception that began a chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop warnings and log lines of torch, which name its own deprecations and packages that it can do without."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _share_weights(models: Sequence[onnx_ir.Model], path: Path) -> None:
    """Write the large tensors of all graphs to one file, equal ones once, and refer the graphs to it."""
    import onnx_ir

    offsets: dict[bytes, int] = {}
    with open(path, "wb") as handle:
        values: list[Any] = [value for model in models for value in model.graph.initializers.values()]
        for value in values:
            tensor = value.const_value
            if tensor is None or tensor.nbytes < MIN_SHARED_BYTES:
                continue
            content = tensor.tobytes()
            digest = hashlib.sha256(content).digest()
            if digest not in offsets:
                handle.write(bytes(-handle.tell() % MIN_SHARED_BYTES))
                offsets[digest] = handle.tell()
                handle.write(content)
            value.const_value = onnx_ir.ExternalTensor(
                path.name, offsets[digest], tensor.nbytes, tensor.dtype,
                shape=tensor.shape, name=value.name, base_dir=path.parent,
            )  # fmt: skip
        handle.flush()
        os.fsync(handle.fileno())

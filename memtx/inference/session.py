"""A session in one safetensors file: the model's state and everything else that reading goes on from.

The file is whole or not there, says its format version, and is refused by another model or tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memtx import files
from memtx.errors import CheckpointError
from memtx.inference.reader import Snapshot, StreamReader, Totals

KIND = "memtx.session"
VERSION = 1

STATE = "state."
EXTRA = "extra."


def save_session(
    path: str | os.PathLike[str],
    reader: StreamReader,
    *,
    facts: Mapping[str, Any] | None = None,
    extras: Mapping[str, Tensor] | None = None,
) -> None:
    """Write where a reader stands.

    Args:
        path: the file; an existing one is replaced, whole or not at all.
        reader: the stream; it may go on afterwards.
        facts: whatever else should come back, as JSON can hold it.
        extras: tensors that should come back.

    Raises:
        MemtxError: the file cannot be written.
    """
    snapshot = reader.snapshot()
    tensors = {STATE + name: tensor for name, tensor in snapshot.state.tensors().items()}
    tensors |= {EXTRA + name: tensor for name, tensor in (extras or {}).items()}
    # Copied: a slice of a large batch of tokens would otherwise be refused as shared memory, or saved whole.
    tensors["pending"] = torch.from_numpy(np.array(snapshot.pending, dtype=np.int64))
    # Text goes as bytes: safetensors' header is for short facts.
    tensors["waiting"] = _tensor(snapshot.waiting.encode("utf-8", "surrogatepass"))
    tensors["waiting_bytes"] = _tensor(snapshot.waiting_bytes)
    files.save_tensors(
        path,
        tensors,
        kind=KIND,
        version=VERSION,
        model=reader.model.fingerprint,
        tokenizer=reader.tokenizer.fingerprint,
        last=str(snapshot.last),
        totals=json.dumps(dataclasses.asdict(snapshot.totals)),
        facts=json.dumps(dict(facts or {})),
    )


def load_session(path: str | os.PathLike[str], reader: StreamReader) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Bring a reader to where a session was saved.

    Args:
        path: the file.
        reader: of the same model and tokenizer; moves to the saved place, or stays as it is on an error.

    Returns:
        The facts and the extra tensors that were saved with it.

    Raises:
        CheckpointError: missing, damaged, of another format or version, or of another model or tokenizer.
    """
    tensors, header = files.load_tensors(path, kind=KIND, version=VERSION)
    for what, expected in (("model", reader.model.fingerprint), ("tokenizer", reader.tokenizer.fingerprint)):
        if header.get(what) != expected:
            raise CheckpointError(
                f"'{path}' is a session of another {what} ({header.get(what, 'none')[:12]}, "
                f"this one is {expected[:12]}).",
                "Use the checkpoint and the precision that it was written with, or another session file.",
            )
    try:
        totals = Totals(**json.loads(header["totals"]))
        facts: dict[str, Any] = json.loads(header["facts"])
        last = int(header["last"])
        pending = tensors.pop("pending").numpy()
        waiting = bytes(tensors.pop("waiting").numpy()).decode("utf-8", "surrogatepass")
        waiting_bytes = bytes(tensors.pop("waiting_bytes").numpy())
        in_range = 0 <= last < reader.tokenizer.vocab_size and pending.dtype == np.int64 and pending.ndim == 1
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{path}' is a session with a damaged header: {error}.", "Restore a copy.") from error
    if not in_range or (len(pending) and not 0 <= pending.min() <= pending.max() < reader.tokenizer.vocab_size):
        raise CheckpointError(f"'{path}' holds tokens that its tokenizer does not know.", "Restore a copy.")
    state = {name.removeprefix(STATE): tensor for name, tensor in tensors.items() if name.startswith(STATE)}
    extras = {name.removeprefix(EXTRA): tensor for name, tensor in tensors.items() if name.startswith(EXTRA)}
    filled = reader.state.with_tensors(state)
    if filled.rows != 1:
        raise CheckpointError(f"'{path}' holds {filled.rows} streams, expected 1.", "Restore a copy.")
    reader.restore(Snapshot(filled, last, pending, waiting, waiting_bytes, totals))
    return facts, extras


def _tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())

"""A session in one safetensors file: the model's state and everything else that reading goes on from.

The file is whole or not there, says its format version, and is refused by another model or tokenizer, or where one
bit of it changed. What it holds is checked before a reader takes it: it may come from anywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memtx import files
from memtx.data.pieces import Splitter
from memtx.data.tokenizers import Tokenizer
from memtx.errors import CheckpointError
from memtx.inference.reader import Snapshot, StreamReader, Totals
from memtx.models.memory_transformer import MemoryTransformer
from memtx.segment import FAR
from memtx.state import MemoryState

KIND = "memtx.session"
VERSION = 2
"""2 added the digest."""

STATE = "state."
EXTRA = "extra."
DIGEST = "digest"
SIGNED = ("model", "tokenizer", "last", "totals", "facts")
"""What the digest covers, beside the tensors; format, kind and version are compared."""

LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """Whose sessions these are.

    Attributes:
        model: the model's fingerprint.
        tokenizer: the tokenizer's.
    """

    model: str
    tokenizer: str

    @classmethod
    def of(cls, model: MemoryTransformer, tokenizer: Tokenizer) -> Identity:
        """Compute both; the model's takes a look at every weight."""
        return cls(model.fingerprint, tokenizer.fingerprint)


def save_session(
    path: str | os.PathLike[str],
    reader: StreamReader,
    *,
    facts: Mapping[str, Any] | None = None,
    extras: Mapping[str, Tensor] | None = None,
    identity: Identity | None = None,
) -> None:
    """Write where a reader stands.

    Args:
        path: the file; an existing one is replaced, whole or not at all.
        reader: the stream; it may go on afterwards.
        facts: whatever else should come back, as JSON can hold it.
        extras: tensors that should come back.
        identity: of the reader's model and tokenizer, where it is known already.

    Raises:
        MemtxError: the file cannot be written.
    """
    identity = identity or Identity.of(reader.model, reader.tokenizer)
    snapshot = reader.snapshot()
    tensors = {STATE + name: tensor.cpu() for name, tensor in snapshot.state.tensors().items()}
    tensors |= {EXTRA + name: tensor for name, tensor in (extras or {}).items()}
    # Copied: a slice of a large batch of tokens would otherwise be refused as shared memory, or saved whole.
    tensors["pending"] = torch.from_numpy(np.array(snapshot.pending, dtype=np.int64))
    # Text goes as bytes: safetensors' header is for short facts.
    tensors["waiting"] = _tensor(snapshot.waiting.encode("utf-8", "surrogatepass"))
    tensors["waiting_bytes"] = _tensor(snapshot.waiting_bytes)
    header = {
        "model": identity.model,
        "tokenizer": identity.tokenizer,
        "last": str(snapshot.last),
        "totals": json.dumps(dataclasses.asdict(snapshot.totals)),
        "facts": json.dumps(dict(facts or {})),
    }
    header[DIGEST] = _digest(tensors, header)
    files.save_tensors(path, tensors, kind=KIND, version=VERSION, **header)


def load_session(
    path: str | os.PathLike[str], reader: StreamReader, *, identity: Identity | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Bring a reader to where a session was saved.

    Args:
        path: the file.
        reader: of the same model and tokenizer; moves to the saved place, or stays as it is on an error.
        identity: of the reader's model and tokenizer, where it is known already.

    Returns:
        The facts and the extra tensors that were saved with it.

    Raises:
        CheckpointError: missing, damaged, of another format or version, or of another model or tokenizer.
    """
    tensors, header = files.load_tensors(path, kind=KIND, version=VERSION)
    check_identity(path, header, identity or Identity.of(reader.model, reader.tokenizer))
    # What the file was written with, and nothing else: one bit more or less would go on as another text.
    signed: dict[str, str] = {name: header[name] for name in SIGNED if name in header}
    others = header.keys() - signed.keys() - {DIGEST, "kind", "version"}
    if header.get(DIGEST) != _digest(tensors, signed) or others != {"format"} or header["format"] != "pt":
        raise CheckpointError(f"'{path}' was changed after it was written.", "Restore a copy.")
    try:
        totals, facts = header_facts(header)
        last = int(header["last"])
        pending = tensors.pop("pending").numpy()
        waiting = bytes(tensors.pop("waiting").numpy()).decode("utf-8", "surrogatepass")
        waiting_bytes = bytes(tensors.pop("waiting_bytes").numpy())
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is a session with a damaged header: {error}.", "Restore a copy.") from error
    vocab = reader.tokenizer.vocab_size
    tokens_fit = 0 <= last < vocab and pending.dtype == np.int64 and pending.ndim == 1
    if not tokens_fit or (len(pending) and not 0 <= pending.min() <= pending.max() < vocab):
        raise CheckpointError(f"'{path}' holds tokens that its tokenizer does not know.", "Restore a copy.")
    if len(waiting_bytes) >= LONGEST_CHARACTER or Splitter().feed(waiting):
        raise CheckpointError(f"'{path}' holds text that should have been read.", "Restore a copy.")
    state = {name.removeprefix(STATE): tensor for name, tensor in tensors.items() if name.startswith(STATE)}
    extras = {name.removeprefix(EXTRA): tensor for name, tensor in tensors.items() if name.startswith(EXTRA)}
    filled = reader.state.with_tensors(state)
    _check_state(path, filled)
    reader.restore(Snapshot(filled, last, pending, waiting, waiting_bytes, totals))
    return facts, extras


def check_identity(path: str | os.PathLike[str], header: Mapping[str, str], identity: Identity) -> None:
    """Refuse a session of another model or tokenizer.

    Raises:
        CheckpointError: it is one.
    """
    for what, expected in (("model", identity.model), ("tokenizer", identity.tokenizer)):
        if header.get(what) != expected:
            raise CheckpointError(
                f"'{path}' is a session of another {what} ({header.get(what, 'none')[:12]}, "
                f"this one is {expected[:12]}).",
                "Use the checkpoint and the precision that it was written with, or another session file.",
            )


def header_facts(header: Mapping[str, str]) -> tuple[Totals, dict[str, Any]]:
    """Return the sums and the facts that a session's header holds.

    Raises:
        KeyError, TypeError, ValueError, RecursionError: they are not such.
    """
    totals = Totals(**json.loads(header["totals"]))
    for field in dataclasses.fields(Totals):
        if not _is_sum(getattr(totals, field.name), type(field.default)):
            raise ValueError(f"{field.name} is {getattr(totals, field.name)!r}")
    facts = json.loads(header["facts"])
    if not isinstance(facts, dict):
        raise TypeError("the facts are no object")
    return totals, facts


def _is_sum(value: Any, kind: type[Any]) -> bool:
    # A bool is an int: only the very type goes on as it was.
    return type(value) is kind and 0 <= float(value) < math.inf


def _check_state(path: str | os.PathLike[str], state: MemoryState) -> None:
    if state.rows != 1:
        raise CheckpointError(f"'{path}' holds {state.rows} streams, expected 1.", "Restore a copy.")
    if not 0 <= int(state.position[0]) < FAR:
        raise CheckpointError(f"'{path}' stands at position {int(state.position[0])}.", "Restore a copy.")
    if not all(bool(tensor.isfinite().all()) for tensor in state.tensors().values()):
        raise CheckpointError(f"'{path}' holds a state that is not finite.", "Restore a copy.")


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        # Copied, since a tensor of one number may be of any stride, which cannot be seen as bytes.
        content = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
        digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())

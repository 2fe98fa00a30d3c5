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
from memtx.data.text_chunks import TextSplitter
from memtx.data.tokenizers import Tokenizer
from memtx.errors import CheckpointError
from memtx.inference.reader import ReaderSnapshot, StreamReader, Totals
from memtx.models.memory_transformer import MemoryTransformer
from memtx.segment import INFINITE_OFFSET
from memtx.state import MemoryState

KIND = "memtx.session"
VERSION = 3
"""2 added the digest, 3 renamed the entries."""

STATE_PREFIX = "state."
EXTRA_PREFIX = "extra."
DIGEST_KEY = "digest"
DIGESTED_KEYS = ("model", "tokenizer", "last_token", "totals", "metadata")
"""What the digest covers, beside the tensors; format, kind and version are compared."""

MAX_CHARACTER_BYTES = 4
"""Bytes of a character in UTF-8."""


@dataclasses.dataclass(frozen=True)
class Fingerprints:
    """Whose sessions these are.

    Attributes:
        model: the model's fingerprint.
        tokenizer: the tokenizer's.
    """

    model: str
    tokenizer: str

    @classmethod
    def from_model(cls, model: MemoryTransformer, tokenizer: Tokenizer) -> Fingerprints:
        """Compute both; the model's takes a look at every weight."""
        return cls(model.fingerprint, tokenizer.fingerprint)


def save_session(
    path: str | os.PathLike[str],
    reader: StreamReader,
    *,
    metadata: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, Tensor] | None = None,
    fingerprints: Fingerprints | None = None,
) -> None:
    """Write where a reader stands.

    Args:
        path: the file; an existing one is replaced, whole or not at all.
        reader: the stream; it may go on afterwards.
        metadata: whatever else should come back, as JSON can hold it.
        extra_tensors: tensors that should come back.
        fingerprints: of the reader's model and tokenizer, where it is known already.

    Raises:
        MemtxError: the file cannot be written.
    """
    fingerprints = fingerprints or Fingerprints.from_model(reader.model, reader.tokenizer)
    snapshot = reader.snapshot()
    tensors = {STATE_PREFIX + name: tensor.cpu() for name, tensor in snapshot.state.named_tensors().items()}
    tensors |= {EXTRA_PREFIX + name: tensor for name, tensor in (extra_tensors or {}).items()}
    # Copied: a slice of a large batch of tokens would otherwise be refused as shared memory, or saved whole.
    tensors["pending_tokens"] = torch.from_numpy(np.array(snapshot.pending_tokens, dtype=np.int64))
    # Text goes as bytes: safetensors' header is for short facts.
    tensors["pending_text"] = _bytes_to_tensor(snapshot.pending_text.encode("utf-8", "surrogatepass"))
    tensors["pending_bytes"] = _bytes_to_tensor(snapshot.pending_bytes)
    header = {
        "model": fingerprints.model,
        "tokenizer": fingerprints.tokenizer,
        "last_token": str(snapshot.last_token),
        "totals": json.dumps(dataclasses.asdict(snapshot.totals)),
        "metadata": json.dumps(dict(metadata or {})),
    }
    header[DIGEST_KEY] = _digest(tensors, header)
    files.save_tensors(path, tensors, kind=KIND, version=VERSION, **header)


def load_session(
    path: str | os.PathLike[str], reader: StreamReader, *, fingerprints: Fingerprints | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Bring a reader to where a session was saved.

    Args:
        path: the file.
        reader: of the same model and tokenizer; moves to the saved place, or stays as it is on an error.
        fingerprints: of the reader's model and tokenizer, where it is known already.

    Returns:
        The metadata and the extra tensors that were saved with it.

    Raises:
        CheckpointError: missing, damaged, of another format or version, or of another model or tokenizer.
    """
    tensors, header = files.load_tensors(path, kind=KIND, version=VERSION)
    check_fingerprints(path, header, fingerprints or Fingerprints.from_model(reader.model, reader.tokenizer))
    # What the file was written with, and nothing else: one bit more or less would go on as another text.
    signed: dict[str, str] = {name: header[name] for name in DIGESTED_KEYS if name in header}
    others = header.keys() - signed.keys() - {DIGEST_KEY, "kind", "version"}
    if header.get(DIGEST_KEY) != _digest(tensors, signed) or others != {"format"} or header["format"] != "pt":
        raise CheckpointError(f"'{path}' was changed after it was written.", "Restore a copy.")
    try:
        totals, facts = parse_header(header)
        last = int(header["last_token"])
        pending = tensors.pop("pending_tokens").numpy()
        waiting = bytes(tensors.pop("pending_text").numpy()).decode("utf-8", "surrogatepass")
        waiting_bytes = bytes(tensors.pop("pending_bytes").numpy())
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is a session with a damaged header: {error}.", "Restore a copy.") from error
    vocab = reader.tokenizer.vocab_size
    tokens_fit = 0 <= last < vocab and pending.dtype == np.int64 and pending.ndim == 1
    if not tokens_fit or (len(pending) and not 0 <= pending.min() <= pending.max() < vocab):
        raise CheckpointError(f"'{path}' holds tokens that its tokenizer does not know.", "Restore a copy.")
    if len(waiting_bytes) >= MAX_CHARACTER_BYTES or TextSplitter().feed(waiting):
        raise CheckpointError(f"'{path}' holds text that should have been read.", "Restore a copy.")
    state = {
        name.removeprefix(STATE_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(STATE_PREFIX)
    }
    extras = {
        name.removeprefix(EXTRA_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(EXTRA_PREFIX)
    }
    filled = reader.state.with_named_tensors(state)
    _check_state(path, filled)
    reader.restore(ReaderSnapshot(filled, last, pending, waiting, waiting_bytes, totals))
    return facts, extras


def check_fingerprints(path: str | os.PathLike[str], header: Mapping[str, str], fingerprints: Fingerprints) -> None:
    """Refuse a session of another model or tokenizer.

    Raises:
        CheckpointError: it is one.
    """
    for what, expected in (("model", fingerprints.model), ("tokenizer", fingerprints.tokenizer)):
        if header.get(what) != expected:
            raise CheckpointError(
                f"'{path}' is a session of another {what} ({header.get(what, 'none')[:12]}, "
                f"this one is {expected[:12]}).",
                "Use the checkpoint and the precision that it was written with, or another session file.",
            )


def parse_header(header: Mapping[str, str]) -> tuple[Totals, dict[str, Any]]:
    """Return the sums and the metadata that a session's header holds.

    Raises:
        KeyError, TypeError, ValueError, RecursionError: they are not such.
    """
    totals = Totals(**json.loads(header["totals"]))
    for field in dataclasses.fields(Totals):
        if not _is_valid_total(getattr(totals, field.name), type(field.default)):
            raise ValueError(f"{field.name} is {getattr(totals, field.name)!r}")
    facts = json.loads(header["metadata"])
    if not isinstance(facts, dict):
        raise TypeError("the metadata is no object")
    return totals, facts


def _is_valid_total(value: Any, expected_type: type[Any]) -> bool:
    # A bool is an int: only the very type goes on as it was.
    return type(value) is expected_type and 0 <= float(value) < math.inf


def _check_state(path: str | os.PathLike[str], state: MemoryState) -> None:
    if state.batch_size != 1:
        raise CheckpointError(f"'{path}' holds {state.batch_size} streams, expected 1.", "Restore a copy.")
    if not 0 <= int(state.position[0]) < INFINITE_OFFSET:
        raise CheckpointError(f"'{path}' stands at position {int(state.position[0])}.", "Restore a copy.")
    if not all(bool(tensor.isfinite().all()) for tensor in state.named_tensors().values()):
        raise CheckpointError(f"'{path}' holds a state that is not finite.", "Restore a copy.")


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        # Copied, since a tensor of one number may be of any stride, which cannot be seen as bytes.
        content = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
        digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _bytes_to_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())

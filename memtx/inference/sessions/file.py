"""Session file: the state of a model and its reader in one safetensors file, which may come from an untrusted source.

It is written atomically, and refused by another model or tokenizer, or if a single bit changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memtx import files
from memtx.data.tokenizers import Tokenizer
from memtx.errors import CheckpointError
from memtx.inference.reader import ReaderSnapshot, StreamReader, Totals
from memtx.models.recurrent_lm import RecurrentLanguageModel
from memtx.segment import INFINITE_OFFSET

KIND = "memtx.session"
VERSION = 4
"""Format version: 2 added the digest, 3 renamed the entries, 4 added the text of pending tokens."""

STATE_PREFIX = "state."
EXTRA_PREFIX = "extra."
DIGEST_KEY = "digest"
DIGESTED_KEYS = ("model", "tokenizer", "last_token", "totals", "metadata", "parse_special")
"""Header entries covered by the digest, in addition to the tensors; format, kind and version are compared."""


@dataclasses.dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of the model and the tokenizer that sessions belong to."""

    model: str
    tokenizer: str

    @classmethod
    def from_model(cls, model: RecurrentLanguageModel, tokenizer: Tokenizer) -> Fingerprints:
        """Compute both fingerprints; the model's hashes every weight."""
        return cls(model.fingerprint, tokenizer.fingerprint)


def save_session(
    path: str | os.PathLike[str],
    reader: StreamReader,
    *,
    metadata: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, Tensor] | None = None,
    fingerprints: Fingerprints | None = None,
) -> None:
    """Write the position of a reader, which can continue afterwards, to a new or existing file.

    ``metadata`` are additional JSON-serializable entries. ``fingerprints``, those of the reader's model and tokenizer,
    are computed if None. Raises MemtxError if the file cannot be written.
    """
    fingerprints = fingerprints or Fingerprints.from_model(reader.model, reader.tokenizer)
    snapshot = reader.snapshot()
    tensors = {STATE_PREFIX + name: tensor.cpu() for name, tensor in snapshot.state.named_tensors().items()}
    tensors |= {EXTRA_PREFIX + name: tensor for name, tensor in (extra_tensors or {}).items()}
    # Copied: safetensors would refuse a view as shared memory, or save the whole array.
    tensors["pending_tokens"] = torch.from_numpy(np.array(snapshot.pending_tokens, dtype=np.int64))
    # Text is saved as bytes: the header of safetensors is for short entries.
    tensors["pending_text"] = _bytes_to_tensor(snapshot.pending_text.encode("utf-8", "surrogatepass"))
    tensors["pending_bytes"] = _bytes_to_tensor(snapshot.pending_bytes)
    tensors["pending_contents"] = _bytes_to_tensor(b"".join(snapshot.pending_contents))
    tensors["pending_lengths"] = torch.tensor(
        [len(content) for content in snapshot.pending_contents], dtype=torch.int64
    )
    tensors["incomplete_bytes"] = _bytes_to_tensor(snapshot.incomplete_bytes)
    header = {
        "model": fingerprints.model,
        "tokenizer": fingerprints.tokenizer,
        "last_token": "none" if snapshot.last_token is None else str(snapshot.last_token),
        "totals": json.dumps(dataclasses.asdict(snapshot.totals)),
        "metadata": json.dumps(dict(metadata or {})),
    }
    if snapshot.parse_special:  # an optional entry, so that the format is that of earlier files
        header["parse_special"] = "true"
    header[DIGEST_KEY] = _digest(tensors, header)
    files.save_tensors(path, tensors, kind=KIND, version=VERSION, **header)


def load_session(
    path: str | os.PathLike[str], reader: StreamReader, *, fingerprints: Fingerprints | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore a reader of the same model and tokenizer from a saved session; on an error it is left unchanged.

    Returns the session's metadata and extra tensors. ``fingerprints`` are computed if None. Raises CheckpointError if
    the file is missing, damaged, or of another format, version, model or tokenizer.
    """
    tensors, header = files.load_tensors(path, kind=KIND, version=VERSION)
    _check_fingerprints(path, header, fingerprints or Fingerprints.from_model(reader.model, reader.tokenizer))
    # Accept exactly the saved content: a changed bit would continue another text.
    digested: dict[str, str] = {name: header[name] for name in DIGESTED_KEYS if name in header}
    others = header.keys() - digested.keys() - {DIGEST_KEY, "kind", "version"}
    if header.get(DIGEST_KEY) != _digest(tensors, digested) or others != {"format"} or header["format"] != "pt":
        raise CheckpointError(f"'{path}' was changed after it was written.", "Restore a copy.")
    with _report_damage(path):
        totals, metadata = _parse_header(header)
        last_token = None if header["last_token"] == "none" else int(header["last_token"])
        pending_tokens = tensors.pop("pending_tokens").numpy()
        pending_text = bytes(tensors.pop("pending_text").numpy()).decode("utf-8", "surrogatepass")
        pending_bytes = bytes(tensors.pop("pending_bytes").numpy())
        ends = tensors.pop("pending_lengths").cumsum(0).tolist()
        text = bytes(tensors.pop("pending_contents").numpy())
        pending_contents = tuple(text[start:end] for start, end in itertools.pairwise([0, *ends]))
        incomplete_bytes = bytes(tensors.pop("incomplete_bytes").numpy())
    vocab_size = reader.tokenizer.vocab_size
    tokens_fit = last_token is None or 0 <= last_token < vocab_size
    tokens_fit = (
        tokens_fit
        and len(pending_contents) == len(pending_tokens)
        and pending_tokens.dtype == np.int64
        and pending_tokens.ndim == 1
    )
    if not tokens_fit or not ((pending_tokens >= 0) & (pending_tokens < vocab_size)).all():
        raise CheckpointError(f"'{path}' holds tokens outside the tokenizer's vocabulary.", "Restore a copy.")
    # A character has at most 4 bytes in UTF-8.
    continues, parse_special = bool(totals.num_tokens or len(pending_tokens)), "parse_special" in header
    encoder = reader.tokenizer.encoder(pending=pending_text, continues=continues, parse_special=parse_special)
    if max(len(pending_bytes), len(incomplete_bytes)) >= 4 or encoder.feed(""):
        raise CheckpointError(f"'{path}' holds pending text that should have been read.", "Restore a copy.")
    state = reader.state.with_named_tensors(_with_prefix(tensors, STATE_PREFIX))
    if state.batch_size != 1:
        raise CheckpointError(f"'{path}' holds {state.batch_size} streams, expected 1.", "Restore a copy.")
    if not 0 <= (position := int(state.position[0])) < INFINITE_OFFSET:
        raise CheckpointError(f"'{path}' has position {position}, which is out of range.", "Restore a copy.")
    if not all(bool(tensor.isfinite().all()) for tensor in state.named_tensors().values()):
        raise CheckpointError(f"'{path}' holds a state that is not finite.", "Restore a copy.")
    pending = (pending_tokens, pending_text, pending_bytes, totals, pending_contents, incomplete_bytes, parse_special)
    reader.restore(ReaderSnapshot(state, last_token, *pending))
    return metadata, _with_prefix(tensors, EXTRA_PREFIX)


def load_header(path: str | os.PathLike[str], fingerprints: Fingerprints) -> tuple[Totals, dict[str, Any]]:
    """Return the totals and metadata of a saved session without its state; raises like :func:`load_session`."""
    _, header = files.load_tensors(path, kind=KIND, version=VERSION, header_only=True)
    _check_fingerprints(path, header, fingerprints)
    with _report_damage(path):
        return _parse_header(header)


def _check_fingerprints(path: str | os.PathLike[str], header: Mapping[str, str], fingerprints: Fingerprints) -> None:
    for name, expected in dataclasses.asdict(fingerprints).items():
        if header.get(name) != expected:
            raise CheckpointError(
                f"'{path}' is a session of another {name} ({header.get(name, 'none')[:12]}, expected {expected[:12]}).",
                "Use the checkpoint and precision that it was written with, or another session file.",
            )


@contextlib.contextmanager
def _report_damage(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is a session with a damaged header: {error}.", "Restore a copy.") from error


def _parse_header(header: Mapping[str, str]) -> tuple[Totals, dict[str, Any]]:
    totals = Totals(**json.loads(header["totals"]))
    for field in dataclasses.fields(Totals):
        value = getattr(totals, field.name)
        # The exact type: a bool is an int.
        if type(value).__name__ != field.type or not 0 <= float(value) < math.inf:
            raise ValueError(f"{field.name} is {value!r}")
    metadata = json.loads(header["metadata"])
    if not isinstance(metadata, dict):
        raise TypeError("the metadata is not an object")
    return totals, metadata


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        # Copied, since a one-element tensor may have any stride and could not be viewed as bytes.
        content = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
        digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _bytes_to_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())

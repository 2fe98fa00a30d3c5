"""What `memtx predict` leaves: every document's figures as a line of JSON, and the surprise of its every token."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from memtx import files
from memtx.data.batch import IGNORE_INDEX, Batch

DOCUMENTS_FILE = "documents.jsonl"
SURPRISAL_FILE = "surprisal.safetensors"
FILE_KIND = "memtx.surprisal"
FORMAT_VERSION = 1


@dataclass
class _Document:
    """One document of a row, as far as it was read."""

    nll_chunks: list[Tensor] = field(default_factory=list)
    stream: int = 0
    start_offset: int = 0  # the row's offset at which it begins


class PredictionWriter(Callback):
    """Writes two files when prediction ends, whole or not at all.

    ``documents.jsonl``: a line a document, with id, title, tokens, words, bytes, nll (nats), bits_per_byte and
    word_perplexity. ``surprisal.safetensors``: under each document's id, (tokens,) float32, the negative log-likelihood
    of its every token in nats. The id that begins a document is no token of it.

    Args:
        output_dir: where to.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.output_dir = Path(output_dir)
        self._open_documents: dict[int, _Document] = {}
        self._finished_documents: list[_Document] = []
        self._offset = 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin fresh."""
        self._open_documents, self._finished_documents, self._offset = {}, [], 0

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the batch's figures, (rows, tokens) float nats, apart into documents."""
        nll, labels, starts = (one.cpu() for one in (outputs, batch.labels, batch.document_starts))
        for row in range(nll.shape[0]):
            cuts = [0, *(starts[row].nonzero().flatten().tolist()), nll.shape[1]]
            for begin, end in itertools.pairwise(cuts):
                if begin == end:
                    continue
                if starts[row, begin]:
                    self._close_document(row)
                    self._open_documents[row] = _Document(stream=row, start_offset=self._offset + begin)
                scored = labels[row, begin:end] != IGNORE_INDEX
                self._open_documents[row].nll_chunks.append(nll[row, begin:end][scored].float())
        self._offset += nll.shape[1]

    def _close_document(self, stream: int) -> None:
        # A padded place begins a document of its own, with nothing in it.
        if (document := self._open_documents.pop(stream, None)) is not None and any(
            len(part) for part in document.nll_chunks
        ):
            self._finished_documents.append(document)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what all processes have read."""
        for row in list(self._open_documents):
            self._close_document(row)
        loader: Any = trainer.predict_dataloaders
        own = list(_document_records(self._finished_documents, loader))
        ranks = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [own] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, own)
        if trainer.is_global_zero:
            found = sorted((one for rank in ranks for one in rank), key=lambda one: str(one[0]["id"]))
            surprise = {str(facts["id"]): values for facts, values in found}
            files.save_tensors(self.output_dir / SURPRISAL_FILE, surprise, kind=FILE_KIND, version=FORMAT_VERSION)
            lines = [json.dumps(facts, ensure_ascii=False) + "\n" for facts, _ in found]
            files.write_text(self.output_dir / DOCUMENTS_FILE, "".join(lines))


def _document_records(documents: Sequence[_Document], dataloader: Any) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield each document's facts and its tokens' surprise; ``dataloader`` is an EvaluationStreams."""
    store = dataloader.store
    for document in documents:
        values = torch.cat(document.nll_chunks)
        row = dataloader.rank * dataloader.batch_size + document.stream
        index = next(
            place
            for place, _, _ in dataloader._plan.iter_documents(row, document.start_offset, document.start_offset + 1)
        )
        nats, words, size = float(values.double().sum()), int(store.num_words[index]), int(store.num_bytes[index])
        whole = len(values) == int(store.lengths[index]) - 1
        yield (
            {
                "id": store.ids[index],
                "title": store.titles[index],
                "tokens": len(values),
                "words": words,
                "bytes": size,
                "nll": nats,
                # Of a document that was not read to its end, the text's size is not that of what was scored.
                "bits_per_byte": nats / math.log(2) / size if whole and size else None,
                "word_perplexity": _safe_exp(nats / words) if whole and words else None,
            },
            values,
        )


def _safe_exp(value: float) -> float | None:
    return math.exp(value) if value < 700 else None

"""Output of ``memtx predict``: metrics of each document as JSON lines, and the surprisal of each token."""

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
from torch import Tensor

from memtx import files
from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.word_measure import is_word_measure

DOCUMENTS_FILE = "documents.jsonl"
SURPRISAL_FILE = "surprisal.safetensors"
FILE_KIND = "memtx.surprisal"
FORMAT_VERSION = 1


@dataclass
class _Document:
    """The part of a document that was read."""

    nll_chunks: list[Tensor] = field(default_factory=list)
    stream: int = 0
    start_offset: int = 0  # in the stream


class PredictionWriter(pl.Callback):
    """Writes two files atomically when prediction ends.

    ``documents.jsonl`` has one line per document with id, title, tokens, words, bytes, nll (nats), bits_per_byte and
    word_perplexity. ``surprisal.safetensors`` has the negative log-likelihood of each token in nats, ``(tokens,)``
    float32, by document id. The id that begins a document does not count as a token.

    Args:
        output_dir: Folder of the files.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.output_dir = Path(output_dir)
        self._open_documents: dict[int, _Document] = {}
        self._finished_documents: list[_Document] = []
        self._offset = 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop all documents."""
        self._open_documents, self._finished_documents, self._offset = {}, [], 0

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Split the predictions of a batch, ``(batch, length)`` nats, into documents."""
        nll, labels, document_starts = (tensor.cpu() for tensor in (outputs, batch.labels, batch.document_starts))
        length = nll.shape[1]
        for stream in range(nll.shape[0]):
            boundaries = [0, *document_starts[stream].nonzero().flatten().tolist(), length]
            for start, end in itertools.pairwise(boundaries):
                if start == end:
                    continue
                if document_starts[stream, start]:
                    self._close_document(stream)
                    self._open_documents[stream] = _Document(stream=stream, start_offset=self._offset + start)
                scored = labels[stream, start:end] != IGNORE_INDEX
                self._open_documents[stream].nll_chunks.append(nll[stream, start:end][scored].float())
        self._offset += length

    def _close_document(self, stream: int) -> None:
        document = self._open_documents.pop(stream, None)
        # Padding begins a document without tokens.
        if document is not None and any(len(chunk) for chunk in document.nll_chunks):
            self._finished_documents.append(document)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the documents of all processes."""
        for stream in list(self._open_documents):
            self._close_document(stream)
        records = list(_document_records(self._finished_documents, trainer.predict_dataloaders))
        rank_records = [records]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank_records = [records] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(rank_records, records)
        if trainer.is_global_zero:
            records = sorted(itertools.chain(*rank_records), key=lambda record: str(record[0]["id"]))
            surprisal = {str(metrics["id"]): nll for metrics, nll in records}
            files.save_tensors(self.output_dir / SURPRISAL_FILE, surprisal, kind=FILE_KIND, version=FORMAT_VERSION)
            lines = [json.dumps(metrics, ensure_ascii=False) + "\n" for metrics, _ in records]
            files.write_text(self.output_dir / DOCUMENTS_FILE, "".join(lines))


def _document_records(documents: Sequence[_Document], dataloader: Any) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield metrics and surprisal of each document; ``dataloader`` is an EvaluationStreams."""
    store = dataloader.store
    for document in documents:
        values, start = torch.cat(document.nll_chunks), document.start_offset
        stream = dataloader.rank * dataloader.batch_size + document.stream
        index = next(index for index, _, _ in dataloader._plan.iter_documents(stream, start, start + 1))
        nll, num_words, num_bytes = float(values.double().sum()), store.num_words[index], store.num_bytes[index]
        # The text's size is not that of the scored part if the document was not read to its end.
        is_complete = len(values) == int(store.lengths[index]) - 1
        has_words = num_words and is_word_measure(int(num_words), int(num_bytes))
        metrics = {
            "id": store.ids[index],
            "title": store.titles[index],
            "tokens": len(values),
            "words": int(num_words),
            "bytes": int(num_bytes),
            "nll": nll,
            "bits_per_byte": nll / math.log(2) / int(num_bytes) if is_complete and num_bytes else None,
            "word_perplexity": _safe_exp(nll / int(num_words)) if is_complete and has_words else None,
        }
        yield metrics, values


def _safe_exp(value: float) -> float | None:
    return math.exp(value) if value < 700 else None

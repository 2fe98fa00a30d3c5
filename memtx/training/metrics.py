"""Metrics of language modeling: loss, bits per byte, word perplexity, and the gain from memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import MeanMetric, Metric

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.metrics import BitsPerByte, BitsPerCharacter, WordPerplexity
from memtx.models.recurrent_lm import RecurrentLanguageModel
from memtx.segment import Segment
from memtx.state import MemoryState

NUM_DISTANCE_RANGES = 5
"""Number of ranges of distance from the start of a document, each four times as long as the one before."""


class LanguageMetrics(nn.ModuleDict):
    """Metrics of validation and test, named ``val_loss``, ``test_bits_per_byte`` and so on."""

    def __init__(self) -> None:
        classes: dict[str, type[Metric]] = {
            "bits_per_byte": BitsPerByte,
            "bits_per_character": BitsPerCharacter,
            "word_perplexity": WordPerplexity,
            "loss": MeanMetric,
        }
        super().__init__({f"{stage}_{name}": make() for stage in ("val", "test") for name, make in classes.items()})
        self._token_sizes: Tensor | None = None  # characters and bytes of each token
        for stage in ("val", "test"):
            # A float32 sum stops growing after some ten million tokens.
            self._get_metric(stage, "loss").set_dtype(torch.float64)

    def _get_metric(self, stage: str, name: str) -> Metric:
        return cast(Metric, self[f"{stage}_{name}"])

    def update_and_log(
        self, module: pl.LightningModule, stage: str, batch: Batch, nll_sum: Tensor, num_scored: Tensor
    ) -> None:
        """Add a batch to the metrics of a stage, "val" or "test", and log all but the word perplexity.

        ``nll_sum``, ``()`` float64, is the sum over the ``num_scored`` labels, ``()``, in nats.
        """
        self._get_metric(stage, "bits_per_byte").update(nll_sum, batch.num_bytes.sum())
        self._get_metric(stage, "word_perplexity").update(nll_sum, batch.num_words.sum(), batch.num_bytes.sum())
        num_chars = batch.num_bytes.sum() * self._characters_per_byte(module, batch.labels)
        self._get_metric(stage, "bits_per_character").update(nll_sum, num_chars)
        self._get_metric(stage, "loss").update(nll_sum / num_scored.clamp(min=1), num_scored)
        # On every rank, whatever it scored: the others would wait forever for a rank that logs nothing.
        for name in ("bits_per_byte", "bits_per_character", "loss"):
            metric, batch_size = self._get_metric(stage, name), batch.tokens.shape[0]
            show = name == "bits_per_byte"
            module.log(f"{stage}_{name}", metric, prog_bar=show, on_step=False, on_epoch=True, batch_size=batch_size)

    def log_word_perplexity(self, module: pl.LightningModule, stage: str) -> None:
        """Log the word perplexity at the end of a stage if it means something, on all ranks alike."""
        name, metric = f"{stage}_word_perplexity", self._get_metric(stage, "word_perplexity")
        value = metric.compute().float()  # summed over the ranks
        metric.reset()  # The trainer resets only a metric that is logged itself.
        if value.isfinite():
            module.log(name, value, prog_bar=True, sync_dist=True)
        else:
            # The trainer keeps the value of an earlier validation.
            for metrics in (module.trainer.callback_metrics, module.trainer.progress_bar_metrics):
                metrics.pop(name, None)

    def _characters_per_byte(self, module: pl.LightningModule, labels: Tensor) -> Tensor:
        """Return the characters per byte of the scored labels' text, ``()`` float64; 1 without a tokenizer."""
        if self._token_sizes is None:
            datamodule = getattr(module.trainer, "datamodule", None)
            tokenizer = getattr(datamodule, "tokenizer", None)
            contents = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)] if tokenizer else []
            # A character is counted at its first byte; the others are 0x80 to 0xBF.
            sizes = [(sum(byte & 0xC0 != 0x80 for byte in content), len(content)) for content in contents]
            self._token_sizes = torch.tensor(sizes, dtype=torch.float64).reshape(-1, 2)
        if not len(self._token_sizes):
            return torch.ones((), dtype=torch.float64, device=labels.device)
        self._token_sizes = self._token_sizes.to(labels.device)
        sizes_sum: Tensor = self._token_sizes[labels[labels != IGNORE_INDEX]].sum(0)
        return sizes_sum[0] / sizes_sum[1].clamp(min=1)


class MemoryGain(nn.Module):
    """Bits per byte with the memory cleared at every segment, minus bits per byte with the memory.

    It tells a memory that is used from one that is only carried: the loss falls in both cases.

    Args:
        segment_length: Tokens per call; memory makes no difference before the second segment of a document.
    """

    def __init__(self, segment_length: int) -> None:
        super().__init__()
        self.segment_length = segment_length
        self.total = BitsPerByte()
        self.by_distance = nn.ModuleList(BitsPerByte() for _ in range(NUM_DISTANCE_RANGES))

    def _distance_ranges(self) -> Iterator[tuple[int, BitsPerByte]]:
        for number, metric in enumerate(self.by_distance):
            assert isinstance(metric, BitsPerByte)
            yield self.segment_length * 4**number, metric

    @torch.no_grad()
    def update(self, model: RecurrentLanguageModel, batch: Batch, nll: Tensor, state: MemoryState) -> None:
        """Read a batch again, each segment with a fresh state; do nothing for a model without memory.

        The model is in eval mode and ``state`` the one before the batch, whose last segment may be short. ``nll`` is
        the negative log-likelihood of each label with the memory, ``(batch, length)`` in nats.
        """
        if not any(leaf.numel() for leaf in pytree.tree_leaves(state.layers)):
            return
        length = batch.tokens.shape[1]
        nll_without_memory = []
        for start in range(0, length, self.segment_length):
            part = slice(start, start + self.segment_length)
            output = model(
                batch.tokens[:, part],
                model.init_state(batch.tokens.shape[0]),
                document_starts=batch.document_starts[:, part],
                labels=batch.labels[:, part],
            )
            assert output.nll is not None
            nll_without_memory.append(output.nll)
        gain = torch.cat(nll_without_memory, dim=1).double() - nll.double()
        scored = batch.labels != IGNORE_INDEX
        # The bytes of a stream are known, not those of a token: they are spread evenly over its scored tokens.
        token_bytes = batch.num_bytes.double() / scored.sum(1).clamp(min=1)
        self.total.update(gain, batch.num_bytes)
        positions = Segment.from_document_starts(state.position, length, batch.document_starts).position
        last = self.segment_length * 4 ** (NUM_DISTANCE_RANGES - 1)
        for low, metric in self._distance_ranges():
            in_range = (positions >= low) & ((positions < 4 * low) | (low == last))
            metric.update(gain * in_range, (scored & in_range).sum(1) * token_bytes)

    def compute_and_reset(self) -> dict[str, Tensor]:
        """Return ``memory_gain`` of all bytes and ``memory_gain_N`` of those N to 4 N tokens into a document.

        The last range has no end. Ranges that no text reached are left out, on all ranks alike.
        """
        metrics = {"memory_gain": self.total}
        metrics |= {f"memory_gain_{low}": metric for low, metric in self._distance_ranges()}
        values = {name: metric.compute().float() for name, metric in metrics.items() if metric.update_called}
        for metric in metrics.values():
            metric.reset()
        return {name: value for name, value in values.items() if not value.isnan()}

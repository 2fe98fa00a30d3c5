"""Metrics of language modeling: loss, bits per byte, word perplexity, and the gain from memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import MeanMetric, Metric

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.metrics import BitsPerByte, BitsPerCharacter, Perplexity, WordPerplexity
from memtx.models.recurrent_lm import RecurrentLanguageModel
from memtx.models.sources import hide_sources
from memtx.segment import Segment
from memtx.state import MemoryState
from memtx.training.tbptt import UnrollOutput, unroll

NUM_DISTANCE_RANGES = 5
"""Number of ranges of distance from the start of a document, each four times as long as the one before."""


NUM_POSITION_BINS = 96
BINS_PER_OCTAVE = 2
MIN_POSITION = 16
"""Positions below this share a bin, since means of single tokens would be noise."""


def position_of_bins(num_bins: int) -> Tensor:
    """Return the position in the middle of each bin of :func:`sum_by_position`, ``(num_bins,)``."""
    positions = MIN_POSITION * 2 ** ((torch.arange(num_bins, dtype=torch.float64) - 0.5) / BINS_PER_OCTAVE)
    positions[0] = MIN_POSITION / 2
    return positions


def sum_by_position(batch: Batch, nll: Tensor, state: MemoryState) -> Tensor:
    """Return nats and bytes by position in the document, in bins of equal width on a logarithmic axis.

    ``nll`` is the negative log-likelihood of each label, ``(batch, length)`` in nats, and ``state`` the one before the
    batch. The result is ``(2, NUM_POSITION_BINS)`` float64.
    """
    positions = Segment.from_document_starts(state.position, nll.shape[1], batch.document_starts).position
    octaves = (positions.clamp(min=MIN_POSITION / 2).double() / MIN_POSITION).log2()
    bins = (1 + octaves * BINS_PER_OCTAVE).floor().clamp(0, NUM_POSITION_BINS - 1).long()
    sums = nll.new_zeros(2, NUM_POSITION_BINS, dtype=torch.float64)
    for row, values in enumerate((nll.double(), _bytes_of_tokens(batch))):
        sums[row].index_add_(0, bins.flatten(), values.flatten())
    return sums


def _bytes_of_tokens(batch: Batch) -> Tensor:
    """Return the bytes of each scored token, ``(batch, length)``: those of a stream are known, and spread evenly."""
    scored = batch.labels != IGNORE_INDEX
    return scored * (batch.num_bytes.double() / scored.sum(1).clamp(min=1))[:, None]


class LanguageMetrics(nn.ModuleDict):
    """Metrics of validation and test, named ``val_loss``, ``test_bits_per_byte`` and so on."""

    def __init__(self) -> None:
        classes: dict[str, type[Metric]] = {
            "bits_per_byte": BitsPerByte,
            "bits_per_character": BitsPerCharacter,
            "word_perplexity": WordPerplexity,
            "perplexity": Perplexity,
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
        self._get_metric(stage, "perplexity").update(nll_sum, num_scored)
        self._get_metric(stage, "loss").update(nll_sum / num_scored.clamp(min=1), num_scored)
        # On every rank, whatever it scored: the others would wait forever for a rank that logs nothing.
        for name in ("bits_per_byte", "bits_per_character", "perplexity", "loss"):
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
    """Bits per byte read without a source of memory, minus bits per byte read with all of them.

    It tells a memory that is used from one that is only carried: the loss falls in both cases. Readings without a
    source carry a state of their own. The exact window's figure is that of readings without any source, each segment
    from a fresh state, against such readings of the whole stream.

    Args:
        segment_length: Tokens per call; memory makes no difference before the second segment of a document.
        sources: Sources of the model.
    """

    def __init__(self, segment_length: int, sources: Sequence[str] = ()) -> None:
        super().__init__()
        self.segment_length = segment_length
        self.sources = tuple(sources)
        # By name of the figure, the sources hidden for it.
        self._readings = {"memory_gain": self.sources} if sources else {}
        if len(sources) > 1:
            self._readings |= {f"memory_gain/{source}": (source,) for source in sources}
        names = ("memory_gain/window", *self._readings)
        self.by_source = nn.ModuleDict({name: BitsPerByte() for name in names})
        self.by_distance = nn.ModuleList(BitsPerByte() for _ in range(NUM_DISTANCE_RANGES))
        self._states: dict[str, MemoryState] = {}

    def _distance_ranges(self) -> Iterator[tuple[int, BitsPerByte]]:
        for number, metric in enumerate(self.by_distance):
            assert isinstance(metric, BitsPerByte)
            yield self.segment_length * 4**number, metric

    @torch.no_grad()
    def update(
        self, model: RecurrentLanguageModel, batch: Batch, nll: Tensor, state: MemoryState, *, is_first: bool
    ) -> None:
        """Read a batch again without each source and without all; do nothing for a model without memory.

        The model is in eval mode and ``state`` the one before the batch, whose last segment may be short. ``nll`` is
        the negative log-likelihood of each label with the memory, ``(batch, length)`` in nats. ``is_first`` begins the
        readings without a source from ``state``.
        """
        if not any(leaf.numel() for leaf in pytree.tree_leaves(state.layers)):
            return
        assert isinstance(model, nn.Module)
        if is_first:
            self._states.clear()

        def read(part: slice, state: MemoryState) -> UnrollOutput:
            tokens, labels, begins = (x[:, part] for x in (batch.tokens, batch.labels, batch.document_starts))
            return unroll(model, tokens, labels, begins, state, segment_length=self.segment_length)

        window_nll, length = nll, nll.shape[1]
        for name, hidden in self._readings.items():
            with hide_sources(model, hidden):
                output = read(slice(length), self._states.get(name, state))
            self._states[name] = output.state
            self._update(name, batch, output.nll.double() - nll.double())
            if name == "memory_gain":
                window_nll = output.nll
                self._update_distances(batch, output.nll.double() - nll.double(), state)
        fresh = []
        with hide_sources(model, self.sources):
            for start in range(0, length, self.segment_length):
                part = slice(start, start + self.segment_length)
                fresh.append(read(part, model.init_state(len(nll))).nll)
        window_gain = torch.cat(fresh, dim=1).double() - window_nll.double()
        self._update("memory_gain/window", batch, window_gain)

    def _update(self, name: str, batch: Batch, gain: Tensor) -> None:
        cast(Metric, self.by_source[name]).update(gain, batch.num_bytes)

    def _update_distances(self, batch: Batch, gain: Tensor, state: MemoryState) -> None:
        token_bytes = _bytes_of_tokens(batch)
        positions = Segment.from_document_starts(state.position, gain.shape[1], batch.document_starts).position
        last = self.segment_length * 4 ** (NUM_DISTANCE_RANGES - 1)
        for low, metric in self._distance_ranges():
            in_range = (positions >= low) & ((positions < 4 * low) | (low == last))
            metric.update(gain * in_range, (token_bytes * in_range).sum(1))

    def compute_and_reset(self) -> dict[str, Tensor]:
        """Return the gains by name.

        ``memory_gain`` is that of all sources, ``memory_gain_N`` the same N to 4 N tokens into a document, where the
        last range has no end, ``memory_gain/SOURCE`` that of one source, and ``memory_gain/window`` that of the exact
        window. Ranges that no text reached are left out, on all ranks alike.
        """
        metrics = {name: cast(Metric, metric) for name, metric in self.by_source.items()}
        metrics |= {f"memory_gain_{low}": metric for low, metric in self._distance_ranges()}
        values = {name: metric.compute().float() for name, metric in metrics.items() if metric.update_called}
        for metric in metrics.values():
            metric.reset()
        self._states.clear()
        if len(self.sources) == 1 and "memory_gain" in values:
            values[f"memory_gain/{self.sources[0]}"] = values["memory_gain"]
        return {name: value for name, value in values.items() if not value.isnan()}

"""Training of encoder-decoders on texts and their targets, with ROUGE of what they generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.functional.text.rouge import rouge_score

from memtx.data.batch import IGNORE_INDEX
from memtx.data.tasks.text_to_text import TextToTextBatch
from memtx.errors import MemtxError, check_probability
from memtx.models.beam_search import BeamSearchOptions, generate_targets
from memtx.models.encoder_decoder import EncoderDecoder
from memtx.training.base_module import BaseModule
from memtx.training.initial_model import load_initial_model

ROUGE_KEYS = ("rouge1", "rouge2", "rougeL")


class TextToTextModule(BaseModule):
    """Trains an encoder-decoder with the true tokens as the decoder's inputs.

    Validation and test log ``loss`` and, with ``generate``, the F-measures ``rouge1``, ``rouge2`` and ``rougeL`` (Lin
    2004) of greedily generated texts.

    Args:
        model: Creates the model from the vocabulary size.
        pretrained: Folder of a Hugging Face or memtx encoder-decoder, checkpoint or run folder to begin with; ``model``
            is then ignored.
        vocab_size: Vocabulary size; set from the data module.
        label_smoothing: Share of the probability that the loss spreads over all tokens (Szegedy et al. 2016, section
            7). From 0 to 1.
        generate: If True, generate texts in validation and test.
        **options: ``optimizer`` and ``scheduler`` of :class:`BaseModule`.

    Raises:
        MemtxError: A number is out of range, or the pretrained model is no encoder-decoder or has a smaller vocabulary.
    """

    model: EncoderDecoder

    def __init__(
        self,
        model: Callable[[int], EncoderDecoder] | None = None,
        pretrained: str | None = None,
        vocab_size: int = 8192,
        label_smoothing: float = 0.0,
        generate: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_probability(label_smoothing=label_smoothing)
        if pretrained is not None:
            self.model = load_initial_model(pretrained, EncoderDecoder, "an encoder-decoder", vocab_size)
        elif model is not None:
            self.model = model(vocab_size)
        else:
            raise MemtxError("There is no model.", "Give model.model or model.pretrained.")
        self.label_smoothing, self.generate = label_smoothing, generate
        names = ("loss", *(ROUGE_KEYS if generate else ()))
        self.metrics = nn.ModuleDict({f"{stage}_{name}": MeanMetric() for stage in ("val", "test") for name in names})

    def _loss(self, batch: TextToTextBatch, label_smoothing: float) -> Tensor:
        output = self.model(batch.tokens, batch.attention_mask, batch.global_attention_mask, labels=batch.labels)
        logits: Tensor = output.logits.flatten(0, 1)
        labels = batch.labels.flatten()
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing)

    def training_step(self, batch: TextToTextBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._log_training_step(self._loss(batch, self.label_smoothing), batch.tokens)

    def evaluate_batch(self, stage: str, batch: TextToTextBatch, batch_idx: int) -> None:
        """Update the metrics of a stage."""
        metrics = {name: cast(MeanMetric, metric) for name, metric in self.metrics.items()}
        metrics[f"{stage}_loss"].update(self._loss(batch, 0.0), int((batch.labels != IGNORE_INDEX).sum()))
        if not self.generate:
            return
        tokenizer = self.datamodule.tokenizer
        limit = min(self.datamodule.max_target_length + 1, self.model.position_embeddings.num_embeddings)
        targets = generate_targets(
            self.model, *batch[:3], options=BeamSearchOptions(max_length=limit),
            eos_token_ids=tokenizer.eos_token_ids or {tokenizer.sep_token_id},
        )  # fmt: skip
        texts = [tokenizer.decode(target[1:]).strip() for target in targets]
        scores = rouge_score(texts, batch.summaries, rouge_keys=ROUGE_KEYS)
        for key in ROUGE_KEYS:
            metrics[f"{stage}_{key}"].update(scores[f"{key}_fmeasure"], len(texts))

    def log_at_epoch_end(self, stage: str) -> None:
        """Log loss and ROUGE."""
        for name, metric in self.metrics.items():
            if name.startswith(f"{stage}_"):
                self.log(name, cast(MeanMetric, metric), prog_bar=True)

"""A recurrent model of vectors: speech frames, sensor series, observations of agents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import MemtxError, check_at_least
from memtx.layers.vector_heads import RegressionHead
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.recurrent_lm import MemoryOutput
from memtx.models.validation import check_vectors
from memtx.ops.cpu.linear import Linear
from memtx.state import MemoryState


class SequenceModel(PretrainedModel):
    """An encoder of vectors, a memory transformer that reads them, and a head that predicts vectors.

    Args:
        input_dim: Width of the input vectors.
        output_dim: Width of the predicted vectors.
        backbone: Factory of the recurrent model, given a vocabulary size, which has no effect: its embedding and head
            are removed.
        encoder: Factory of the encoder, given input_dim and dim.
        head: Factory of the head, given dim and output_dim: ``RegressionHead``, ``GaussianMixtureHead`` or a module of
            your own; see :class:`memtx.layers.vector_heads.VectorHead`.

    Raises:
        MemtxError: A number is out of range, or the backbone has an ``output_memory``, which copies token ids.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        backbone: Callable[[int], nn.Module] = MemoryTransformer,
        encoder: Callable[[int, int], nn.Module] = Linear,
        head: Callable[[int, int], nn.Module] = RegressionHead,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        check_at_least(1, input_dim=input_dim, output_dim=output_dim)
        self.save_init_args(arguments)
        self.input_dim, self.output_dim = input_dim, output_dim
        module = backbone(1)
        if getattr(module, "output_memory", None) is not None:
            message = "The backbone has an output_memory, which copies token ids."
            raise MemtxError(message, "Remove output_memory from the backbone.")
        # They would have no gradient. The head's input is then the output.
        module.embedding, module.head = nn.Identity(), nn.Identity()
        self.backbone = module
        dim = cast(int, module.dim)
        self.encoder, self.head = encoder(input_dim, dim), head(dim, output_dim)

    @property
    def activation_checkpointing(self) -> bool:
        """If True, the backbone recomputes each layer in the backward pass."""
        return bool(getattr(self.backbone, "activation_checkpointing", False))

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        cast(Any, self.backbone).activation_checkpointing = value

    @property
    def supports_padding(self) -> bool:
        """If True, the streams of a call may have different lengths (``valid_length``)."""
        return bool(self.backbone.supports_padding)

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MemoryState:
        """Return the state of ``batch_size`` fresh streams; dtype and device default to the weights'."""
        backbone = cast(Any, self.backbone)
        return cast(MemoryState, backbone.init_state(batch_size, dtype=dtype, device=device))

    def forward(
        self,
        inputs: Tensor,
        state: MemoryState | None = None,
        *,
        document_starts: Tensor | None = None,
        labels: Tensor | None = None,
        valid_length: Tensor | None = None,
        return_hidden_states: bool = False,
    ) -> MemoryOutput:
        """Read one segment.

        Args:
            inputs: ``(batch, length, input_dim)``, cast to the dtype of the weights.
            state: State returned by the previous call; None for fresh streams.
            document_starts: ``(batch, length)`` bool, True where an episode begins; later steps see nothing before it.
            labels: ``(batch, length, output_dim)``, the vector to predict at each step; NaN components are ignored.
            valid_length: As in :meth:`memtx.MemoryTransformer.forward`.
            return_hidden_states: If True, return the hidden states.

        Returns:
            Output whose ``logits`` are the head's output, also with labels; its losses are those of the head.

        Raises:
            MemtxError: Shapes do not fit each other, or labels are given and the head has no ``nll``.
        """
        check_vectors("inputs", inputs, self.input_dim)
        if labels is not None:
            self._check_labels(inputs, labels)
        output: MemoryOutput = self.backbone(
            None,
            state,
            inputs_embeds=self.encoder(inputs.to(next(self.parameters()).dtype)),
            document_starts=document_starts,
            valid_length=valid_length,
            return_hidden_states=return_hidden_states,
        )
        prediction = self.head(output.logits)
        loss = mean_nll = nll = None
        if labels is not None:
            step_nll: Tensor = cast(Any, self.head).nll(prediction, labels)
            mean_nll = step_nll.sum() / (~labels.isnan()).any(-1).sum().clamp(min=1)
            loss, nll = mean_nll + sum(output.aux_losses.values()), step_nll.detach()
        return MemoryOutput(prediction, output.hidden_states, output.state, loss, mean_nll, nll, output.aux_losses)

    def mean(self, prediction: Tensor) -> Tensor:
        """Return the expected vectors ``(..., output_dim)`` of the head's output."""
        mean = getattr(self.head, "mean", None)
        return prediction if mean is None else cast(Tensor, mean(prediction))

    def std(self, prediction: Tensor) -> Tensor | None:
        """Return the standard deviations ``(..., output_dim)`` of the head's output; None if the head has none."""
        std = getattr(self.head, "std", None)
        return None if std is None else cast("Tensor | None", std(prediction))

    def _check_labels(self, inputs: Tensor, labels: Tensor) -> None:
        check_vectors("labels", labels, self.output_dim)
        if labels.shape[:2] != inputs.shape[:2]:
            expected = (*inputs.shape[:2], self.output_dim)
            raise MemtxError(f"labels is {tuple(labels.shape)}, expected {expected}.", "Match inputs.")
        if not hasattr(self.head, "nll"):
            message = f"labels were given, but the head, {type(self.head).__name__}, has no nll(prediction, labels)."
            raise MemtxError(message, "Add it to the head, or compute the loss from logits.")

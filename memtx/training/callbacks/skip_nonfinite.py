"""Skipping of optimizer steps with a non-finite loss or gradient, and the search for its source."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from memtx.checkpoint import rng, trainer_state
from memtx.errors import MemtxError, check_at_least
from memtx.training.carry import get_carry

ALL_FINITE = "In a second pass, the outputs of all layers were finite."


class SkipNonFinite(pl.Callback):
    """Skips optimizer steps with a non-finite loss or gradient, and stops the run after too many in a row.

    A skipped step changes neither weights nor optimizer state, and the carried memory returns to its state before the
    step's first batch. A stream is reset if a document begins in the skipped batches or its memory was not finite. The
    step counts as one of the run, so schedule and data position advance. All processes skip the same steps.

    Logs ``grad_norm``, before clipping, and after the first skipped step ``skipped_steps``, the total of the run.

    Checks once per optimizer step, between backward pass and update, which on a GPU waits for the backward pass. With
    ``precision: 16-mixed``, the gradient scaler skips overflows, and they are not counted here.

    Args:
        patience: Consecutive steps that may be skipped before the run stops. Defaults to 10.

    Attributes:
        num_skipped: Skipped steps of the whole run.
        num_consecutive: Skipped steps since the last good one.

    Raises:
        MemtxError: ``patience`` is below 1; in training, it is exceeded.
    """

    def __init__(self, patience: int = 10) -> None:
        check_at_least(1, patience=patience)
        self.patience = patience
        self.num_skipped = self.num_consecutive = 0
        self._losses: list[Tensor] = []
        self._batch: Any = None
        self._document_starts: list[Tensor] = []
        self._nonfinite_source = ""

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"num_skipped": self.num_skipped, "num_consecutive": self.num_consecutive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.num_skipped, self.num_consecutive = state_dict["num_skipped"], state_dict["num_consecutive"]

    @property
    def is_unstable(self) -> bool:
        """True if the last step was skipped."""
        return self.num_consecutive > 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot of the memory before a step's first batch."""
        self._batch = batch
        if (carry := get_carry(pl_module)) is None:
            return
        if not self._losses:
            carry.snapshot("train")
            self._document_starts.clear()
        self._document_starts.append(batch.document_starts)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Remember the loss; a step has one per accumulated batch."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Skip the step if a loss or gradient is non-finite on any process."""
        losses, self._losses = self._losses, []
        grad_norm = _compute_grad_norm(optimizer)
        pl_module.log("grad_norm", grad_norm)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        values = losses if scaler is not None else [*losses, grad_norm]
        is_bad = ~torch.stack([value.float() for value in values]).isfinite().all()
        if trainer.world_size > 1:
            is_bad = trainer.strategy.reduce(is_bad.float(), reduce_op="sum")
        if bool(is_bad):
            self._skip_step(trainer, pl_module, optimizer, losses, grad_norm)
        else:
            self.num_consecutive, self._batch = 0, None

    def _skip_step(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        losses: list[Tensor],
        grad_norm: Tensor,
    ) -> None:
        carry = get_carry(module)
        if carry is not None:
            carry.rollback("train")
        if not self.num_consecutive:
            self._nonfinite_source = find_first_nonfinite(trainer, module, self._batch)
        if carry is not None:
            carry.rollback("train", torch.cat(self._document_starts, dim=1).any(1))
        # Optimizers ignore parameters without a gradient, and keep their state.
        optimizer.zero_grad(set_to_none=True)
        self.num_skipped, self.num_consecutive, self._batch = self.num_skipped + 1, self.num_consecutive + 1, None
        module.log("skipped_steps", float(self.num_skipped))
        problem = next((f"loss is {float(loss)}" for loss in losses if not loss.isfinite()), None)
        if problem is None:
            is_local = not grad_norm.isfinite()
            problem = f"gradient norm is {float(grad_norm)}" if is_local else "loss of another process is nan"
        if self.num_consecutive >= self.patience:
            raise MemtxError(
                f"The {problem} at step {trainer.global_step}, and {self.num_consecutive} steps in a row were skipped. "
                f"{self._nonfinite_source}",
                "Training diverged: lower the learning rate, warm up longer or clip the gradient; the last checkpoint "
                "of the run is from before.",
            )
        trainer_state.write_status(
            trainer,
            f"The {problem}: the step is skipped, and the memory returns to its state before it "
            f"({self.num_consecutive} in a row, {self.num_skipped} in total). {self._nonfinite_source}",
        )


def _compute_grad_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the norm of all gradients of this process, ``()``; non-finite if one of them is."""
    gradients = (parameter.grad for group in optimizer.param_groups for parameter in group["params"])
    return torch.nn.utils.get_total_norm(
        [
            gradient.to_local() if isinstance(gradient, DTensor) else gradient
            for gradient in gradients
            if gradient is not None
        ]
    )


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all())


def find_first_nonfinite(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> str:
    """Return a sentence that names the first layer with non-finite numbers after the backward pass of a batch.

    Reads the batch once more without gradients and checks every output, so it is meant for a step that failed. The
    state of the random number generators does not change.
    """
    message = _find_on_this_rank(trainer, module, batch)
    if trainer.world_size == 1:
        return message
    messages: list[str] = [message] * trainer.world_size
    torch.distributed.all_gather_object(messages, message)
    # A rank that found the source knows more than those that its gradient reached.
    sources = (f"{text[:-1]} (process {rank})." for rank, text in enumerate(messages) if text != ALL_FINITE)
    return next(sources, ALL_FINITE)


def _find_on_this_rank(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> str:
    weights = [name for name, parameter in module.named_parameters() if _is_nonfinite(parameter.detach())]
    if weights:
        return f"The weights of {weights[0]} are the first that are not finite."
    # Gradients spread toward the input, so the last layer with a non-finite one is the source.
    gradients = [name for name, parameter in module.named_parameters() if _is_nonfinite(parameter.grad)]
    if layer := _find_nonfinite_layer(trainer, module, batch):
        return f"The output of {layer} is the first that is not finite."
    if gradients:
        return (
            f"The outputs are finite; in the backward pass, the gradient of {gradients[-1]} is the first that is not."
        )
    return ALL_FINITE


def _find_nonfinite_layer(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> str:
    """Return the name of the first layer with a non-finite output; empty if there is none."""
    nonfinite: list[str] = []

    def check_output(name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        if not nonfinite and any(_is_nonfinite(leaf) for leaf in pytree.tree_leaves(output)):
            nonfinite.append(name)

    # A module's hook runs after those of its submodules, so the innermost comes first.
    layers = [(name, layer) for name, layer in module.named_modules() if name]
    handles = [layer.register_forward_hook(partial(check_output, name)) for name, layer in layers]
    rng_state, tokens_seen = rng.get_rng_state(), getattr(module, "tokens_seen", 0)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), trainer.precision_plugin.train_step_context():
            module.training_step(batch, 0)
    finally:
        rng.set_rng_state(rng_state)
        module.tokens_seen = tokens_seen  # type: ignore[assignment]
        del module.log
        for handle in handles:
            handle.remove()
    return nonfinite[0] if nonfinite else ""

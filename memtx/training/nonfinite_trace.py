"""Search for the first non-finite weight, layer output or gradient."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from memtx.checkpoint import rng

ALL_FINITE = "In a second pass, the outputs of all layers were finite."


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all())


def find_first_nonfinite(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> str:
    """Return a sentence that names the first layer with non-finite numbers.

    Reads the batch once more without gradients and checks every output, so it is meant for a step that failed. The
    state of the random number generators does not change.

    Args:
        trainer: Trainer of the run.
        module: Trained module with the gradients of the failed step.
        batch: Batch of the step's last backward pass.
    """
    message = _find_on_this_rank(trainer, module, batch)
    if trainer.world_size == 1:
        return message
    messages: list[str] = [message] * trainer.world_size
    torch.distributed.all_gather_object(messages, message)
    # A rank that found the source knows more than those that its gradient reached.
    found = (f"{text[:-1]} (process {rank})." for rank, text in enumerate(messages) if text != ALL_FINITE)
    return next(found, ALL_FINITE)


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
    layers: list[str] = []

    def check_output(name: str, layer: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if not layers and any(_is_nonfinite(leaf) for leaf in pytree.tree_leaves(output)):
                layers.append(name)

        return layer.register_forward_hook(hook)

    # A module's hook runs after those of its submodules, so the innermost comes first.
    handles = [check_output(name, layer) for name, layer in module.named_modules() if name]
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
    return layers[0] if layers else ""

"""Where numbers that are not finite come from first: weights, a layer's output, or a gradient."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memtx.checkpoint import rng

ALL_FINITE = "Read again, every layer's output was finite."


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all())


def find_first_nonfinite(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> str:
    """Return a sentence that says which layer is the first with numbers that are not finite.

    A batch is read once more, without gradients; the course of random numbers is left as it was. For the rare step
    that went wrong: it looks at every output.

    Args:
        trainer: of the run.
        module: the trained module, its gradients still there.
        batch: that the step's last backward pass was of.
    """
    said = _find_on_this_rank(trainer, module, batch)
    if trainer.world_size > 1:
        every: list[str] = [said] * trainer.world_size
        torch.distributed.all_gather_object(every, said)
        # The process that found something knows more than those that its gradient reached.
        said = next(
            (f"{one[:-1]} (process {rank})." for rank, one in enumerate(every) if one != ALL_FINITE), ALL_FINITE
        )
    return said


def _find_on_this_rank(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> str:
    weights = [name for name, parameter in module.named_parameters() if _is_nonfinite(parameter.detach())]
    if weights:
        return f"The weights of {weights[0]} are the first that are not finite."
    # A gradient spreads toward the input: the last layer that has it is the one that it comes from.
    gradients = [name for name, parameter in module.named_parameters() if _is_nonfinite(parameter.grad)]
    if found := _find_nonfinite_layer(trainer, module, batch):
        return f"The output of {found} is the first that is not finite."
    if gradients:
        return f"The outputs are finite; going backward, the gradient of {gradients[-1]} is the first that is not."
    return ALL_FINITE


def _skip_logging(*_: Any, **options: Any) -> None:
    """Log nothing: the step is logged already."""


def _find_nonfinite_layer(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> str:
    found: list[str] = []

    def watch(name: str, part: nn.Module) -> Any:
        def look(_: nn.Module, given: Any, out: Any) -> None:
            if not found and any(_is_nonfinite(leaf) for leaf in pytree.tree_leaves(out)):
                found.append(name)

        return part.register_forward_hook(look)

    # Parts that have parts end after them, so the innermost comes first.
    hooks = [watch(name, part) for name, part in module.named_modules() if name]
    before, seen = rng.get_rng_state(), getattr(module, "tokens_seen", 0)
    module.log = _skip_logging  # type: ignore[method-assign]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), trainer.precision_plugin.train_step_context():
            module.training_step(batch, 0)
    finally:
        rng.set_rng_state(before)
        module.tokens_seen = seen  # type: ignore[assignment]
        del module.log
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""

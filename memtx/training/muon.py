"""Muon for the matrices of a model, with AdamW for all other parameters (Jordan et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

ADAMW_LR = 1e-3  # unless Muon's is on AdamW's scale


class MuonWithAdamW(Optimizer):
    """One optimizer of two, whose learning rates a schedule scales together; see :func:`add_adamw`."""

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self._parts: tuple[Optimizer, Optimizer] = (muon, adamw)
        self._num_muon_groups = len(muon.param_groups)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters once; the closure, which computes the gradients, is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups[: self._num_muon_groups], self.param_groups[self._num_muon_groups :]
        for part, part_groups in zip(self._parts, groups, strict=True):
            # Both parts work on the groups and the state of this one, which a checkpoint or a schedule may replace.
            part.param_groups, part.state = part_groups, self.state
            part.step()
        return loss


def find_hidden_matrices(model: nn.Module) -> set[Tensor]:
    """Return the trainable weights of linear layers, except those of heads and those shared with an embedding."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not any(part.endswith("head") for part in name.split("."))
        if layer.weight.requires_grad and layer.weight.dim() == 2 and layer.weight not in embeddings
    }


def add_adamw(
    make_muon: Callable[[Any], Muon], model: nn.Module, groups: list[dict[str, Any]], gates: Collection[Tensor] = ()
) -> Optimizer:
    """Return Muon for the hidden matrices except the gates', with AdamW for all other parameters.

    AdamW's learning rate is 1e-3, or Muon's if that is on its scale.
    """
    matrices = find_hidden_matrices(model).difference(gates)
    parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for group in groups:
        for is_hidden, part in parts.items():
            weights = [weight for weight in group["params"] if (weight in matrices) == is_hidden]
            part += [{**group, "params": weights}] if weights else []
    muon = make_muon(parts[True]) if parts[True] else None
    if muon is not None and not parts[False]:
        return muon
    matched = muon is not None and muon.defaults["adjust_lr_fn"] == "match_rms_adamw"
    lr = muon.defaults["lr"] if muon is not None and matched else ADAMW_LR
    adamw = AdamW(parts[False], lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    return adamw if muon is None else MuonWithAdamW(muon, adamw)

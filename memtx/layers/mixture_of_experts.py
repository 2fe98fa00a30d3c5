"""A feed-forward part of experts, few of which see each token (Shazeer et al. 2017; as in Qwen3-Next)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError, check_at_least
from memtx.layers.feed_forward import SwiGLU
from memtx.ops.cpu.linear import Linear


class MixtureOfExperts(nn.Module):
    """The gated feed-forward parts of the ``top_k`` most probable experts of each token, weighted, and a shared one.

    Args:
        dim: Width of the hidden states.
        hidden_dim: Inner width of an expert.
        num_experts: Number of experts.
        top_k: Experts that see a token.
        shared_hidden_dim: Inner width of the expert that sees every token, through a gate. 0 disables it.
        normalize_weights: If True, the weights of a token's experts add up to 1.
        activation: Factory of the gates' activation.

    Raises:
        MemtxError: A number is out of range.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int,
        shared_hidden_dim: int = 0,
        normalize_weights: bool = True,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        check_at_least(1, hidden_dim=hidden_dim, num_experts=num_experts, top_k=top_k)
        if top_k > num_experts:
            raise MemtxError(f"top_k is {top_k} for {num_experts} experts.", "Give at most the number of experts.")
        self.num_experts, self.top_k, self.normalize_weights = num_experts, top_k, normalize_weights
        self.router = Linear(dim, num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden_dim, dim))
        self.out = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        nn.init.normal_(self.gate_up, std=0.02)
        nn.init.normal_(self.out, std=0.02)
        self.activation = activation()
        self.shared = SwiGLU(dim, shared_hidden_dim, activation=activation) if shared_hidden_dim else None
        self.shared_gate = Linear(dim, 1, bias=False) if shared_hidden_dim else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., dim)`` to the same shape."""
        tokens = x.reshape(-1, x.shape[-1])
        probabilities = torch.softmax(self.router(tokens), dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self.normalize_weights:
            weights = weights / weights.sum(-1, keepdim=True)
        out = self._run_experts(tokens, experts, weights.to(x.dtype))
        if self.shared is not None and self.shared_gate is not None:
            out = out + torch.sigmoid(self.shared_gate(tokens)) * self.shared(tokens)
        return out.view(x.shape)

    def _run_experts(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sums of the experts' outputs for ``(tokens, dim)``; experts: ``(tokens, top_k)``."""
        if experts.numel() <= self.num_experts:
            # Few tokens read no expert twice, so each gathers its own weights, without a copy to the host.
            hidden = torch.einsum("nd,nkhd->nkh", tokens, self.gate_up[experts])
            return torch.einsum("nkh,nkdh,nk->nd", self._activate(hidden), self.out[experts], weights)
        if torch.compiler.is_exporting():  # No program can hold groups of varying sizes: all experts map all tokens.
            shares = torch.zeros(len(tokens), self.num_experts, dtype=tokens.dtype).scatter(1, experts, weights)
            hidden = self._activate(torch.einsum("nd,ehd->neh", tokens, self.gate_up))
            return torch.einsum("neh,edh,ne->nd", hidden, self.out, shares)
        order = experts.flatten().argsort(stable=True)
        token = order // self.top_k
        counts = experts.flatten().bincount(minlength=self.num_experts).tolist()
        groups = torch.split(tokens[token], counts)
        outputs = [
            self._activate(group @ self.gate_up[index].mT) @ self.out[index].mT
            for index, group in enumerate(groups)
            if len(group)
        ]
        return torch.zeros_like(tokens).index_add(0, token, torch.cat(outputs) * weights.flatten()[order, None])

    def _activate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        out: Tensor = self.activation(gate) * up
        return out

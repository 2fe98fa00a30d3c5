"""Small language models to export, and the comparison of a program's step with theirs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memtx.memory.copy_memory import CopyMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState
from tests.memory_zoo import KINDS

Step = Callable[[Tensor, Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]

VOCAB_SIZE = 11


def model_of(*kinds: str, vocab_size: int = VOCAB_SIZE) -> MemoryTransformer:
    """Return a model with a layer per kind, and a copy memory if "copy" is among them."""
    torch.manual_seed(0)
    memories: Any = [KINDS[kind](6, 3, 4) for kind in kinds]
    output_memory = partial(CopyMemory, num_entries=9, key_dim=3) if "copy" in kinds else None
    model = MemoryTransformer(
        vocab_size, dim=8, depth=len(kinds), heads=2, memories=memories, output_memory=output_memory
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4) if weight.dim() > 1 else None  # logits far from uniform, so that a wrong memory shows
    return model.eval()


def max_difference(step: Step, model: MemoryTransformer, length: int, batch_size: int = 2) -> float:
    """Return the largest difference of logits and states over segments in whose second documents start."""
    generator = torch.Generator().manual_seed(1)
    state: MemoryState = model.init_state(batch_size)
    tensors, worst = state.named_tensors(), 0.0
    for index in range(3 if length > 1 else 7):
        tokens = torch.randint(0, model.vocab_size, (batch_size, length), generator=generator)
        document_starts = torch.zeros(batch_size, length, dtype=torch.bool)
        if index == 1:
            document_starts[0, length // 3] = document_starts[-1, 0] = True
        with torch.no_grad():
            output = model(tokens, state, document_starts=document_starts)
        assert output.logits is not None
        logits, tensors = step(tokens, document_starts, tensors)
        state = output.state
        expected = {"logits": output.logits, **state.named_tensors()}
        assert tensors.keys() == state.named_tensors().keys()
        for name, tensor in {"logits": logits, **tensors}.items():
            assert tensor.shape == expected[name].shape
            assert tensor.dtype == expected[name].dtype
            if tensor.numel():
                worst = max(worst, float((tensor.double() - expected[name].double()).detach().abs().max()))
    return worst

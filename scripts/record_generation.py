"""Record what `transformers` computes for tests/inference/recorded: logits processors, and generated texts.

Run it with a Python that has torch, transformers and tokenizers; the tests need none of it.

    python scripts/record_generation.py tests/inference/recorded --book PATH/book.txt
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 48
FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.9},
    {"top_k": 5},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"min_p": 0.2},
    {"typical_p": 0.5},
    {"typical_p": 0.9},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8},
    {"top_p": 0.9, "min_p": 0.15},
    {"top_p": 0.9, "typical_p": 0.7},
    {"min_p": 0.05, "typical_p": 0.7},
    {"repetition_penalty": 1.4, "top_k": 9},
    {"repetition_penalty": 0.8, "logit_bias": {3: 2.5, 7: -3.0}, "top_p": 0.8},
]


def record_filters(path: Path) -> None:
    """Write logits, the ids read so far, and the probabilities after the processors of each setting."""
    from transformers.generation import logits_process

    generator = torch.Generator().manual_seed(0)
    cases = []
    for settings in FILTERS:
        logits = torch.randn(1, VOCAB_SIZE, generator=generator) * 2.5
        ids = torch.randint(0, VOCAB_SIZE, (1, 12), generator=generator)
        scores = logits.clone()
        processors: list[tuple[str, Callable[[Any], Any]]] = [
            (
                "logit_bias",
                lambda bias: logits_process.SequenceBiasLogitsProcessor([[[k], v] for k, v in bias.items()]),
            ),
            ("repetition_penalty", logits_process.RepetitionPenaltyLogitsProcessor),
            ("temperature", logits_process.TemperatureLogitsWarper),
            ("top_k", logits_process.TopKLogitsWarper),
            ("top_p", logits_process.TopPLogitsWarper),
            ("min_p", logits_process.MinPLogitsWarper),
            ("typical_p", logits_process.TypicalLogitsWarper),
        ]
        for name, create in processors:
            if name in settings:
                scores = create(settings[name])(ids, scores)
        cases.append(
            {
                "settings": settings,
                "logits": logits[0].tolist(),
                "ids": ids[0].tolist(),
                "probabilities": scores[0].softmax(0).tolist(),
            }
        )
    path.write_text(json.dumps(cases))

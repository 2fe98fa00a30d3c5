"""Trainer and peft train language models as models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import memtx
from memtx.data.tokenizers import ByteTokenizer
from tests.hf.test_transformers_model import create, ids, offline, opened

transformers = pytest.importorskip("transformers", reason="transformers is not installed (memtx[hf])")
__all__ = ["offline"]


def examples(count: int = 8, length: int = 40) -> list[dict[str, list[int]]]:
    texts = [[(start + index) % 50 for index in range(length - start % 3)] for start in range(count)]
    return [{"input_ids": text} for text in texts]


def train(model: Any, folder: Path, tokenizer: Any, **options: Any) -> list[float]:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], save_steps=10,
        logging_steps=1, use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=examples(), eval_dataset=examples(4), data_collator=collator,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < trainer.state.log_history[0]["loss"]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer(tmp_path: Path) -> None:
    wrapped = opened(create("compressed"), tmp_path / "hf", tokenizer=ByteTokenizer())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    losses = train(wrapped, tmp_path / "run", tokenizer, activation_checkpointing=True)
    assert losses[-1] < losses[0] - 0.5
    assert wrapped.model.activation_checkpointing is False  # off again, in eval mode
    saved = tmp_path / "run" / "checkpoint-20"
    again = transformers.AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    with torch.no_grad():
        expected = wrapped.eval()(ids()).logits
        torch.testing.assert_close(again(ids()).logits, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(memtx.from_pretrained(saved)(ids()).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (memtx[retrofit])")
    base = opened(create("many memories"), tmp_path / "hf", tokenizer=ByteTokenizer())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    adapted = peft.get_peft_model(base, config)
    losses = train(adapted, tmp_path / "run", tokenizer)
    assert losses[-1] < losses[0] - 0.1
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True).eval()
    with torch.no_grad():
        expected = adapted(ids()).logits
        assert torch.equal(again(ids()).logits, expected)
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = memtx.from_pretrained(tmp_path / "merged")(ids()).logits
    # Merged weights are rounded.
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)

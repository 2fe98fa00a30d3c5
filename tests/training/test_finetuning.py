"""Fine-tuning modules learn simple rules, evaluate correctly, and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from memtx.checkpoint.training import AtomicCheckpointIO
from memtx.data.tasks.data_module import TaskDataModule
from memtx.errors import CheckpointError, DataError, MemtxError
from memtx.inference.predictor import Predictor, is_task_model
from memtx.training.callbacks.freeze import Freeze
from memtx.training.finetuning import ClassificationModule, TaskModule
from tests.tasks import KINDS, MODULES, body, folder, records, task, write_lines
from tests.training.small import assert_equal, weights


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def parts(kind: str, root: Path, **options: Any) -> tuple[TaskModule, TaskDataModule]:
    pl.seed_everything(0)
    data = TaskDataModule(task(kind), str(root), batch_size=4)
    data.tokenizer._vocab_size = 200
    sizes: dict[str, Any] = {
        "vocab_size": data.vocab_size,
        "num_labels": data.num_labels,
        "mask_token_id": data.mask_token_id,
    }
    return MODULES[kind](backbone=body(), optimizer=adam, scheduler=None, **sizes, **options), data


def trainer(**options: Any) -> pl.Trainer:
    base: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "use_distributed_sampler": False, "plugins": [AtomicCheckpointIO()],
    }  # fmt: skip
    return pl.Trainer(**(base | options))


@pytest.mark.parametrize(("kind", "measure"), [("classification", "accuracy"), ("tagging", "f1"), ("questions", "f1")])
def test_each_task_learns_a_simple_rule(kind: str, measure: str, tmp_path: Path) -> None:
    module, data = parts(kind, folder(tmp_path, kind, 48))
    run = trainer(max_epochs=25)
    run.fit(module, data)
    # Guessing reaches half of that at most.
    assert float(run.callback_metrics[f"val_{measure}"]) > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_alone_predicts(kind: str, tmp_path: Path) -> None:
    module, data = parts(kind, folder(tmp_path / "data", kind))
    run = trainer(max_epochs=1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    predictor = Predictor.load(tmp_path / "a.ckpt")
    assert is_task_model(tmp_path / "a.ckpt")
    module.eval()
    expected = Predictor(module.model, data.tokenizer, data.task)
    assert predictor.predict(records(kind, 5)) == expected.predict(records(kind, 5))


def test_resuming_is_exact(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "tagging")
    final_weights = []
    for stop in (None, 8):
        module, data = parts("tagging", root, token_mask_prob=0.3)
        module.train()
        if stop is None:
            run = trainer(max_steps=14)
            run.fit(module, data)
        else:
            run = trainer(max_steps=stop)
            run.fit(module, data)
            run.save_checkpoint(tmp_path / "half.ckpt")
            module, data = parts("tagging", root, token_mask_prob=0.3)
            pl.seed_everything(99)
            run = trainer(max_steps=14)
            run.fit(module, data, ckpt_path=str(tmp_path / "half.ckpt"))
        final_weights.append(weights(module.model))
    assert_equal(*final_weights)


def test_frozen_parameters_keep_their_weights_until_their_epoch(tmp_path: Path) -> None:
    module, data = parts("classification", folder(tmp_path, "classification"))
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            seen.append(weights(pl_module.model))

    before = weights(module.model)
    trainer(max_epochs=3, callbacks=[Freeze(["backbone.*"], epochs=2), Watch()]).fit(module, data)
    names = [name for name in before if name.startswith("backbone.embedding")]
    assert all(torch.equal(seen[1][name], before[name]) for name in before if name.startswith("backbone."))
    assert not any(torch.equal(seen[0][name], before[name]) for name in ("head.out.weight", "head.out.bias"))
    assert not all(torch.equal(seen[2][name], before[name]) for name in names)
    with pytest.raises(MemtxError, match=r"No parameter matches 'bodi\.\*'\."):
        trainer(max_epochs=1, callbacks=[Freeze(["bodi.*"])]).fit(*parts("classification", tmp_path))


def test_a_hugging_face_encoder_initializes_the_backbone(parity: Path, tmp_path: Path) -> None:
    from memtx import from_pretrained

    encoder_path = next(path for path in sorted(parity.iterdir()) if path.name.startswith("longformer"))
    encoder: Any = from_pretrained(encoder_path)
    module = ClassificationModule(pretrained=str(encoder_path), vocab_size=50, num_labels=3)
    weights = module.model.backbone.state_dict()
    assert weights
    assert all(torch.equal(weights[name], encoder.state_dict()[name]) for name in weights)
    module.model.save_pretrained(tmp_path)
    assert type(module.model).from_pretrained(tmp_path).fingerprint == module.model.fingerprint
    with pytest.raises(MemtxError, match="tokens, the tokenizer has 1000000"):
        ClassificationModule(pretrained=str(encoder_path), vocab_size=10**6)


def test_unusable_data_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", "classification")
    write_lines(root / "validation.jsonl", [{"text": "a", "label": "pos"}, {"text": "a", "label": "poz"}])
    data = TaskDataModule(task("classification"), str(root))
    with pytest.raises(DataError, match=r"validation.jsonl', line 2: The label 'poz' was never seen"):
        data.setup("fit")
    with pytest.raises(DataError, match="no folder"):
        TaskDataModule(task("classification"), str(tmp_path / "no")).setup("fit")
    (root / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"no train\.jsonl"):
        TaskDataModule(task("classification"), str(root)).setup("fit")
    with pytest.raises(DataError, match="batch_size is 0"):
        TaskDataModule(task("classification"), str(root), batch_size=0)


def test_a_checkpoint_of_another_task_is_rejected(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", "classification")
    module, data = parts("classification", root)
    run = trainer(max_steps=1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    write_lines(root / "train.jsonl", records("classification", 8, seed=77))
    with pytest.raises(CheckpointError, match="another tokenizer or task"):
        trainer(max_steps=2).fit(*parts("classification", root), ckpt_path=str(tmp_path / "a.ckpt"))

"""Distillation in training modules: a frozen, unsaved teacher, exact resume, and cached logits."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from memtx.errors import CheckpointError, MemtxError
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.encoder import Encoder
from memtx.models.heads import MemoryTransformerBackbone, TaskModel
from memtx.models.memory_transformer import MemoryTransformer
from memtx.ops.cpu import cpu_info
from memtx.training.carry import Carry
from memtx.training.distillation import (
    AttentionMSE,
    Distillation,
    EmbeddingMSE,
    EveryKthLayer,
    HardLabels,
    HiddenCosine,
    HiddenMSE,
    LastLayer,
    SoftTargets,
    ValueRelations,
)
from memtx.training.distillation.language import LanguageDistillation
from memtx.training.pretraining import MaskedModule
from tests.tasks import body, folder, records, write_lines
from tests.training import small
from tests.training.small import SEGMENT, Record, adam, assert_equal, data, trainer
from tests.training.test_finetuning import parts
from tests.training.test_finetuning import trainer as task_trainer

ALL = (SoftTargets, HardLabels, HiddenMSE, partial(HiddenCosine, layers=LastLayer()), ValueRelations, EmbeddingMSE)


class Keep(pl.Callback):
    """Saves a checkpoint and copies a folder after a number of batches, as a run that is killed then leaves them."""

    def __init__(self, batches: int, path: Path, folder: Path | None = None) -> None:
        self.batches, self.path, self.folder = batches, path, folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)
            if self.folder is not None:
                shutil.copytree(self.folder, self.folder.with_suffix(".then"))


def decoder_teacher(at: Path) -> str:
    torch.manual_seed(7)
    memories = [partial(RecurrentMemory, window=4 * SEGMENT)]
    MemoryTransformer(257, dim=24, depth=4, heads=2, memories=memories).save_pretrained(at / "teacher")
    return str(at / "teacher")


def language(at: Path, seed: int = 0, **options: Any) -> Any:
    return small.module(seed, distillation=Distillation(str(at / "teacher"), **({"losses": ALL} | options)))


def masked(at: Path, seed: int = 0) -> MaskedModule:
    if not (at / "teacher").exists():
        torch.manual_seed(7)
        Encoder(258, 12, 2, 2, dropout=0.1).save_pretrained(at / "teacher")
    pl.seed_everything(seed, verbose=False)
    part = Distillation(str(at / "teacher"), [*ALL[:2], HiddenMSE, AttentionMSE, ValueRelations])
    return MaskedModule(partial(Encoder, dim=8, depth=1, heads=2, dropout=0.1), optimizer=adam, distillation=part)


def task_teacher(at: Path, kind: str = "tagging") -> tuple[str, Path]:
    root = folder(at / "data", kind)
    module, examples = parts(kind, root)
    run = task_trainer(max_steps=3)
    run.fit(module, examples)
    run.save_checkpoint(at / "teacher.ckpt")
    return str(at / "teacher.ckpt"), root


def test_the_teacher_is_frozen_and_not_saved(tmp_path: Path) -> None:
    decoder_teacher(tmp_path)
    module = language(tmp_path)
    run = trainer(tmp_path, max_steps=3)
    run.fit(module, data(tmp_path))
    (teacher,) = module.distillation._teacher
    saved = MemoryTransformer.from_pretrained(tmp_path / "teacher")
    assert_equal(small.weights(teacher), small.weights(saved))
    assert all(weight.grad is None and not weight.requires_grad for weight in teacher.parameters())
    assert not teacher.training
    optimized = {id(weight) for group in run.optimizers[0].param_groups for weight in group["params"]}
    assert not optimized & {id(weight) for weight in teacher.parameters()}
    # Projections of the student's hidden states are trained with it.
    assert optimized == {id(weight) for weight in module.parameters()}
    run.save_checkpoint(tmp_path / "a.ckpt")
    names = set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    projections = {f"distillation.losses.{position}.project.weight" for position in (2, 3, 5)}
    assert {name for name in names if not name.startswith("model.")} == projections


def test_evaluation_needs_no_teacher(tmp_path: Path) -> None:
    decoder_teacher(tmp_path)
    module = language(tmp_path)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, data(tmp_path))
    run.save_checkpoint(tmp_path / "a.ckpt")
    shutil.rmtree(tmp_path / "teacher")
    path = str(tmp_path / "a.ckpt")
    (metrics,) = trainer(tmp_path).validate(language(tmp_path, 3), data(tmp_path), path, verbose=False)
    (expected,) = trainer(tmp_path).validate(module, data(tmp_path), verbose=False)
    assert metrics == expected
    assert_equal(small.weights(MemoryTransformer.from_pretrained(tmp_path / "a.ckpt")), small.weights(module.model))
    with pytest.raises(CheckpointError, match="teacher' does not exist"):
        trainer(tmp_path, max_steps=4).fit(language(tmp_path), data(tmp_path), ckpt_path=path)


@pytest.mark.parametrize("kind", ["language", "masked"])
def test_resuming_is_exact(kind: str, tmp_path: Path) -> None:
    if kind == "language":
        decoder_teacher(tmp_path)
    make: Any = {"language": language, "masked": masked}[kind]
    full, record = make(tmp_path), Record()
    run = trainer(tmp_path, record, Keep(5, tmp_path / "half.ckpt"), max_steps=8, limit_val_batches=0)
    run.fit(full, data(tmp_path))
    resumed_module, resumed_record = make(tmp_path, 9), Record()
    trainer(tmp_path, resumed_record, max_steps=8, limit_val_batches=0).fit(
        resumed_module, data(tmp_path), ckpt_path=str(tmp_path / "half.ckpt")
    )
    assert sorted(resumed_record.losses) == [5, 6, 7]
    assert resumed_record.losses == {batch: record.losses[batch] for batch in resumed_record.losses}
    assert_equal(small.weights(resumed_module), small.weights(full))


def test_resuming_a_task_is_exact(tmp_path: Path) -> None:
    teacher, root = task_teacher(tmp_path)
    final_weights = []
    for path in (None, str(tmp_path / "half.ckpt")):
        module, examples = parts("tagging", root, token_mask_prob=0.3, distillation=Distillation(teacher, ALL))
        pl.seed_everything(0 if path is None else 99)
        keep = [Keep(7, tmp_path / "half.ckpt")] if path is None else []
        task_trainer(max_steps=12, callbacks=keep).fit(module, examples, ckpt_path=path)
        final_weights.append(small.weights(module.model))
    assert_equal(*final_weights)


@pytest.mark.parametrize("kind", ["classification", "tagging", "questions"])
def test_cached_logits_give_the_same_losses(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, root = task_teacher(tmp_path, kind)
    reads: list[bool] = []
    forward = TaskModel.forward_with_hidden_states

    def spy(self: TaskModel, *inputs: Any, **options: Any) -> Any:
        reads.append(self.training)
        return forward(self, *inputs, **options)

    monkeypatch.setattr(TaskModel, "forward_with_hidden_states", spy)
    losses: list[dict[int, str]] = []
    for cache in (None, tmp_path / "logits", tmp_path / "logits"):
        reads.clear()
        distillation = Distillation(
            teacher, [SoftTargets, HardLabels], cache_dir=None if cache is None else str(cache), top_k=200
        )
        module, examples = parts(kind, root, distillation=distillation)
        record = Record()
        task_trainer(max_epochs=2, callbacks=[record], limit_val_batches=0).fit(module, examples)
        losses.append(record.losses)
        num_teacher_reads = reads.count(False)
        # Without a cache the teacher reads every batch; with one, those of the first epoch and none in a second run.
        expected_reads = {None: len(record.losses)}.get(cache, 0 if len(losses) == 3 else len(record.losses) // 2)
        assert num_teacher_reads == expected_reads, cache
    assert losses[1] == losses[2]
    for step, loss in losses[0].items():
        # Padding, and so rounding, differs between epochs.
        assert float.fromhex(loss) == pytest.approx(float.fromhex(losses[1][step]), rel=1e-4)


def test_the_teacher_reads_a_corpus_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder_teacher(tmp_path)
    teacher_reads: list[bool] = []
    read_with_teacher = LanguageDistillation._teacher_hidden_states

    def spy(self: LanguageDistillation, *inputs: Any) -> Any:
        teacher_reads.append(True)
        return read_with_teacher(self, *inputs)

    monkeypatch.setattr(LanguageDistillation, "_teacher_hidden_states", spy)
    losses, steps = [], 28

    def train(cache: str, top_k: int, *callbacks: pl.Callback, seed: int = 0, path: str | None = None) -> Any:
        folder = None if not cache else str(tmp_path / cache)
        module, record = (
            language(tmp_path, seed, losses=[SoftTargets, HardLabels], cache_dir=folder, top_k=top_k),
            Record(),
        )
        run = trainer(tmp_path, record, *callbacks, max_steps=steps, limit_val_batches=0)
        run.fit(module, data(tmp_path, batch_size=4), ckpt_path=path)
        losses.append(record.losses)
        return module.distillation.logit_table

    train("", 1)
    assert len(teacher_reads) == steps
    teacher_reads.clear()
    assert train("all", 257).is_complete
    # Until every stream has begun the second pass.
    assert 10 < len(teacher_reads) < steps
    teacher_reads.clear()
    train("all", 257)
    assert not teacher_reads
    assert losses[1] == losses[2]
    for step, loss in losses[0].items():
        # The same numbers in float32, added up in another order.
        assert float.fromhex(loss) == pytest.approx(float.fromhex(losses[1][step]), rel=1e-4), step
    # Killed in the first pass and resumed, with few cached logits.
    half = tmp_path / "half.ckpt"
    train("few", 4, Keep(8, half, tmp_path / "few"))
    assert train("few.then", 4, seed=9, path=str(half)).is_complete
    assert losses[4] == {batch: losses[3][batch] for batch in range(8, steps)}


def test_logits_are_cached_by_position_only_where_a_corpus_is_read_in_order(tmp_path: Path) -> None:
    cached, uncached = Distillation("teacher", cache_dir=str(tmp_path / "logits")), Distillation("teacher")
    books = data(tmp_path)
    for distillation, carry, datamodule in (
        (cached, Carry(), books), (uncached, Carry(), books), (uncached, None, None), (uncached, None, books),
    ):  # fmt: skip
        LanguageDistillation(distillation, carry).setup(datamodule)
    for carry, datamodule in ((None, books), (Carry(), None), (Carry(), object()), (None, None)):
        with pytest.raises(MemtxError, match="by position in a book corpus"):
            LanguageDistillation(cached, carry).setup(datamodule)


def test_a_loss_is_active_in_its_fraction_of_the_run(tmp_path: Path) -> None:
    decoder_teacher(tmp_path)
    losses = [partial(HiddenMSE, end=0.5), partial(SoftTargets, begin=0.5)]
    module = language(tmp_path, losses=losses)
    active_losses: list[tuple[float, float]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            logged = trainer.callback_metrics
            active_losses.append((float(logged["train_hidden_mse"]), float(logged.get("train_soft_targets", 0.0))))

    trainer(tmp_path, Watch(), max_steps=4, limit_val_batches=0).fit(module, data(tmp_path))
    assert [(hidden > 0, soft > 0) for hidden, soft in active_losses] == [(True, False)] * 2 + [(False, True)] * 2


def test_the_student_is_initialized_from_every_second_layer(tmp_path: Path) -> None:
    teacher = MemoryTransformer.from_pretrained(decoder_teacher(tmp_path))
    module = small.module(distillation=Distillation(str(tmp_path / "teacher"), student_init=EveryKthLayer()))
    with pytest.raises(MemtxError, match=r"16 wide with 2 layers, .* 24 wide with 4 layers"):
        trainer(tmp_path, max_steps=1).fit(module, data(tmp_path))
    module.model = MemoryTransformer(257, dim=24, depth=2, heads=2, memories=(small.memory(),))
    module.make_optimizer = partial(small.sgd, lr=0.0)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data(tmp_path))
    for student_layer, teacher_layer in ((0, 1), (1, 3)):
        student_weights = module.model.blocks[student_layer].feed_forward.state_dict()
        assert_equal(dict(student_weights), dict(teacher.blocks[teacher_layer].feed_forward.state_dict()))


def test_a_teacher_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder_teacher(tmp_path)
    losses = []
    for requested, fast in ((False, True), (True, True), (True, False)):
        monkeypatch.setattr(cpu_info, "is_cpu_bf16_fast", lambda fast=fast: fast)
        module = language(tmp_path, bf16=requested)
        record = Record()
        trainer(tmp_path, record, max_steps=2, limit_val_batches=0).fit(module, data(tmp_path))
        (teacher,) = module.distillation._teacher
        assert next(teacher.parameters()).dtype == (torch.bfloat16 if requested and fast else torch.float32)
        losses.append([float.fromhex(loss) for loss in record.losses.values()])
    assert losses[0] == losses[2] != losses[1]
    # bfloat16 keeps about three digits of the teacher's outputs.
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_a_task_encoder_teaches_a_memory_transformer(tmp_path: Path) -> None:
    teacher, root = task_teacher(tmp_path, "classification")
    module, examples = parts("classification", root, distillation=Distillation(teacher))
    reader = partial(
        MemoryTransformerBackbone, model=partial(MemoryTransformer, dim=8, depth=1, heads=2), segment_length=4
    )
    module.model = TaskModel(module.model.vocab_size, 2, reader)
    task_trainer(max_steps=2).fit(module, examples)
    module, examples = parts("classification", root, distillation=Distillation(teacher, [HiddenMSE]))
    module.model = TaskModel(module.model.vocab_size, 2, reader)
    with pytest.raises(MemtxError, match=r"and the student \(MemoryTransformerBackbone\) returns none"):
        task_trainer(max_steps=2).fit(module, examples)


def test_unusable_teachers_are_rejected(tmp_path: Path) -> None:
    teacher, root = task_teacher(tmp_path)

    def train(distillation: Distillation, at: Path = root, **options: Any) -> None:
        task_trainer(max_steps=1).fit(*parts("tagging", at, distillation=distillation, **options))

    with pytest.raises(MemtxError, match=r"distillation.teacher is not set. Add --model.distillation"):
        train(Distillation())
    with pytest.raises(MemtxError, match="losses is empty"):
        train(Distillation(teacher, []))
    with pytest.raises(MemtxError, match="stores a teacher's logits, but HiddenMSE needs its layers"):
        train(Distillation(teacher, [HiddenMSE], cache_dir=str(tmp_path / "logits")))
    with pytest.raises(MemtxError, match=r"caches the teacher's logits, but token_mask_prob \(0.3\) changes the texts"):
        train(Distillation(teacher, cache_dir=str(tmp_path / "logits")), token_mask_prob=0.3)
    other = folder(tmp_path / "other", "tagging")
    write_lines(other / "train.jsonl", records("tagging", 24, seed=99))
    with pytest.raises(CheckpointError, match="trained with another tokenizer, so its token ids differ"):
        train(Distillation(teacher), other)
    torch.manual_seed(0)
    body()(20).save_pretrained(tmp_path / "narrow")
    with pytest.raises(MemtxError, match=r"The tokenizer has 200 tokens, the teacher in '.*narrow' has 20"):
        train(Distillation(str(tmp_path / "narrow"), [HiddenMSE]))
    body()(200).save_pretrained(tmp_path / "encoder")
    with pytest.raises(MemtxError, match=r"no head for the task. Fine-tune it first"):
        train(Distillation(str(tmp_path / "encoder")))
    train(Distillation(str(tmp_path / "encoder"), [HiddenMSE, HardLabels]))
    module = MaskedModule(partial(Encoder, dim=8, depth=1, heads=2))
    module.distillation = Distillation(teacher, cache_dir=str(tmp_path / "logits"))
    with pytest.raises(MemtxError, match="masks differ in every epoch"):
        trainer(tmp_path, max_steps=1).fit(module, data(tmp_path))
    assert not (tmp_path / "logits").exists()


def test_teachers_of_another_class_are_rejected(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Encoder(257, 8, 1, 2).save_pretrained(tmp_path / "teacher")
    with pytest.raises(MemtxError, match=r"\(Encoder\) does not fit .* \(MemoryTransformer\)\. Use .* class Memory"):
        trainer(tmp_path, max_steps=1).fit(language(tmp_path), data(tmp_path))


def test_labels_in_another_order_are_rejected(tmp_path: Path) -> None:
    teacher, root = task_teacher(tmp_path)
    module, examples = parts("tagging", root, distillation=Distillation(teacher))
    examples.task.labels = tuple(reversed(examples.task.labels))
    with pytest.raises(CheckpointError, match="has the labels B-WHO, O, the data O, B-WHO"):
        task_trainer(max_steps=1).fit(module, examples)

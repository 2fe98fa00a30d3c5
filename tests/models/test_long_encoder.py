"""Encoders with full attention that are given windows or blocks: equal on texts that fit, and longer."""

from __future__ import annotations

import shlex
import shutil
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import memtx
from memtx.cli.convert import FREEZE_PATTERNS
from memtx.cli.main import main
from memtx.errors import MemtxError
from memtx.layers.embeddings import TextEmbeddings
from memtx.models.encoder import Encoder
from memtx.models.long_encoder import to_bigbird, to_longformer
from memtx.training.pretraining import MaskedModule
from tests.commands.runs import write_books
from tests.hf.test_parity import ARGUMENTS, folders

CHANGES: dict[str, Any] = {
    "longformer": lambda encoder: to_longformer(encoder, 300, 256),
    "bigbird": lambda encoder: to_bigbird(encoder, 300, 16, 2),
}


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_texts_that_fit_are_read_as_before(parity: Path, kind: str, change: str) -> None:
    for folder in folders(parity, kind):
        io, encoder = load_file(folder / "io.safetensors"), memtx.from_pretrained(folder)
        longer = CHANGES[change](encoder)
        inputs = {name: io[name] for name in ARGUMENTS if name in io}
        present = io["attention_mask"].bool()
        with torch.no_grad():
            expected, actual = encoder(**inputs), longer(**inputs)
            # float32, sums in another order
            torch.testing.assert_close(actual.logits[present], io["logits"][present], atol=1e-4, rtol=0)  # float32
            torch.testing.assert_close(
                actual.last_hidden_state[present], expected.last_hidden_state[present], atol=1e-5, rtol=0
            )
            if longer.supports_global_attention:
                marked = torch.zeros_like(io["input_ids"])
                marked[:, 0] = 1
                with_global = longer(**inputs, global_attention_mask=marked).last_hidden_state
                torch.testing.assert_close(with_global[present], expected.last_hidden_state[present], atol=1e-5, rtol=0)
            assert longer(torch.randint(5, 100, (1, 300))).last_hidden_state.isfinite().all()
            with pytest.raises(MemtxError, match="A text of 301 tokens"):
                longer(torch.randint(5, 100, (1, 301)))


def test_positions_are_repeated() -> None:
    encoder = Encoder(30, 8, 1, 2)
    positions = encoder.embedding.position_embeddings.weight
    longer = to_longformer(encoder, 1200, 4).embedding.position_embeddings.weight
    assert len(longer) == 1200
    for start in (0, 512, 1024):
        assert torch.equal(longer[start : start + 512], positions[: len(longer[start : start + 512])])


def test_mistakes_are_named() -> None:
    encoder = Encoder(30, 8, 1, 2)
    with pytest.raises(MemtxError, match="max_length is 100, the encoder reads 512 tokens"):
        to_longformer(encoder, 100)
    with pytest.raises(MemtxError, match="The encoder has LongformerAttention, not full attention"):
        to_bigbird(to_longformer(encoder, 600), 800)
    with pytest.raises(MemtxError, match="window is 3"):
        to_longformer(encoder, 600, 3)


def test_the_command_writes_a_folder_to_train_on(
    parity: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder, *_) = folders(parity, "roberta")
    shutil.copytree(folder, tmp_path / "roberta")
    arguments = ["convert", str(tmp_path / "roberta"), str(tmp_path / "long"), "--to", "longformer"]
    assert main([*arguments, "--max-length", "200", "--window", "8"]) == 0
    encoder = memtx.from_pretrained(tmp_path / "long")
    assert isinstance(encoder, Encoder)
    assert {block.attention.window for block in encoder.blocks} == {8}
    module = MaskedModule(pretrained=str(tmp_path / "long"), vocab_size=encoder.vocab_size, mask_id=4)
    assert torch.equal(module.model.embedding.word_embeddings.weight, encoder.embedding.word_embeddings.weight)
    with pytest.raises(MemtxError, match="the tokenizer has"):
        MaskedModule(pretrained=str(tmp_path / "long"), vocab_size=encoder.vocab_size)
    capsys.readouterr()
    assert main([*arguments, "--overwrite", "--max-length", "2"]) == 2
    assert "max_length is 2, the encoder reads" in capsys.readouterr().err
    assert isinstance(memtx.from_pretrained(tmp_path / "long"), Encoder)  # still there


def test_the_tokenizer_and_the_frozen_part_go_with_the_folder(
    parity: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder, *_) = folders(parity, "roberta")
    shutil.copytree(folder, tmp_path / "roberta")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "sentencepiece.bpe.model"):
        (tmp_path / "roberta" / name).write_bytes(b"\xff of " + name.encode())
    (tmp_path / "roberta" / "README.md").write_text("not part of the model")
    arguments = ["convert", str(tmp_path / "roberta"), str(tmp_path / "long"), "--to", "longformer"]
    assert main([*arguments, "--max-length", "200", "--window", "8", "--freeze", "rest"]) == 0
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "sentencepiece.bpe.model"):
        assert (tmp_path / "long" / name).read_bytes() == (tmp_path / "roberta" / name).read_bytes()
    assert not (tmp_path / "long" / "README.md").exists()
    out = capsys.readouterr().out
    assert "merges.txt, sentencepiece.bpe.model" in out
    assert "configs/longformer-mlm.yaml" in out
    assert "callbacks.freeze.Freeze" in out
    encoder = memtx.from_pretrained(tmp_path / "long")
    names = [name for name, _ in encoder.named_parameters()]
    # The callback refuses a pattern that matches nothing.
    frozen = [{name for name in names if fnmatchcase(name, pattern)} for pattern in FREEZE_PATTERNS["rest"]]
    assert all(frozen)
    assert set(names) - set().union(*frozen) == {"embedding.position_embeddings.weight"}
    assert [fnmatchcase(name, FREEZE_PATTERNS["positions"][0]) for name in names].count(True) == 1


@pytest.mark.parametrize(
    ("freeze", "to"),
    [
        ("positions", "longformer"),
        ("new-positions", "bigbird"),
        ("rest", "bigbird"),
        ("all-but-new-positions", "longformer"),
    ],
)
def test_frozen_parameters_stay_in_training_and_after_a_resumption(
    freeze: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    Encoder(258, 16, 1, 2, embeddings=partial(TextEmbeddings, num_positions=24)).save_pretrained(tmp_path / "short")
    write_books(tmp_path / "books")
    sizes = {"longformer": ["--window", "8"], "bigbird": ["--block-size", "8", "--num-random-blocks", "1"]}[to]
    arguments = ["convert", str(tmp_path / "short"), str(tmp_path / "long"), "--to", to, *sizes, "--freeze", freeze]
    assert main([*arguments, "--max-length", "24"]) == (2 if "new" in freeze else 0)
    assert main([*arguments, "--max-length", "48", "--overwrite"]) == 0
    monkeypatch.chdir(Path(memtx.__file__).parent.parent)
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    words = words[words.index("fit") :]  # behind the program, which depends on how memtx is installed
    options = {
        "--run_dir": tmp_path / "run", "--data.root": tmp_path / "books", "--data.cache_dir": tmp_path / "cache",
        "--data.tokenizer": "memtx.data.tokenizers.ByteTokenizer", "--data.segment_length": 48, "--data.batch_size": 2,
        "--data.eval_tokens": 200, "--trainer.precision": 32, "--trainer.accelerator": "cpu",
        "--trainer.accumulate_grad_batches": 1, "--trainer.limit_val_batches": 1, "--trainer.val_check_interval": 2,
        "--model.optimizer.lr": 0.01, "--model.optimizer.weight_decay": 0.5, "--model.scheduler": "null",
    }  # fmt: skip
    fit = [*words, *(word for option in options.items() for word in map(str, option)), "--trainer.max_steps"]
    before = memtx.from_pretrained(tmp_path / "long").state_dict()
    for run in ([*fit, "2"], [*fit, "4", "--ckpt_path", "last"]):
        assert main(run) == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    after = memtx.from_pretrained(path).state_dict()
    name = "embedding.position_embeddings.weight"
    moved = (before[name] != after[name]).any(1)
    assert moved[:24].all() if freeze in ("new-positions", "rest") else not moved[:24].any()
    assert moved[24:].all() if freeze in ("rest", "all-but-new-positions") else not moved[24:].any()
    others = [not torch.equal(before[key], after[key]) for key in before if key != name]
    assert any(others) == (freeze in ("positions", "new-positions"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "8"], "--window applies to --to longformer, hf, onnx or pt2. Add --to, or remove --window."),
        (["--max-length", "4096"], "--max-length applies to --to longformer or bigbird."),
        (["--freeze", "rest"], "--freeze applies to --to longformer or bigbird."),
        (["--to", "bigbird", "--window", "8"], "--window applies to --to longformer, hf, onnx or pt2, not to bigbird."),
        (["--to", "longformer", "--block-size", "8"], "--block-size applies to --to bigbird, not to longformer."),
    ],
)
def test_options_without_effect_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tmp_path / "any"), str(tmp_path / "target"), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "target").exists()

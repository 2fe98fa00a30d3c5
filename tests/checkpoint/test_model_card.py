"""The model card states the data, figures and state size of a run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import yaml

import memtx
from memtx.checkpoint.hf_export import export_checkpoint
from memtx.errors import MemtxError
from memtx.models.memory_transformer import MemoryTransformer
from tests.hf import folders, plain
from tests.inference.test_loading import checkpoint


@pytest.fixture
def run(tmp_path: Path, byte_model: MemoryTransformer) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint(folder / "checkpoints" / "last.ckpt", byte_model, global_step=20)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"root": "/home/user/books"}}))
    lines = ["step,train_loss,val_loss,val_bits_per_byte", "9,5.0,,", "9,,4.0,5.77", "19,,3.0,4.33", "29,,2.0,2.88"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_card_of_a_run(run: Path, tmp_path: Path, byte_model: MemoryTransformer) -> None:
    result = export_checkpoint(run, tmp_path / "out")
    assert result.extra_files == ["README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers"
    assert f"{byte_model.init_state(1).nbytes:,} bytes" in card
    assert "BookDataModule, `books`, 20 optimizer steps" in card
    assert "/home/user" not in card
    # Of the last validation before the checkpoint.
    assert "| loss (nats per token) | 3.0000 |" in card
    assert "4.3300" in card
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["suppress_tokens"] == [256]
    loaded = memtx.from_pretrained(tmp_path / "out")
    assert loaded.fingerprint == byte_model.fingerprint
    with pytest.raises(MemtxError, match="already exists"):
        export_checkpoint(run, tmp_path / "out")


def test_published_files_are_copied(tmp_path: Path) -> None:
    from memtx.data.tokenizer_export import export_tokenizer
    from memtx.data.tokenizers import ByteTokenizer

    source = folders.write(tmp_path / "llama", plain.LLAMA, plain.llama(plain.LLAMA))
    texts = export_tokenizer(ByteTokenizer()).texts | {
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"eos_token_id": 7}',
        "tokenizer_config.json": '{"eos_token": "$", "auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}}',
    }
    for name, text in texts.items():
        (source / name).write_text(text)
    export_checkpoint(source, tmp_path / "out", window=16)
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_text() == texts[name]
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config == {"eos_token": "$", "tokenizer_class": "PreTrainedTokenizerFast"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [7, 36]
    assert "window 16" in (tmp_path / "out" / "README.md").read_text()
    assert memtx.from_pretrained(tmp_path / "out").config == memtx.from_pretrained(source, window=16).config


def test_memories_of_layers_are_listed(tmp_path: Path) -> None:
    window = partial(memtx.RecurrentMemory, window=8)
    model = MemoryTransformer(
        20, dim=8, depth=3, heads=2, memories=[window, window, [window, memtx.SinkMemory]],
        output_memory=memtx.CopyMemory,
    )  # fmt: skip
    model.save_pretrained(tmp_path, hf=True)
    assert (tmp_path / "generation_config.json").is_file()
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines if "Memory (" in line] == ["0 to 1", "2", "output"]

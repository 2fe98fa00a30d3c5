"""Published encoder-decoders make texts: folder to text, as transformers decodes the same ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from memtx.cli.main import main
from memtx.data.hf_tokenizers import HFTokenizer
from memtx.errors import CheckpointError, DataError
from memtx.inference.published_tasks import get_published_task, load_published_predictor
from memtx.inference.text_to_text import TextToText
from tests.data.tokenizer_zoo import CORPUS


@pytest.fixture
def folder(parity: Path, tmp_path: Path) -> Path:
    """The reference checkpoint of LED with a RoBERTa-like tokenizer of 120 tokens."""
    if not (parity / "led").is_dir():
        pytest.skip("MEMTX_PARITY has no folder 'led'")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=119, special_tokens=special_tokens, show_progress=False)
    )
    backend.add_special_tokens(["<mask>"])
    for name in ("config.json", "model.safetensors"):
        shutil.copy(parity / "led" / name, tmp_path / name)
    backend.save(str(tmp_path / "tokenizer.json"))
    options = {"num_beams": 3, "max_length": 12, "no_repeat_ngram_size": 2, "eos_token_id": 2, "length_penalty": 2.0}
    (tmp_path / "generation_config.json").write_text(json.dumps(options))
    return tmp_path


def test_a_folder_answers_with_its_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert get_published_task(folder) == "ForConditionalGeneration"
    predictor = load_published_predictor(folder)
    assert isinstance(predictor, TextToText)
    assert (predictor.options.num_beams, predictor.options.length_penalty) == (3, 2.0)
    texts = ["The fox.", "Call me"]
    predictions = predictor.predict(texts)
    assert [predictor.predict([text])[0] for text in texts] == predictions
    assert all(isinstance(prediction["summary"], str) for prediction in predictions)
    assert main(["predict", "--checkpoint", str(folder), "--text", texts[0]]) == 0
    assert json.loads(capsys.readouterr().out)["summary"] == predictions[0]["summary"]


def test_special_tokens_are_around_a_text_and_not_in_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor: Any = load_published_predictor(folder)
    seen: dict[str, Any] = {}

    def record(model: Any, tokens: Any, mask: Any, is_global: Any, **options: Any) -> list[list[int]]:
        seen.update(tokens=tokens.tolist(), is_global=is_global.tolist())
        return [[2, 0, *predictor.tokenizer.encode("the").tolist(), 2]]

    monkeypatch.setattr("memtx.inference.text_to_text.generate_targets", record)
    assert predictor.predict(["The fox"]) == [{"summary": "the", "complete": True}]
    ids = HFTokenizer(str(folder / "tokenizer.json")).encode("The fox").tolist()
    assert seen["tokens"] == [[0, *ids, 2]]
    assert seen["is_global"] == [[1] + [0] * (len(ids) + 1)]


def test_mistakes_are_named(folder: Path) -> None:
    predictor = load_published_predictor(folder)
    with pytest.raises(DataError, match=r"Input 1: The text has \d+ tokens, the model reads 256 at once"):
        predictor.predict(["short", "word " * 300])
    (folder / "generation_config.json").write_text('{"num_beams": 0}')
    with pytest.raises(CheckpointError, match="num_beams is 0"):
        load_published_predictor(folder)


def test_the_command_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["predict", "--checkpoint", str(folder), "--text", "The fox."]

    def summary(*options: str) -> str:
        assert main([*command, *options]) == 0
        text: str = json.loads(capsys.readouterr().out)["summary"]
        return text

    assert summary("--top-k", "1", "--seed", "3") == summary("--num-beams", "1")
    hot = [summary("--temperature", "5.0", "--seed", str(seed)) for seed in (1, 1, 2, 3)]
    assert hot[0] == hot[1]
    assert len(set(hot)) > 1
    for options, message in (
        (["--num-beams", "3", "--temperature", "2"], "num_beams is 3, but a single target is sampled."),
        (["--top-p", "0"], "top_p is 0.0, expected above 0"),
        (["--num-beams", "0"], "num_beams is 0."),
    ):
        assert main([*command, *options]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1

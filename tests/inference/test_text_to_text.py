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
    assert (predictor.generation.search.num_beams, predictor.generation.search.length_penalty) == (3, 2.0)
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
        (["--num-beams", "3", "--temperature", "2"], "num_beams is 3, but a single target is sampled (temperature)."),
        (["--top-p", "0"], "top_p is 0.0, expected above 0"),
        (["--num-beams", "0"], "num_beams is 0."),
        (["--max-length", "1"], "max_length is 1"),
        (["--length-penalty", "nan"], "length_penalty is nan"),
    ):
        assert main([*command, *options]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert len(summary("--max-length", "4")) < len(summary("--max-length", "12"))
    assert summary("--no-repeat-ngram-size", "0") != summary("--no-repeat-ngram-size", "1")


def test_a_folder_that_samples_its_beams_says_what_is_done(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_published_predictor(folder)
    assert not caplog.messages
    options = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(options | {"do_sample": True}))
    predictor = load_published_predictor(folder)
    assert isinstance(predictor, TextToText)
    assert predictor.generation.sampling_params is None
    assert caplog.messages == ["do_sample is not used: the 3 beams are searched, not sampled."]


def test_requests_have_options_of_their_own(folder: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    testclient = pytest.importorskip("fastapi.testclient", reason="the package 'httpx' is not installed")
    from memtx.serving.app import create_task_app

    predictor = load_published_predictor(folder)
    assert isinstance(predictor, TextToText)
    with testclient.TestClient(create_task_app(predictor, model_name="m")) as web:

        def post(**fields: Any) -> Any:
            return web.post("/v1/predict", json={"input": "The fox."} | fields)

        def summary(**fields: Any) -> str:
            (prediction,) = post(**fields).json()["data"]
            return str(prediction["summary"])

        searched = predictor.predict(["The fox."])[0]["summary"]
        assert summary() == summary(seed=None, temperature=None) == searched
        for fields in (
            {"num_beams": 1},
            {"num_beams": 2, "length_penalty": 0, "early_stopping": "never", "min_length": 3},
            {"temperature": 5.0, "seed": 1},
            {"temperature": 5, "top_k": -1, "top_p": 0.9, "min_p": 0.01, "seed": 2, "max_length": 7},
        ):
            changes = fields | ({"top_k": 0} if "top_k" in fields else {})
            generation = predictor.generation.changed(**changes)
            assert summary(**fields) == predictor.predict(["The fox."], generation=generation)[0]["summary"]
        assert summary() == searched  # A request changes no other one.
        for fields, message in (
            ({"temprature": 1}, "Did you mean 'temperature'?"),
            ({"num_beams": 3, "temperature": 2.0}, "num_beams is 3, but a single target is sampled (temperature)."),
            ({"num_beams": 65}, "num_beams (65) must be at most 64."),
            ({"num_beams": 0}, "num_beams"),
            ({"num_beams": True}, "num_beams"),
            ({"top_p": 0}, "top_p is 0"),
            ({"temperature": "hot"}, "temperature"),
            ({"temperature": -1}, "temperature is -1"),
            ({"max_length": 10**6}, "max_length is 1000000, the decoder has"),
            ({"early_stopping": "sometimes"}, "early_stopping"),
            ({"repetition_penalty": 0}, "repetition_penalty is 0"),
            ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size"),
            ({"seed": 2**64}, "seed"),
        ):
            response = post(**fields)
            assert response.status_code == 400, (fields, response.text)
            text = response.json()["error"]["message"]
            assert message in text
            assert "\n" not in text
            if not message.startswith("Did"):
                assert response.json()["error"]["param"] == next(iter(fields))

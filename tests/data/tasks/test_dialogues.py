"""Dialogues as texts and responses, cut at their beginnings for models of a fixed length; made examples fit configs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import torch
import yaml

from memtx.data.tasks.examples import SummaryExample, SummaryPrompt
from memtx.data.tasks.text_to_text import TextToTextDataModule
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import DataError
from memtx.inference.predictor import Summarizer
from memtx.inference.text_to_text import TextToText
from memtx.models.beam_search import BeamSearchOptions
from memtx.models.encoder_decoder import EncoderDecoder
from tests.commands.program import HOME
from tests.inference.conftest import tiny_model
from tests.tasks import body, tokenizer, write_lines

TURNS = [{"role": "user", "content": "the whale"}, {"role": "assistant", "content": "lost at sea"}]


def test_the_response_is_a_field_or_the_last_turn_of_the_assistant() -> None:
    parse = SummaryExample.parse
    assert parse({"turns": TURNS, "response": "old"}).summary == "old"
    assert parse({"turns": TURNS, "response": "old"}).text == "user: the whale\nassistant: lost at sea"
    assert parse({"messages": TURNS}) == SummaryExample("user: the whale", "lost at sea", True)
    assert parse({"turns": TURNS[:1]}, False) == SummaryExample("user: the whale", None, True)
    for record, message in (
        ({"turns": TURNS[:1]}, "no 'response', and the last turn is of 'user'"),
        ({"turns": TURNS[1:]}, "no turn before the response"),
        ({"turns": "a"}, "expected a list"),
        ({"turns": TURNS, "response": " "}, "expected a text"),
    ):
        with pytest.raises(DataError, match=message):
            parse(record)


def test_a_decoder_with_a_memory_replies_to_a_long_history() -> None:
    model = Summarizer(tiny_model(257), ByteTokenizer(), SummaryPrompt("\nassistant: "), max_tokens=3)
    (prediction,) = model.predict([{"turns": TURNS * 20}])
    assert set(prediction) == {"response", "complete"}
    # The last turn of a test example is the response to make.
    assert model.predict([{"turns": TURNS}]) == model.predict([{"turns": TURNS[:1]}])


def test_an_encoder_decoder_reads_the_newest_turns(tmp_path: Path) -> None:
    tokens = tokenizer()
    torch.manual_seed(0)
    model = EncoderDecoder(tokens.vocab_size, body(16), depth=1, heads=2, hidden_dim=16, num_positions=8)
    model_of_texts = TextToText(model, tokens, BeamSearchOptions(max_length=4), 16)
    first, second = model_of_texts.predict([{"turns": TURNS[:1]}, {"turns": [*TURNS * 20, TURNS[0]]}])
    assert set(first) == {"response", "complete"}
    assert second["truncated"] is True
    with pytest.raises(DataError, match="Send less text"):
        model_of_texts.predict([{"text": "the whale " * 30}])
    for split in ("train", "validation"):
        write_lines(tmp_path / f"{split}.jsonl", [{"turns": [*TURNS * 9, {"role": "user", "content": "Ahab"}],
                                                   "response": "old"}])  # fmt: skip
    data = TextToTextDataModule(str(tmp_path), tokens, max_length=12, truncate=True)
    (example,) = data.encoded_examples("train")
    assert len(example.ids) == 12
    assert example.ids[0] == tokens.cls_token_id
    assert tokens.decode(example.ids[1:-1].tolist()).endswith("Ahab")


@pytest.mark.parametrize("name", ["multiple-choice", "dialogue", "dialogue-replies", "retrieval", "multi-label"])
def test_made_examples_fit_their_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HOME / "scripts"))
    import make_tasks  # type: ignore[import-not-found]

    monkeypatch.setattr(make_tasks, "NUM_EXAMPLES", {"train": 5, "validation": 2, "test": 2})
    question = {"question": "who ?", "context": "the whale", "is_impossible": False}
    for split in make_tasks.NUM_EXAMPLES:
        write_lines(tmp_path / "squad2" / f"{split}.jsonl", [question, question | {"is_impossible": True}])
        write_lines(tmp_path / "conll2000" / f"{split}.jsonl", [{"tokens": ["the", "."], "tags": ["B-NP", "O"]}])
    monkeypatch.setattr(sys, "argv", ["make_tasks.py", name, str(tmp_path / "out"), "--data", str(tmp_path)])
    make_tasks.main()
    data = yaml.safe_load((HOME / "configs" / f"{name}.yaml").read_text())["data"]["init_args"]
    parse: Any = SummaryExample.parse if "task" not in data else locate(data["task"]["class_path"])().parse  # type: ignore[operator]
    for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines():
        example = parse(json.loads(line), True)
        if name == "multiple-choice":
            person = example.question.split()[-1].rstrip("?")
            last = [part for part in example.text.split(". ") if part.startswith(person)][-1]
            assert last.rstrip(".").endswith(example.choices[example.label])
        elif name == "dialogue":
            users = " ".join(turn for turn in example.turns if turn.startswith("user"))
            assert f"I want to go to {example.label}" in users
        elif name == "dialogue-replies":
            assert example.summary.replace("Your", "My") in example.text

"""XLNet in the published layout: outputs and memories of transformers, and what its state promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor

import memtx
from memtx.data.hf_tokenizers import HFTokenizer
from memtx.data.tasks.base import build_inputs
from memtx.errors import CheckpointError, MemtxError
from memtx.inference.published_tasks import load_published_predictor
from memtx.models.xlnet import XLNet
from memtx.state import MemoryState
from tests.hf.folders import write
from tests.hf.test_task_heads import RECORDED as TASKS
from tests.hf.test_task_heads import draw

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "xlnet.json").read_text(encoding="utf-8"))["cases"]
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "perm_mask", "target_mapping")


def load(folder: Path, name: str, **options: Any) -> XLNet:
    case = RECORDED[name]
    model = memtx.from_pretrained(write(folder, {**case["config"], **options}, draw(case["shapes"])))
    assert isinstance(model, XLNet)
    return model


def inputs(call: dict[str, Any], stream: int | None = None) -> dict[str, Tensor]:
    tensors = {key: torch.tensor(call[key]) for key in INPUTS if key in call}
    return tensors if stream is None else {key: tensor[stream, None] for key, tensor in tensors.items()}


@pytest.mark.parametrize("name", RECORDED)
def test_every_call_and_its_memory_are_those_recorded(tmp_path: Path, name: str) -> None:
    model, state = load(tmp_path / "model", name), None
    for call in RECORDED[name]["calls"]:
        with torch.no_grad():
            out = model(**inputs(call), state=state)
        state = out.state
        actual = out.last_hidden_state if out.logits is None else out.logits
        expected = torch.tensor(call["output"]).view(call["shape"])
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        memory = torch.tensor(call["memory"]).view(2, call["memory_length"], -1)
        torch.testing.assert_close(state.layers[1][0].hidden[:, -memory.shape[1] :], memory, atol=1e-5, rtol=0)
    memtx.hf.save(model, tmp_path / "saved")
    original, saved = (load_file(tmp_path / part / "model.safetensors") for part in ("model", "saved"))
    assert original.keys() == saved.keys()
    assert all(torch.equal(original[key], saved[key]) for key in original)


@pytest.mark.parametrize("name", ["three segments", "targets", "padding", "same length"])
def test_streams_of_any_age_are_independent_and_the_state_is_a_value(tmp_path: Path, name: str) -> None:
    model, calls = load(tmp_path, name).double(), RECORDED[name]["calls"]
    first, second = calls[0], calls[1]
    older = model(**inputs(first, 0), state=model.init_state(1)).state
    copy = MemoryState.concat([older]).map(torch.clone)
    alone = [model(**inputs(second, 0), state=older), model(**inputs(second, 1), state=model.init_state(1))]
    joined = model(**inputs(second), state=MemoryState.concat([older, model.init_state(1)]))
    for row, out in enumerate(alone):
        torch.testing.assert_close(joined.last_hidden_state[row], out.last_hidden_state[0], atol=1e-10, rtol=0)
        assert joined.state.select([row]).equals(out.state, atol=1e-10)
    assert older.equals(copy)
    # A reset stream is fresh, and a fresh state is none.
    reset = model(**inputs(second, 1), state=older.reset(torch.tensor([True])))
    torch.testing.assert_close(
        reset.last_hidden_state, model(**inputs(second, 1)).last_hidden_state, atol=1e-10, rtol=0
    )


def test_how_a_causal_stream_is_cut_does_not_matter(tmp_path: Path) -> None:
    model = load(tmp_path, "causal").double()
    tokens = torch.randint(0, 19, (2, 12))
    state, parts = None, []
    for part in tokens.split([1, 4, 5, 2], dim=1):
        out = model(part, state=state)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits, atol=1e-10, rtol=0)


def test_a_document_sees_nothing_before_its_start(tmp_path: Path) -> None:
    model = load(tmp_path, "three segments").double()
    tokens = torch.randint(0, 19, (1, 9))
    document_starts = torch.zeros(1, 9, dtype=torch.bool)
    document_starts[0, 4] = True
    state = model(tokens).state
    out = model(tokens, state=state, document_starts=document_starts)
    alone = model(tokens[:, 4:])
    torch.testing.assert_close(out.last_hidden_state[:, 4:], alone.last_hidden_state, atol=1e-10, rtol=0)
    following = [model(tokens, state=after.state).last_hidden_state for after in (out, alone)]
    torch.testing.assert_close(*following, atol=1e-10, rtol=0)


def write_tokenizer(folder: Path) -> Any:
    """Write a tokenizer with XLNet's special tokens and their places; return the library's object."""
    special_tokens = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"]
    pieces = [*special_tokens, "▁", "s", "o", "m", "e", "r", "▁some", "▁or", "es", "▁m"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([(piece, -1.0) for piece in pieces], 0, False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(special_tokens)
    special_ids = [("<sep>", 4), ("<cls>", 3)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A:0 <sep>:0 <cls>:2", pair="$A:0 <sep>:0 $B:1 <sep>:1 <cls>:2", special_tokens=special_ids
    )
    assert tokenizer.get_vocab_size() == 19
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_inputs_of_tasks_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    backend = write_tokenizer(tmp_path)
    tokenizer = HFTokenizer(str(tmp_path / "tokenizer.json"))
    texts = ["some roses", "or some more"]
    ids = [encoding.ids for encoding in tokenizer.encode_with_offsets(texts)]
    for count in (1, 2):
        expected = backend.encode(*texts[:count])
        actual_ids, types, is_global = build_inputs(tokenizer, *ids[:count])
        assert (actual_ids.tolist(), types.tolist()) == (expected.ids, expected.type_ids)
        assert is_global.tolist() == [False] * (len(expected.ids) - 1) + [True]


@pytest.mark.parametrize("name", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnsweringSimple"])
def test_a_folder_with_a_task_predicts(tmp_path: Path, name: str) -> None:
    case = TASKS[f"XLNet{name}"]
    backend = write_tokenizer(write(tmp_path, case["config"], draw(case["shapes"])))
    predictor, text = load_published_predictor(tmp_path), "some or somes"
    expected = backend.encode(text, "or some") if "Question" in name else backend.encode(text)
    tokens, types = torch.tensor([expected.ids]), torch.tensor([expected.type_ids])
    with torch.no_grad():
        logits = memtx.from_pretrained(tmp_path)(tokens, torch.ones_like(tokens), types)[0]
    if "Question" in name:
        (answer,) = predictor.predict([{"context": text, "question": "or some"}])
        spans = expected.offsets[: expected.ids.index(4)]
        scores = logits[: len(spans), None, 0] + logits[None, : len(spans), 1]
        is_span = torch.ones_like(scores).triu().bool()
        start, end = divmod(int(scores.masked_fill(~is_span, -99).argmax()), len(spans))
        assert (answer["start"], answer["end"]) == (spans[start][0], spans[end][1])
        return
    (prediction,) = predictor.predict([text])
    probabilities = logits.softmax(-1)
    if "Sequence" in name:
        assert list(prediction["scores"].values()) == pytest.approx(probabilities.tolist(), abs=1e-6)
    else:
        first = [index for index, word in enumerate(expected.word_ids) if word not in expected.word_ids[:index]][:3]
        assert prediction["scores"] == pytest.approx(probabilities[first].amax(-1).tolist(), abs=1e-6)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model, call = load(tmp_path, "backward half"), inputs(RECORDED["backward half"]["calls"][1], 0)
    with pytest.raises(MemtxError, match="1 texts, but with bi_data"):
        model(**call)
    model.bi_data = False
    for key, tensor in (("perm_mask", call["perm_mask"][:, 1:]), ("target_mapping", call["target_mapping"][..., 1:])):
        with pytest.raises(MemtxError, match=rf"{key} is \("):
            model(**{**call, key: tensor})
    with pytest.raises(MemtxError, match="several positions"):
        model(**{**call, "target_mapping": torch.ones_like(call["target_mapping"])})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_type": "sparse"}, "other kinds of attention"),
        ({"untie_r": False}, "biases that all layers share"),
        ({"mem_len": "all"}, "config.json has mem_len = 'all'"),
        ({"d_head": 3}, "heads of another width"),
        ({"architectures": ["XLNetForQuestionAnswering"]}, "XLNetForQuestionAnswering, whose task is not supported"),
        ({"architectures": ["XLNetForMultipleChoice"]}, "XLNetForMultipleChoice, whose task is not supported"),
    ],
)
def test_options_that_are_not_supported_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, "three segments", **options)

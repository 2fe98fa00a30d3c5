"""The model for lm-evaluation-harness, with a stub in place of the package, which is an optional extra."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.errors import MemtxError
from memtx.inference.generate import generate
from memtx.inference.reader import StreamReader
from memtx.inference.sampling import SamplingParams
from tests.commands.tiny import BOOK, pretrained

ROUNDING = 1e-3
"""Sums of 300 float32 values of the order of 10, in other calls."""


class StubLM:
    """The part of the harness's base class that the model uses."""

    def __init__(self) -> None:
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    contents = {"api.model": {"LM": StubLM}, "api.registry": {"register_model": lambda *names: lambda cls: cls}}
    for name in ("", "api", "models", "api.model", "api.registry"):
        module = ModuleType(f"lm_eval.{name}".strip("."))
        vars(module).update(contents.get(name, {}))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules.pop("memtx.evaluation.harness", None)
    yield importlib.import_module("memtx.evaluation.harness")
    sys.modules.pop("memtx.evaluation.harness", None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pretrained(tmp_path / "model")


@pytest.fixture
def model(harness: ModuleType, folder: Path) -> Iterator[Any]:
    lm = harness.HarnessModel(str(folder), segment_length=32, batch_size="auto")
    yield lm
    lm.pool.close()


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=values) for values in arguments]


def nll_of(folder: Path, text: str) -> np.ndarray:  # type: ignore[type-arg]
    reader = StreamReader(*load_model_and_tokenizer(folder), 64)
    return np.concatenate([result.nll for result in [*reader.feed(text), *reader.finish()]])


def test_loglikelihood_of_continuations(model: Any, folder: Path) -> None:
    pairs = [(BOOK[:300], " night."), (BOOK[:300] + "  ", "day"), ("", "It was"), (BOOK[:40], "x" * 50)]
    for (context, continuation), (logprob, _) in zip(pairs, model.loglikelihood(requests(*pairs)), strict=True):
        stripped = context.rstrip()
        expected = nll_of(folder, context + continuation)[len(stripped.encode()) :].sum()
        assert logprob == pytest.approx(-expected, abs=ROUNDING)


def test_greedy_continuations_are_marked(model: Any, folder: Path) -> None:
    pairs = []
    for end in range(100, 130):
        options = {"max_tokens": 1, "sampling_params": SamplingParams(0)}
        token = "".join(generate(*load_model_and_tokenizer(folder), BOOK[:end], **options))
        if token.isascii() and not BOOK[end - 1].isspace():  # A byte that is text by itself.
            pairs += [(BOOK[:end], token), (BOOK[:end], "a" if token != "a" else "b")]
    assert pairs
    assert [is_greedy for _, is_greedy in model.loglikelihood(requests(*pairs))] == [True, False] * (len(pairs) // 2)


def test_choices_read_their_context_once(model: Any) -> None:
    pairs = [(BOOK[:1000], choice) for choice in (" one", " two", " three", " four")]
    model.loglikelihood(requests(*pairs))
    assert model.pool.engine.counters["score_tokens"] < 1.2 * len(BOOK[:1000].encode())


def test_a_text_of_any_length_is_scored(model: Any, folder: Path) -> None:
    texts = [BOOK[:200], BOOK]
    for text, logprob in zip(texts, model.loglikelihood_rolling(requests(*((text,) for text in texts))), strict=True):
        assert logprob == pytest.approx(-nll_of(folder, text).sum(), rel=1e-5)


def test_texts_are_generated_up_to_a_stop_string(model: Any, folder: Path) -> None:
    parts = generate(*load_model_and_tokenizer(folder), BOOK[:100], max_tokens=20, sampling_params=SamplingParams(0))
    expected = "".join(parts)
    stop = expected[5:7]
    options = [
        {"max_gen_toks": 20},
        {"max_new_tokens": 20, "until": [stop, ""], "do_sample": False, "temperature": 0.9},
        {"max_gen_toks": 20, "do_sample": True, "temperature": 1.5, "top_k": 5, "seed": 3},
    ]
    texts = model.generate_until(requests(*((BOOK[:100], values) for values in options)))
    assert texts[0] == expected
    assert texts[1] == expected[: expected.index(stop)]
    assert texts[2] != expected


def test_mistakes_name_the_option(model: Any) -> None:
    with pytest.raises(MemtxError, match="'num_beams' is not supported"):
        model.generate_until(requests(("x", {"num_beams": 4})))
    with pytest.raises(MemtxError, match="no chat template"):
        model.apply_chat_template([{"role": "user", "content": "x"}])


def test_the_dtype_is_the_given_one(harness: ModuleType, folder: Path) -> None:
    lm = harness.HarnessModel(str(folder), dtype="float64")
    assert next(lm.pool.model.parameters()).dtype == torch.float64
    lm.pool.close()
    assert lm.tokenizer_name.startswith("memtx-")


def test_arguments_of_the_harness_are_taken_or_explained(
    harness: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lm = harness.HarnessModel(str(folder), device="cuda:0", dtype="auto", batch_size=1, max_batch_size=None)
    assert str(next(lm.pool.model.parameters()).device) == "cpu"  # the harness's default is cuda:0
    lm.pool.close()
    with pytest.raises(MemtxError, match="'trust_remote_code' in model_args is not an option of memtx"):
        harness.HarnessModel(str(folder), trust_remote_code=True)
    with pytest.raises(MemtxError, match="dtype is 'float23'"):
        harness.HarnessModel(str(folder), dtype="float23")


def test_the_template_of_the_folder_is_applied(harness: ModuleType, folder: Path) -> None:
    pytest.importorskip("jinja2", reason="the package 'jinja2' is not installed")
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    lm = harness.HarnessModel(str(folder))
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert lm.apply_chat_template(messages[:1]) == "[user]x[a]"
    assert lm.apply_chat_template(messages, add_generation_prompt=False) == "[user]x[assistant]y"
    assert lm.chat_template(True) == template
    lm.pool.close()

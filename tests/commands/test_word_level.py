"""Word-level language modeling with Transformer-XL, from texts to tests, sessions and generated text."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands.program import HOME, Program

LINE = " = The cat = \n \n The cat sat on the mat . The <unk> cat sat again . \n"
SMALL = [
    "--config", str(HOME / "configs" / "transformer-xl-wt103.yaml"), "--data.batch_size=2", "--data.segment_length=8",
    "--model.model.init_args.dim=16", "--model.model.init_args.depth=2", "--model.model.init_args.heads=2",
    "--model.model.init_args.head_dim=8", "--model.model.init_args.hidden_dim=16",
    "--model.model.init_args.memory_length=8", "--model.model.init_args.cutoffs=[4,8]", "--trainer.accelerator=cpu",
    "--trainer.max_steps=4", "--trainer.val_check_interval=4", "--trainer.log_every_n_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("words") / "texts"
    for split, count in (("train", 20), ("validation", 3), ("test", 6)):
        (root / split).mkdir(parents=True)
        (root / split / "wiki.txt").write_text(LINE * count + " Other words " * (split == "train") + "\n")
    return root


def test_from_texts_to_a_test_with_a_longer_memory(program: Program, texts: Path, tmp_path: Path) -> None:
    result = program("prepare", str(texts), "--output-dir", "corpus", "--tokenizer", "word", "--json", cwd=tmp_path)
    assert result.code == 0, result.err
    # 17 words and 3 line ends in each piece, and two words and a line end at the end of the training text.
    assert json.loads(result.out)["splits"]["train"]["tokens"] == 20 * 20 + 3
    result = program("fit", *SMALL, "--data.root=corpus", "--data.tokenizer=null", "--run_dir=run", cwd=tmp_path)
    assert result.code == 0, result.err
    header, *_ = csv.reader((tmp_path / "run" / "metrics.csv").open())
    assert "val_perplexity" in header

    def losses(*options: str) -> dict[str, Any]:
        result = program("test", "--run_dir=run", *options, cwd=tmp_path)
        assert result.code == 0, result.err
        return {line.split("\u2502")[1].strip(): line for line in result.out.splitlines() if "test_" in line}

    longer = ["--model.eval_memory=24", "--model.clamp=6", "--model.same_length=true"]
    trained, tested = losses(), losses(*longer, "--data.segment_length=5")
    assert "test_perplexity" in tested
    assert trained["test_loss"] != tested["test_loss"]
    # Equally many positions for every query, however the text is cut.
    assert tested["test_perplexity"][:30] == losses(*longer, "--data.segment_length=16")["test_perplexity"][:30]
    result = program("test", "--run_dir=run", "--model.eval_memory=0", "--model.same_length=true", cwd=tmp_path)
    assert result.code == 2
    assert result.err.strip().count("\n") == 0
    (tmp_path / "text.txt").write_text(LINE)
    session = ["--checkpoint", "run", "--session", "session"]
    for command in (["read", "text.txt", *session], ["generate", *session, "--max-tokens", "5", "--temperature", "0"]):
        result = program(*command, cwd=tmp_path)
        assert result.code == 0, result.err
    assert set(result.out.split()) <= {*LINE.split(), "Other", "words"}


def test_all_words_need_no_size_and_limits_are_options(program: Program, texts: Path, tmp_path: Path) -> None:
    tokenizer = (
        '--data.tokenizer={"class_path": "memtx.data.tokenizers.WordTokenizer", "init_args": {"lower_case": true}}'
    )
    result = program(
        "fit", *SMALL, f"--data.root={texts}", "--data.cache_dir=cache", tokenizer, "--run_dir=run", cwd=tmp_path
    )
    assert result.code == 0, result.err
    saved = json.loads(next((tmp_path / "cache").glob("tokenizer-*.json")).read_text())
    assert saved["words"][:3] == ["<eos>", "the", "cat"]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("<unk>\nThe\ncat\n")
    options = ["--tokenizer", "word", "--vocab-file", str(vocabulary)]
    result = program("prepare", str(texts), "--output-dir", "corpus", *options, cwd=tmp_path)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "corpus" / "tokenizer.json").read_text())["words"] == ["<unk>", "The", "cat", "<eos>"]
    result = program("prepare", str(texts), "--output-dir", "other", "--min-freq", "2", cwd=tmp_path)
    assert result.code == 2
    assert "give --tokenizer word" in result.err


def test_the_plan_counts_an_adaptive_softmax(program: Program, tmp_path: Path) -> None:
    arguments = ["--peak-tflops=1", "--json", "--data.tokenizer.init_args.vocab_size=20", *SMALL]
    result = program("plan", *arguments, cwd=tmp_path)
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    forward, training = (plan["flops_per_token"][name] for name in ("forward", "training"))
    # By hand, per layer: projections of query, keys and values (of the cache, too), distances and output, feed-forward;
    # then 3 products of 8 queries with 16 keys, and the short list with two clusters.
    layer = 2 * 16 * 16 * (1 + 2 * 2 + 2 + 1 + 2) + 3 * 2 * 16 * 16
    assert forward == 2 * layer + 2 * 16 * (4 + 2)
    # Nothing needs a gradient with respect to the cache and the sinusoids.
    assert 2 * forward < training < 3 * forward

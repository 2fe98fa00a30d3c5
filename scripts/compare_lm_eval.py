"""Compare the figures of lm-evaluation-harness for one model folder: its model `hf`, ours, and our server.

    pip install 'memtx[serve,lm-eval]' transformers accelerate
    python scripts/compare_lm_eval.py [FOLDER] [--json FILE]

Writes three small tasks to local files: choices (`loglikelihood`), perplexity (`loglikelihood_rolling`) and generation
(`generate_until`). Runs them with `hf`, with `memtx`, and with `local-completions` and `local-chat-completions` against
`memtx serve`, and exits with 1 if a figure differs. FOLDER is a folder of transformers with a tokenizer; defaults to a
tiny Llama with random weights and a tokenizer trained on these words. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SENTENCE = "the sea was calm and a grey gull cried over the long wet sand while nobody came to the old harbour"
WORDS = SENTENCE.split()
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
TOLERANCE = 2e-4
"""Relative difference of two figures: both sum in float32, in another order."""

TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> None:
    """Write the tasks and their documents."""
    generator = random.Random(0)

    def sentence(length: int) -> str:
        return " ".join(generator.choices(WORDS, k=length))

    documents: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    for _ in range(24):
        choices = [" " + sentence(generator.randint(1, 5)) for _ in range(4)]
        context = sentence(generator.randint(3, 60))
        documents["choices"].append({"context": context, "choices": choices, "answer": generator.randrange(4)})
    documents["perplexity"] = [{"text": sentence(generator.randint(20, 120))} for _ in range(8)]
    documents["generation"] = [{"context": sentence(generator.randint(3, 60)), "target": ""} for _ in range(12)]
    for name, task in TASKS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents[name]))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
        # A YAML reader reads JSON.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": f"local_{name}", **source, **task}))


def make_folder(folder: Path) -> Path:
    """Write a tiny Llama with random weights, a byte-level BPE and a chat template."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = ByteLevelBPETokenizer()
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(WORDS * 20, vocab_size=400, special_tokens=special_tokens)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    create_tokenizer: Any = PreTrainedTokenizerFast  # untyped
    tokenizer = create_tokenizer(tokenizer_object=backend._tokenizer, **names)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=1024, num_key_value_heads=2, initializer_range=0.2,
        bos_token_id=0, eos_token_id=2, pad_token_id=0, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def serve(folder: Path, workdir: Path) -> Iterator[str]:
    """Run a server of the model and yield its address."""
    command = [sys.executable, "-m", "memtx", "serve", "--checkpoint", str(folder), "--port", "0"]
    command += ["--served-model-name", "served", "--session-dir", str(workdir / "sessions")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        address = next((match[0] for line in lines if (match := re.search(r"http://\S+", line))), None)
        if address is None:
            raise SystemExit("The server did not start.")
        yield address
    finally:
        process.terminate()
        process.wait(30)
        process.stderr.close()


def evaluate(model: str, arguments: dict[str, Any], tasks: list[str], folder: Path, chat: bool) -> dict[str, Any]:
    """Return metrics and answers of each task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    output = simple_evaluate(
        model, model_args=arguments, tasks=[f"local_{task}" for task in tasks], task_manager=manager,
        apply_chat_template=chat, bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    results: dict[str, Any] = {}
    for task in tasks:
        metrics = output["results"][f"local_{task}"]
        figures = {name.partition(",")[0]: value for name, value in metrics.items() if isinstance(value, float)}
        samples = sorted(output["samples"][f"local_{task}"], key=lambda sample: sample["doc_id"])
        results[task] = figures | {"answers": [sample["filtered_resps"] for sample in samples]}
    return results


def differs(value: Any, other: Any) -> bool:
    """Return whether two figures, or lists of them, differ beyond rounding."""
    if isinstance(value, list | tuple):
        return len(value) != len(other) or any(map(differs, value, other))
    if isinstance(value, float) and not isinstance(value, bool):
        return abs(value - float(other)) > TOLERANCE * max(abs(value), 1)
    return bool(value != other)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="model folder; defaults to a tiny random one")
    parser.add_argument("--json", metavar="FILE", help="write all figures and answers")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    import memtx.evaluation.harness  # noqa: F401  (registers the model)

    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(temporary)
        os.environ["HF_DATASETS_CACHE"] = str(workdir / "cache")
        (workdir / "tasks").mkdir()
        write_tasks(workdir / "tasks")
        folder = arguments.folder or make_folder(workdir / "model")
        pretrained = {"pretrained": str(folder)}
        runs: dict[str, dict[str, Any]] = {}
        different: list[tuple[str, str, str]] = []

        def run(name: str, model: str, model_args: dict[str, Any], tasks: list[str], chat: bool = False) -> None:
            runs[name] = evaluate(model, model_args, tasks, workdir / "tasks", chat)
            expected = runs["hf, chat" if chat else "hf"]
            for task, figures in runs[name].items():
                names = [key for key, value in figures.items() if differs(value, expected[task][key])]
                different.extend((name, task, key) for key in names)
                metrics = {key: value for key, value in figures.items() if key != "answers"}
                print(f"{name:24}{task:12}{', '.join(names) + ' differs' if names else 'same'} {json.dumps(metrics)}")

        run("hf", "hf", pretrained | {"device": "cpu"}, list(TASKS))
        run("hf, chat", "hf", pretrained | {"device": "cpu"}, ["generation"], chat=True)
        run("memtx", "memtx", pretrained, list(TASKS))
        run("memtx, chat", "memtx", pretrained, ["generation"], chat=True)
        with serve(folder, workdir) as address:
            server = {"model": "served", "tokenizer": str(folder), "tokenizer_backend": "huggingface"}
            completions = server | {"base_url": f"{address}/v1/completions", "num_concurrent": 4}
            run("local-completions", "local-completions", completions, list(TASKS))
            chat = {"model": "served", "base_url": f"{address}/v1/chat/completions", "num_concurrent": 4}
            run("local-chat-completions", "local-chat-completions", chat, ["generation"], chat=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(runs, indent=1))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

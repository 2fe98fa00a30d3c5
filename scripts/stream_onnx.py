"""Stream a text through a model that ``memtx convert --to onnx`` wrote, without torch and memtx.

    memtx convert runs/books out --to onnx
    python scripts/stream_onnx.py out book.txt
    python scripts/stream_onnx.py out book.txt --generate 100

Needs numpy, onnxruntime and tokenizers. Prints bits per byte, equal to those of ``memtx read``, and tokens per second.
With ``--generate`` the text is continued by the most probable tokens. The folder's ``export.json`` describes the two
graphs: "segment" reads a segment of fixed length, "step" a single token; both take and return the same state.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

Arrays = dict[str, NDArray[Any]]


class OnnxStream:
    """One text, read segment by segment.

    Args:
        folder: Folder of ``memtx convert --to onnx``, exported for one stream.
        threads: Threads of onnxruntime; 0 leaves the choice to it.

    Attributes:
        state: Named tensors of the state; zeros for a fresh text.
        length: Tokens of a segment.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        self.description = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        if self.description["batch_size"] != 1:
            raise SystemExit(f"'{folder}' reads {self.description['batch_size']} streams at once; export it for one.")
        if self.description["tokenizer"] is None:
            raise SystemExit(f"'{folder}' has no tokenizer, since the exported model has none.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.sessions = {
            program["length"]: onnxruntime.InferenceSession(
                str(folder / program["file"]), options, providers=["CPUExecutionProvider"]
            )
            for program in self.description["programs"].values()
        }
        self.length = max(self.sessions)
        inputs, self.outputs = ([entry["name"] for entry in self.description[side]] for side in ("inputs", "outputs"))
        self.state_names = [name for name in inputs if name.startswith("state.")]
        self.state: Arrays = {
            entry["name"]: np.zeros(entry["shape"], dtype=entry["dtype"])
            for entry in self.description["inputs"]
            if entry["name"] in self.state_names
        }

    def read(self, tokens: NDArray[np.int64], *, is_last: bool = False) -> NDArray[np.float32]:
        """Read tokens, ``(length,)``, and return the logits of the token after each, ``(length, vocab)``.

        If they are fewer than a segment, they are read one by one; at the end of the text, whose state nobody needs,
        they are padded to a segment instead.
        """
        if len(tokens) not in self.sessions and not is_last:
            return np.concatenate([self.read(tokens[index : index + 1]) for index in range(len(tokens))])
        length = len(tokens) if len(tokens) in self.sessions else self.length
        padded = np.zeros((1, length), dtype=np.int64)
        padded[0, : len(tokens)] = tokens
        # A true entry would begin a document, which sees nothing of the text before it.
        feeds = {"tokens": padded, "document_starts": np.zeros((1, length), dtype=bool), **self.state}
        logits, *state = self.sessions[length].run(self.outputs, feeds)
        self.state = dict(zip(self.state_names, state, strict=True))
        scored: NDArray[np.float32] = logits[0, : len(tokens)]
        return scored


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the folder's tokenizer, which takes special tokens in a text for plain text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def score(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Return the negative log-likelihood of the labels in nats."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(-1))
    return float((log_sum - shifted[np.arange(len(labels)), labels]).sum())


def read_text(
    stream: OnnxStream, tokenizer: Tokenizer, text: str, *, keep_state: bool = False
) -> tuple[float, int, NDArray[np.int64]]:
    """Read a text; return its bits per byte, the number of scored tokens and the tokens that are not read yet.

    The text begins with the tokenizer's begin token; without one its first token is not scored. The last token is read
    only with the next one. The state after the text is exact if ``keep_state`` is True.
    """
    bos_token_id = stream.description["tokenizer"]["bos_token_id"]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokens = np.array(ids if bos_token_id is None else [bos_token_id, *ids], dtype=np.int64)
    inputs, labels, nats = tokens[:-1], tokens[1:], 0.0
    for start in range(0, len(inputs), stream.length):
        segment = slice(start, start + stream.length)
        nats += score(stream.read(inputs[segment], is_last=not keep_state), labels[segment])
    return nats / math.log(2) / max(1, len(text.encode("utf-8"))), len(labels), tokens[-1:]


def generate(stream: OnnxStream, tokens: NDArray[np.int64], count: int) -> list[int]:
    """Return the next ``count`` tokens, fewer if one ends the text; ``tokens`` are those not read yet."""
    generated: list[int] = []
    eos_token_ids = stream.description["tokenizer"]["eos_token_ids"]
    vocab_size = stream.description["tokenizer"]["vocab_size"]
    while len(generated) < count:
        token = int(stream.read(tokens)[-1, :vocab_size].argmax())
        if token in eos_token_ids:
            break
        generated.append(token)
        tokens = np.array([token], dtype=np.int64)
    return generated


def main() -> None:
    parser = argparse.ArgumentParser(description="Stream a text through an exported model.")
    parser.add_argument("folder", type=Path, help="folder of memtx convert --to onnx")
    parser.add_argument("text", type=Path, help="UTF-8 text file")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="tokens to continue the text with")
    parser.add_argument("--threads", type=int, default=0, help="threads of onnxruntime; 0 leaves the choice to it")
    arguments = parser.parse_args()
    stream, tokenizer = OnnxStream(arguments.folder, arguments.threads), load_tokenizer(arguments.folder)
    text = arguments.text.read_bytes().decode("utf-8-sig")
    start = time.perf_counter()
    bits_per_byte, num_tokens, last = read_text(stream, tokenizer, text, keep_state=arguments.generate > 0)
    seconds = time.perf_counter() - start
    state_bytes = sum(array.nbytes for array in stream.state.values())
    print(f"{bits_per_byte:.6f} bits per byte over {num_tokens:,} tokens, {num_tokens / seconds:,.0f} tokens/s")
    print(f"state: {state_bytes / 1e6:.2f} MB, however long the text")
    if arguments.generate:
        print(tokenizer.decode(generate(stream, last, arguments.generate), skip_special_tokens=False))


if __name__ == "__main__":
    main()

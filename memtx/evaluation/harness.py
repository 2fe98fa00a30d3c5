"""Model of lm-evaluation-harness, which streams contexts of any length with a state of constant size.

    lm_eval --model memtx --model_args pretrained=FOLDER --tasks ...

The name is found by its entry point. Releases of the harness up to 0.4.13 read no entry points; there, run
``python -m memtx.evaluation.harness`` in place of ``lm_eval``, with the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  (registers the harness's own models, which it does only before any other)
import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from numpy.typing import NDArray

from memtx import files
from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.data.tokenizers import Tokenizer
from memtx.errors import MemtxError
from memtx.inference.generate import GenerationConfig
from memtx.inference.reader import StreamReader
from memtx.inference.sampling import SamplingParams
from memtx.inference.sessions.pool import SessionPool

MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
PENALTY_NAMES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "typical_p", *PENALTY_NAMES)
IGNORED_NAMES = ("do_sample", "until", "max_length", "seed")


@register_model("memtx")
class HarnessModel(LM):  # type: ignore[misc]
    """A model for lm-evaluation-harness. Contexts are never truncated, and a context of several requests is read once.

    Results are those of the model ``hf`` with the same folder, up to rounding, as long as the model sees as far; but
    ``loglikelihood_rolling`` reads a begin token once where ``hf`` reads it twice if the tokenizer adds it.

    Args:
        pretrained: Model folder, checkpoint or run folder.
        device: Device to compute on. Defaults to the CPU.
        dtype: Dtype of the weights, such as ``"bfloat16"``. Defaults to the checkpoint's.
        window: Exact positions seen, as in :func:`memtx.checkpoint.load.load`.
        segment_length: Tokens per call. Defaults to 512.
        batch_size: Requests that run at once. Defaults to 16.
        max_gen_toks: Maximum number of generated tokens where a task sets none. Defaults to 256.
        prefix_cache_bytes: Maximum bytes of the prefix cache. Defaults to 1 GiB.
        max_batch_size: Accepted for the harness and not used.

    Raises:
        MemtxError: The model cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        window: int | None = None,
        segment_length: int = 512,
        batch_size: int | str | None = 16,
        max_gen_toks: int = 256,
        prefix_cache_bytes: int = 1 << 30,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        model, self.tokenizer = load_model_and_tokenizer(pretrained, window)
        model.to(device=device or "cpu", dtype=getattr(torch, dtype) if dtype else None)
        folder = Path(pretrained)
        self._prefix_token = _find_prefix_token(folder, self.tokenizer)
        sizes: dict[str, Any] = {"segment_length": segment_length, "prefix_cache_bytes": prefix_cache_bytes}
        self.pool = SessionPool(model, self.tokenizer, **sizes)
        self.max_gen_toks = max_gen_toks
        # The harness passes its default, 1, as a number or text; "auto" needs no measurement here.
        number = str(batch_size).partition(":")[0]
        self.num_threads = max(int(number), 16) if number.isdecimal() else 16

    @property
    def tokenizer_name(self) -> str:
        """Name for the harness's cache of requests."""
        return f"memtx-{self.tokenizer.fingerprint}"

    def _map(self, name: str, function: Callable[..., Any], requests: Sequence[Any]) -> list[Any]:
        """Run requests at once, with the harness's cache."""
        with ThreadPoolExecutor(self.num_threads) as threads:
            results = list(threads.map(lambda request: function(*request.args), requests))
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(name, request.args, result)
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding gives it."""
        return self._map("loglikelihood", self._score_continuation, requests)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-likelihood of each text, of any length."""
        return self._map("loglikelihood_rolling", self._score_text, requests)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return a continuation of each context, up to the first string of ``until``."""
        return self._map("generate_until", self._generate, requests)

    def _encode(self, text: str) -> NDArray[np.int64]:
        return np.asarray(self.tokenizer.encode(text, parse_special=True), dtype=np.int64)

    def _new_reader(self, *, needs_prefix: bool) -> StreamReader:
        reader = self.pool.new_reader()
        if needs_prefix and reader.last_token is None:
            reader.last_token = self._prefix_token
        return reader

    def _score_continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        # The harness's convention: spaces at the end of the context belong to the continuation.
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        context_tokens = self._encode(context)
        tokens = self._encode(context + continuation)[len(context_tokens) :]
        reader = self._new_reader(needs_prefix=not len(context_tokens))
        self.pool.read_prompt(reader, context_tokens.tolist())
        reader.num_logprobs = 1
        results = [*reader.feed_tokens(tokens.tolist()), *reader.finish(discard_state=True)]
        is_greedy = all(
            result.top_tokens is not None and (result.top_tokens[:, 0] == result.tokens).all() for result in results
        )
        return -sum(float(result.nll.sum(dtype=np.float64)) for result in results), bool(is_greedy)

    def _score_text(self, text: str) -> float:
        reader = self._new_reader(needs_prefix=True)
        reader.parse_special = True
        for segments in (reader.feed(text), reader.finish()):
            for _ in segments:
                pass
        return -reader.totals.nll

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        unknown = options.keys() - {*MAX_TOKENS_NAMES, *SAMPLING_NAMES, *IGNORED_NAMES}
        if unknown:
            hint = f"Remove it from generation_kwargs, or use one of {', '.join(SAMPLING_NAMES)}."
            raise MemtxError(f"The generation option '{min(unknown)}' is not supported.", hint)
        max_tokens = next((options[name] for name in MAX_TOKENS_NAMES if name in options), self.max_gen_toks)
        sampling = {name: options[name] for name in SAMPLING_NAMES if options.get(name) is not None}
        if not options.get("do_sample", sampling.get("temperature", 0) > 0):
            sampling["temperature"] = 0
        until = options.get("until") or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        config = GenerationConfig(int(max_tokens), SamplingParams(**sampling), stop, int(options.get("seed", 0)))
        reader = self._new_reader(needs_prefix=not context)
        read = self.pool.read_prompt(reader, self._encode(context).tolist())
        (generation,) = self.pool.start_generation(read.reader, np.unique(read.tokens).tolist(), [config])
        return "".join(delta.text for delta in generation)


def _find_prefix_token(folder: Path, tokenizer: Tokenizer) -> int | None:
    """Return the token before the first scored one: begin or end token, even if texts do not begin with it."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    path = folder / "tokenizer_config.json"
    config = files.read_json(path) if path.is_file() else {}
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and len(tokens := tokenizer.encode(token, parse_special=True)) == 1:
            return int(tokens[0])
    return min(tokenizer.eos_token_ids, default=None)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

"""Model of lm-evaluation-harness, which streams contexts of any length with a state of constant size.

``lm_eval --model memtx --model_args pretrained=FOLDER`` finds it by its entry point. Releases up to 0.4.13 read none;
there, run ``python -m memtx.evaluation.harness`` in place of ``lm_eval``.
"""

from __future__ import annotations

import inspect
import sys
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
from memtx.inference.chat_template import ChatTemplate, load_chat_template
from memtx.inference.generate import GenerationConfig
from memtx.inference.reader import StreamReader
from memtx.inference.sampling import SamplingParams
from memtx.inference.sessions.pool import SessionPool

MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
PENALTY_NAMES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "typical_p", *PENALTY_NAMES)
OTHER_NAMES = ("do_sample", "until", "max_length", "seed")


@register_model("memtx")
class HarnessModel(LM):  # type: ignore[misc]
    """A model for lm-evaluation-harness. Contexts are never truncated, and one of several requests is read once.

    Results are those of the model ``hf`` with the same folder, up to rounding, as long as the model sees as far; but
    ``loglikelihood_rolling`` reads a begin token once where ``hf`` reads it twice if the tokenizer adds it.

    Args:
        pretrained: Model folder, checkpoint or run folder; ``window`` as in :func:`memtx.checkpoint.load.load`.
        device, dtype: Placement and dtype of the weights. Default to the CPU and the checkpoint's dtype, as "auto".
            As in the harness's own models, a CUDA device, its default, is the CPU where there is none.
        max_gen_toks: Maximum number of generated tokens where a task sets none.
        options: Options of :class:`~memtx.inference.sessions.pool.SessionPool`, such as ``segment_length``.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        window: int | None = None,
        max_gen_toks: int = 256,
        **options: Any,
    ) -> None:
        super().__init__()
        # The harness gives batch sizes; requests are batched as they come.
        options = {name: value for name, value in options.items() if "batch_size" not in name}
        pool_options = [*inspect.signature(SessionPool).parameters][2:]
        if unknown := options.keys() - pool_options:
            names = ", ".join([*inspect.signature(HarnessModel).parameters][:-1] + pool_options)
            raise MemtxError(f"'{min(unknown)}' in model_args is not an option of memtx.", f"Use one of {names}.")
        weights_dtype = None if dtype in (None, "auto") else getattr(torch, dtype, None)
        if dtype not in (None, "auto") and not isinstance(weights_dtype, torch.dtype):
            raise MemtxError(f"dtype is '{dtype}', expected the name of a dtype.", "Give float32, bfloat16 or float16.")
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"
        model, self.tokenizer = load_model_and_tokenizer(pretrained, window)
        model.to(device=device or "cpu", dtype=weights_dtype)
        folder = Path(pretrained)
        self._template = load_chat_template(folder) if folder.is_dir() else None
        self._prefix_token = _find_prefix_token(folder, self.tokenizer)
        self.max_gen_toks = max_gen_toks
        self.pool = SessionPool(model, self.tokenizer, **{"prefix_cache_bytes": 1 << 30, **options})

    def _map(self, name: str, function: Callable[..., Any], requests: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(16) as threads:
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

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation, as the folder's template renders it."""
        return self._require_template().render(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the template for the harness's record."""
        return self._require_template().templates["default"] if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Name for the harness's cache of requests."""
        return f"memtx-{self.tokenizer.fingerprint}"

    def _require_template(self) -> ChatTemplate:
        if self._template is None:
            raise MemtxError("The model has no chat template.", "Remove --apply_chat_template.")
        return self._template

    def _encode(self, text: str) -> NDArray[np.int64]:
        return np.asarray(self.tokenizer.encode(text, parse_special=True), dtype=np.int64)

    def _new_reader(self, *, needs_prefix: bool) -> StreamReader:
        reader = self.pool.new_reader()
        if needs_prefix and reader.last_token is None:
            reader.last_token = self._prefix_token
        return reader

    def _score_continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        # The harness's convention: spaces at the end of the context belong to the continuation.
        text, context = context + continuation, context.rstrip()
        context_tokens = self._encode(context)
        reader = self._new_reader(needs_prefix=not len(context_tokens))
        self.pool.read_prompt(reader, context_tokens.tolist())
        reader.num_logprobs = 1
        tokens = self._encode(text)[len(context_tokens) :].tolist()
        results = [*reader.feed_tokens(tokens), *reader.finish(discard_state=True)]
        greedy = [result.top_tokens[:, 0] for result in results if result.top_tokens is not None]
        is_greedy = not tokens or np.array_equal(np.concatenate(greedy), tokens)
        return -sum(float(result.nll.sum(dtype=np.float64)) for result in results), is_greedy

    def _score_text(self, text: str) -> float:
        reader = self._new_reader(needs_prefix=True)
        reader.parse_special = True
        for segments in (reader.feed(text), reader.finish()):
            for _ in segments:
                pass
        return -reader.totals.nll

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        if unknown := options.keys() - {*MAX_TOKENS_NAMES, *SAMPLING_NAMES, *OTHER_NAMES}:
            hint = f"Remove it from generation_kwargs, or use one of {', '.join(SAMPLING_NAMES)}."
            raise MemtxError(f"The generation option '{min(unknown)}' is not supported.", hint)
        max_tokens = next((options[name] for name in MAX_TOKENS_NAMES if name in options), self.max_gen_toks)
        sampling = {name: options[name] for name in SAMPLING_NAMES if options.get(name) is not None}
        if not options.get("do_sample", sampling.get("temperature", 0) > 0):
            sampling["temperature"] = 0
        until = options.get("until") or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        config = GenerationConfig(int(max_tokens), SamplingParams(**sampling), stop, int(options.get("seed", 0)))
        read = self.pool.read_prompt(self._new_reader(needs_prefix=not context), self._encode(context).tolist())
        (generation,) = self.pool.start_generation(read.reader, np.unique(read.tokens).tolist(), [config])
        return "".join(delta.text for delta in generation)


def _find_prefix_token(folder: Path, tokenizer: Tokenizer) -> int | None:
    """Return the token before the first scored one: begin or end token, even if texts do not begin with it."""
    path = folder / "tokenizer_config.json"
    config = files.read_json(path) if tokenizer.bos_token_id is None and path.is_file() else {}
    for token in (config.get("bos_token"), config.get("eos_token")):
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and len(tokens := tokenizer.encode(text, parse_special=True)) == 1:
            return int(tokens[0])
    return min(tokenizer.eos_token_ids, default=tokenizer.bos_token_id)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except MemtxError as error:
        sys.exit(f"memtx: {error}")

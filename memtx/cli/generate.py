"""``memtx generate``: continue a prompt, or a text that ``memtx read --session`` has read."""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import fields
from typing import Any

from memtx.cli import options
from memtx.errors import MemtxError

SETTINGS = ("max_tokens", "stop", "seed", "stop_token_ids", "ignore_eos", "min_tokens")
"""Options that :func:`memtx.inference.generate.generate` has under the same names."""


def _parse_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return options.non_negative_int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ID=NUMBER, got {text}") from None


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.prompt is None and arguments.prompt_file is None and arguments.session is None:
        raise MemtxError("There is no text to continue.", "Give --prompt, --prompt-file or --session.")
    prompt = arguments.prompt or ""
    if arguments.prompt_file is not None:
        prompt = options.decode_utf8(*options.read_input(arguments.prompt_file))
    from memtx.inference.generate import generate
    from memtx.inference.sampling import SamplingParams
    from memtx.inference.sessions.file import load_session

    values = {field.name: getattr(arguments, field.name) for field in fields(SamplingParams)}
    sampling_params = SamplingParams(**{**values, "logit_bias": dict(arguments.logit_bias)})
    reader = options.load_reader(arguments)
    if arguments.session is not None:
        load_session(arguments.session, reader)
        reader.parse_special = arguments.parse_special
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    model, tokenizer = reader.model, reader.tokenizer
    chunks = generate(model, tokenizer, prompt, reader=reader, sampling_params=sampling_params, **settings)
    for chunk in itertools.chain(chunks, ["\n"]):
        # As bytes, because the encoding of a terminal may not cover the text.
        sys.stdout.buffer.write(chunk.encode("utf-8", "replace"))
        sys.stdout.buffer.flush()
    options.print_next_command("Serve the model with", "serve", *options.checkpoint_words(arguments), is_data=True)


def main(argv: list[str]) -> int:
    """Run ``memtx generate``."""
    parser = options.Parser("memtx generate", "Continue a prompt, or a text that `memtx read --session` has read.")
    add = parser.add_argument
    parser.add_model_options(window=True)
    parser.add_parse_special_option()
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue, of any length")
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 file with the prompt, or - for standard input")
    add("--session", metavar="FILE", help="session to continue from; the file does not change")
    add("--max-tokens", type=int, default=256, help="maximum number of new tokens")
    add("--temperature", type=float, default=1.0, help="sampling temperature; 0 is greedy")
    add("--top-k", type=int, default=0, help="sample from the k most likely tokens; 0 disables it")
    add("--top-p", type=float, default=1.0, help="sample from the most likely tokens with a total probability of p")
    add("--min-p", type=float, default=0.0, help="drop tokens less likely than p times the most likely one")
    add(
        "--typical-p",
        type=float,
        default=1.0,
        help="sample from the tokens of typical surprisal, of total probability p",
    )
    text = "values above 1 make tokens of prompt and text less likely"
    add("--repetition-penalty", type=float, default=1.0, help=text)
    add("--presence-penalty", type=float, default=0.0, help="lowers the logits of tokens of the new text, -2 to 2")
    text = "lowers the logits of tokens of the new text for each occurrence, -2 to 2"
    add("--frequency-penalty", type=float, default=0.0, help=text)
    text = "number added to the logit of a token; repeatable"
    add("--logit-bias", type=_parse_bias, action="append", default=[], metavar="ID=NUMBER", help=text)
    add("--stop", action="append", default=[], metavar="TEXT", help="text to stop before; repeatable")
    text = "ids to stop at, beside the model's end tokens"
    stop_token_ids: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "ID"}
    add("--stop-token-ids", type=options.non_negative_int, **stop_token_ids, help=text)
    add("--ignore-eos", action="store_true", help="continue after the model's end tokens")
    add("--min-tokens", type=int, default=0, help="number of new tokens before which nothing ends the text")
    add("--seed", type=options.number_range(int, -(2**63), 2**64 - 1), default=0, help="random seed")
    add("--greedy", action="store_true", help="always take the most likely token")
    return parser.run(argv, _generate)

"""``memtx generate``: go on with a prompt, or with a book that ``memtx read --session`` has read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memtx.cli.options import Parser, run
from memtx.cli.read import add_checkpoint_option, add_device_options, load_reader
from memtx.errors import DataError, MemtxError


def _build_parser() -> Parser:
    parser = Parser("memtx generate", "Go on with a prompt, or with a book that `memtx read --session` has read.")
    add_checkpoint_option(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to go on with, of any length")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file with that text, or - for standard input")
    parser.add_argument("--session", metavar="FILE", help="go on where this session stands; the file stays as it is")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens made at most")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 is safer, above 1 wilder, 0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest tokens; 0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the likeliest that reach p together")
    parser.add_argument("--min-p", type=float, default=0.0, help="leave out what is less than p times the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 makes recent tokens rarer")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal texts")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--segment-length", type=int, default=512, help="tokens of the prompt read at once")
    add_device_options(parser)
    return parser


def _read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt_file is None:
        return arguments.prompt or ""
    name: str = arguments.prompt_file
    content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{name}': The text is not UTF-8: {error.reason} at byte {error.start}.",
            "Convert it, for example with iconv.",
        ) from error


def _generate(arguments: argparse.Namespace) -> int:
    if not -(2**63) <= arguments.seed < 2**64:
        raise MemtxError(f"--seed is {arguments.seed}, expected a number of 64 bits.")
    if arguments.prompt is None and arguments.prompt_file is None and arguments.session is None:
        raise MemtxError("There is nothing to go on with.", "Give --prompt, --prompt-file or --session.")
    prompt = _read_prompt(arguments)
    from memtx.inference.generate import generate
    from memtx.inference.sampling import SamplingParams
    from memtx.inference.sessions.file import load_session

    sampling = SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        greedy=arguments.greedy,
    )
    reader = load_reader(arguments)
    if arguments.session is not None:
        load_session(arguments.session, reader)
    pieces = generate(
        reader.model,
        reader.tokenizer,
        prompt,
        reader=reader,
        max_tokens=arguments.max_tokens,
        sampling_params=sampling,
        stop=arguments.stop,
        seed=arguments.seed,
    )
    for piece in pieces:
        # Bytes, so that a terminal's encoding cannot stop it.
        sys.stdout.buffer.write(piece.encode("utf-8", "replace"))
        sys.stdout.buffer.flush()
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()
    return 0


def main(argv: list[str]) -> int:
    """Run ``memtx generate`` with its arguments and return the exit code."""
    arguments = _build_parser().parse(argv)
    return run(lambda: _generate(arguments), traceback=arguments.traceback)

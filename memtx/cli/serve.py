"""``memtx serve``: a model behind HTTP: OpenAI's completions, sessions and a page, or a task's answers."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from memtx.cli.options import Parser, run
from memtx.cli.predict import load_task_predictor
from memtx.cli.read import add_checkpoint_option, add_device_options, load_reader
from memtx.errors import MemtxError, missing_package_error

if TYPE_CHECKING:
    from fastapi import FastAPI

    from memtx.serving.limits import Limits

API_KEY_VARIABLE = "MEMTX_API_KEY"
MIN_API_KEY_LENGTH = 16


def _build_parser() -> Parser:
    parser = Parser(
        "memtx serve",
        "Serve a model: OpenAI's completions, sessions that are kept, and a page at /; of a task's run, /v1/predict.",
    )
    add_checkpoint_option(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; beyond this machine it needs a key")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("--served-model-name", help="what clients call the model; the checkpoint's name by default")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that clients must show; better in {API_KEY_VARIABLE}, where no process list shows it",
    )
    parser.add_argument("--session-dir", metavar="FOLDER", default="sessions", help="where sessions are saved")
    parser.add_argument("--max-in-memory", type=int, default=256, help="sessions in memory; the others wait on disk")
    parser.add_argument("--max-sessions", type=int, default=4096, help="sessions at most")
    parser.add_argument(
        "--max-concurrent-requests", type=int, default=128, help="requests worked on at once; more are sent away"
    )
    parser.add_argument("--max-body-bytes", type=int, default=8 << 20, metavar="BYTES", help="of a request")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a text that is made")
    parser.add_argument("--max-seconds", type=float, default=300.0, help="for one request")
    parser.add_argument("--max-batch-size", type=int, default=64, help="texts made at once; more wait")
    parser.add_argument("--segment-length", type=int, default=512, help="tokens read at once")
    add_device_options(parser)
    return parser


def _get_api_key(arguments: argparse.Namespace) -> str | None:
    key: str | None = arguments.api_key if arguments.api_key is not None else os.environ.get(API_KEY_VARIABLE)
    if key is not None and (len(key) < MIN_API_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key):
        raise MemtxError(
            f"The API key must be at least {MIN_API_KEY_LENGTH} printable ASCII characters without spaces.",
            "Make one: python -c 'import secrets; print(secrets.token_urlsafe())'.",
        )
    return key


def _check_host(host: str, api_key: str | None) -> None:
    try:
        own = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        own = False
    if not own and api_key is None:
        raise MemtxError(f"--host {host} lets other machines ask, and there is no API key.", f"Set {API_KEY_VARIABLE}.")


def _serve(arguments: argparse.Namespace) -> None:
    key = _get_api_key(arguments)
    _check_host(arguments.host, key)
    if not 0 <= arguments.port < 1 << 16:
        raise MemtxError(f"--port is {arguments.port}, expected 0 to 65535.")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_package_error("memtx serve", error, "serve") from error
    from memtx.inference.predictor import is_task_model
    from memtx.serving.app import serve
    from memtx.serving.limits import Limits

    made = _create_task_app if is_task_model(arguments.checkpoint) else _create_language_model_app
    limits = Limits(
        max_body_bytes=arguments.max_body_bytes,
        max_tokens=arguments.max_tokens,
        max_seconds=arguments.max_seconds,
        max_concurrent_requests=arguments.max_concurrent_requests,
    )
    name = arguments.served_model_name or Path(arguments.checkpoint).resolve().name.removesuffix(".ckpt")
    app, what = made(arguments, name, limits, key)

    def announce(address: str) -> None:
        sys.stderr.write(f"memtx: serving '{name}' at {address} ({what}\n")
        sys.stderr.flush()

    serve(app, host=arguments.host, port=arguments.port, on_ready=announce)


def _create_language_model_app(
    arguments: argparse.Namespace, model_name: str, limits: Limits, api_key: str | None
) -> tuple[FastAPI, str]:
    """Return the application of a language model, and what there is to say of it."""
    reader = load_reader(arguments)
    from memtx.inference.sessions.pool import SessionPool
    from memtx.serving.app import create_app

    pool = SessionPool(
        reader.model,
        reader.tokenizer,
        arguments.session_dir,
        segment_length=arguments.segment_length,
        max_in_memory=arguments.max_in_memory,
        max_sessions=arguments.max_sessions,
        max_batch_size=arguments.max_batch_size,
    )
    what = (
        f"{len(pool.session_ids())} sessions in '{arguments.session_dir}', {pool.session_bytes:,} bytes each, "
        f"{pool.sessions_per_gb:,} a GB); Ctrl-C saves and ends"
    )
    return create_app(pool, model_name=model_name, limits=limits, api_key=api_key), what


def _create_task_app(
    arguments: argparse.Namespace, model_name: str, limits: Limits, api_key: str | None
) -> tuple[FastAPI, str]:
    """Return the application of a task's model, and what there is to say of it."""
    predictor = load_task_predictor(arguments)
    from memtx.serving.app import create_task_app

    return create_task_app(
        predictor, model_name=model_name, limits=limits, api_key=api_key
    ), f"{predictor.task_name}, POST /v1/predict); Ctrl-C ends"


def main(argv: list[str]) -> int:
    """Run ``memtx serve`` with its arguments and return the exit code."""
    arguments = _build_parser().parse(argv)
    return run(lambda: _serve(arguments), traceback=arguments.traceback)

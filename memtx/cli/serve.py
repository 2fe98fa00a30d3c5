"""``memtx serve``: a model behind HTTP: OpenAI's completions, sessions and a page, or a task's answers."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from memtx.cli.common import Parser, run
from memtx.cli.predict import open_predictor
from memtx.cli.read import add_checkpoint, add_device, open_reader
from memtx.errors import MemtxError, missing_package

if TYPE_CHECKING:
    from fastapi import FastAPI

    from memtx.serving.limits import Limits

KEY = "MEMTX_API_KEY"
SHORTEST_KEY = 16


def _parser() -> Parser:
    parser = Parser(
        "memtx serve",
        "Serve a model: OpenAI's completions, sessions that are kept, and a page at /; of a task's run, /v1/predict.",
    )
    add_checkpoint(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; beyond this machine it needs a key")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("--name", help="what clients call the model; the checkpoint's name by default")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"key that clients must show; better in {KEY}, where no process list shows it"
    )
    parser.add_argument("--sessions", metavar="FOLDER", default="sessions", help="where sessions are saved")
    parser.add_argument("--resident", type=int, default=256, help="sessions in memory; the others wait on disk")
    parser.add_argument("--max-sessions", type=int, default=4096, help="sessions at most")
    parser.add_argument("--max-requests", type=int, default=128, help="requests worked on at once; more are sent away")
    parser.add_argument("--max-body", type=int, default=8 << 20, metavar="BYTES", help="of a request")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a text that is made")
    parser.add_argument("--max-seconds", type=float, default=300.0, help="for one request")
    parser.add_argument("--rows", type=int, default=64, help="texts made at once; more wait")
    parser.add_argument("--segment", type=int, default=512, help="tokens read at once")
    add_device(parser)
    return parser


def _key(arguments: argparse.Namespace) -> str | None:
    key: str | None = arguments.api_key if arguments.api_key is not None else os.environ.get(KEY)
    if key is not None and (len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key):
        raise MemtxError(
            f"The API key must be at least {SHORTEST_KEY} printable ASCII characters without spaces.",
            "Make one: python -c 'import secrets; print(secrets.token_urlsafe())'.",
        )
    return key


def _check_host(host: str, key: str | None) -> None:
    try:
        own = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        own = False
    if not own and key is None:
        raise MemtxError(f"--host {host} lets other machines ask, and there is no API key.", f"Set {KEY}.")


def _serve(arguments: argparse.Namespace) -> None:
    key = _key(arguments)
    _check_host(arguments.host, key)
    if not 0 <= arguments.port < 1 << 16:
        raise MemtxError(f"--port is {arguments.port}, expected 0 to 65535.")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_package("memtx serve", error, "serve") from error
    from memtx.inference.predictor import serves_a_task
    from memtx.serving.app import serve
    from memtx.serving.limits import Limits

    made = _task_app if serves_a_task(arguments.checkpoint) else _text_app
    limits = Limits(
        body=arguments.max_body,
        tokens=arguments.max_tokens,
        seconds=arguments.max_seconds,
        requests=arguments.max_requests,
    )
    name = arguments.name or Path(arguments.checkpoint).resolve().name.removesuffix(".ckpt")
    app, what = made(arguments, name, limits, key)

    def ready(address: str) -> None:
        sys.stderr.write(f"memtx: serving '{name}' at {address} ({what}\n")
        sys.stderr.flush()

    serve(app, host=arguments.host, port=arguments.port, ready=ready)


def _text_app(arguments: argparse.Namespace, name: str, limits: Limits, key: str | None) -> tuple[FastAPI, str]:
    """Return the application of a language model, and what there is to say of it."""
    reader = open_reader(arguments)
    from memtx.inference.pool import SessionPool
    from memtx.serving.app import make_app

    pool = SessionPool(
        reader.model,
        reader.tokenizer,
        arguments.sessions,
        segment=arguments.segment,
        resident=arguments.resident,
        limit=arguments.max_sessions,
        rows=arguments.rows,
    )
    what = (
        f"{len(pool.names())} sessions in '{arguments.sessions}', {pool.session_bytes:,} bytes each, "
        f"{pool.sessions_per_gb:,} a GB); Ctrl-C saves and ends"
    )
    return make_app(pool, name=name, limits=limits, key=key), what


def _task_app(arguments: argparse.Namespace, name: str, limits: Limits, key: str | None) -> tuple[FastAPI, str]:
    """Return the application of a task's model, and what there is to say of it."""
    predictor = open_predictor(arguments)
    from memtx.serving.app import make_task_app

    return make_task_app(
        predictor, name=name, limits=limits, key=key
    ), f"{predictor.kind}, POST /v1/predict); Ctrl-C ends"


def main(argv: list[str]) -> int:
    """Run ``memtx serve`` with its arguments and return the exit code."""
    arguments = _parser().parse(argv)
    return run(lambda: _serve(arguments), traceback=arguments.traceback)

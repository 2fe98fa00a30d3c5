"""``memtx serve``: serve a model over HTTP: OpenAI completions, sessions and a web page, or task predictions."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from memtx.cli import options
from memtx.cli.predict import load_task_predictor
from memtx.errors import MemtxError, missing_package_error

if TYPE_CHECKING:
    from memtx.inference.sessions.pool import SessionPool

API_KEY_VARIABLE = "MEMTX_API_KEY"
MIN_API_KEY_LENGTH = 16


def _build_parser() -> options.Parser:
    parser = options.Parser(
        "memtx serve",
        "Serve a language model with OpenAI completions, persistent sessions and a page at /, or a task model with "
        "/v1/predict.",
    )
    add = parser.add_argument
    parser.add_checkpoint_option()
    add("--host", default="127.0.0.1", help="address to listen on; any other than localhost needs an API key")
    add("--port", type=options.number_range(int, 0, 65535), default=8000, help="port to listen on; 0 for any")
    add("--served-model-name", help="model name in requests; defaults to the checkpoint's name")
    add("--api-key", metavar="KEY", help=f"key that clients must send; better set {API_KEY_VARIABLE}")
    add("--session-dir", metavar="FOLDER", default="sessions", help="folder of saved sessions")
    add("--max-in-memory", type=int, default=256, help="maximum sessions in memory; others go to disk")
    add("--max-sessions", type=int, default=4096, help="maximum number of sessions")
    add("--max-concurrent-requests", type=int, default=128, help="maximum concurrent requests; more are refused")
    add("--max-body-bytes", type=int, default=8 << 20, metavar="BYTES", help="maximum size of a request")
    add("--max-tokens", type=int, default=4096, help="maximum tokens generated per text")
    add("--max-seconds", type=float, default=300.0, help="maximum seconds per request")
    add("--max-batch-size", type=int, default=64, help="maximum texts generated at once; others wait")
    parser.add_segment_length_option()
    parser.add_device_options()
    return parser


def _get_api_key(arguments: argparse.Namespace) -> str | None:
    key: str | None = arguments.api_key if arguments.api_key is not None else os.environ.get(API_KEY_VARIABLE)
    if key is not None and (len(key) < MIN_API_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key):
        raise MemtxError(
            f"The API key must be at least {MIN_API_KEY_LENGTH} printable ASCII characters without spaces.",
            "Create one with python -c 'import secrets; print(secrets.token_urlsafe())'.",
        )
    return key


def _check_host(host: str, api_key: str | None) -> None:
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local and api_key is None:
        raise MemtxError(f"--host {host} accepts other machines and needs an API key.", f"Set {API_KEY_VARIABLE}.")


def _serve(arguments: argparse.Namespace) -> None:
    api_key = _get_api_key(arguments)
    _check_host(arguments.host, api_key)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_package_error("memtx serve", error, "serve") from error
    from memtx.inference.predictor import is_task_model
    from memtx.serving.app import create_app, create_task_app, serve
    from memtx.serving.limits import Limits

    is_task = is_task_model(arguments.checkpoint)
    name = arguments.served_model_name or Path(arguments.checkpoint).resolve().name.removesuffix(".ckpt")
    limits = Limits(
        max_body_bytes=arguments.max_body_bytes,
        max_tokens=arguments.max_tokens,
        max_seconds=arguments.max_seconds,
        max_concurrent_requests=arguments.max_concurrent_requests,
    )
    if is_task:
        predictor = load_task_predictor(arguments)
        app = create_task_app(predictor, model_name=name, limits=limits, api_key=api_key)
        description = f"{predictor.task_name}, POST /v1/predict"
    else:
        pool = _create_pool(arguments)
        app = create_app(pool, model_name=name, limits=limits, api_key=api_key)
        description = (
            f"{len(pool.session_ids())} sessions in '{arguments.session_dir}', saved on exit, {pool.session_bytes:,} "
            f"bytes each, {pool.sessions_per_gb:,} per GB"
        )

    def announce(address: str) -> None:
        sys.stderr.write(f"memtx: serving '{name}' at {address} ({description}); Ctrl-C stops\n")
        sys.stderr.flush()

    serve(app, host=arguments.host, port=arguments.port, on_ready=announce)


def _create_pool(arguments: argparse.Namespace) -> SessionPool:
    reader = options.load_reader(arguments)
    from memtx.inference.sessions.pool import SessionPool

    return SessionPool(
        reader.model,
        reader.tokenizer,
        arguments.session_dir,
        segment_length=arguments.segment_length,
        max_in_memory=arguments.max_in_memory,
        max_sessions=arguments.max_sessions,
        max_batch_size=arguments.max_batch_size,
    )


def main(argv: list[str]) -> int:
    """Run ``memtx serve``."""
    return _build_parser().run(argv, _serve)

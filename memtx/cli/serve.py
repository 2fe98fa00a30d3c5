"""``memtx serve``: serve a model over HTTP: OpenAI completions, sessions and a web page, or task predictions."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import shlex
import sys
from pathlib import Path

from memtx.cli import options
from memtx.errors import MemtxError, missing_package_error

API_KEY_VARIABLE = "MEMTX_API_KEY"
MIN_API_KEY_LENGTH = 16


def _get_api_key(arguments: argparse.Namespace) -> str | None:
    """Return the API key, or raise if it is too weak, or missing on an address that other machines can reach."""
    key: str | None = arguments.api_key if arguments.api_key is not None else os.environ.get(API_KEY_VARIABLE)
    if key is not None and (len(key) < MIN_API_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key):
        message = f"The API key must be at least {MIN_API_KEY_LENGTH} printable ASCII characters without spaces."
        raise MemtxError(message, "Create one with python -c 'import secrets; print(secrets.token_urlsafe())'.")
    host, is_local = arguments.host, arguments.host == "localhost"
    with contextlib.suppress(ValueError):
        is_local = is_local or ipaddress.ip_address(host).is_loopback
    if not is_local and key is None:
        raise MemtxError(f"--host {host} is open to other machines and needs an API key.", f"Set {API_KEY_VARIABLE}.")
    return key


def _serve(arguments: argparse.Namespace) -> None:
    api_key = _get_api_key(arguments)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_package_error("memtx serve", error, "serve") from error
    from memtx.inference.predictor import is_task_model
    from memtx.inference.published_tasks import get_published_task
    from memtx.serving.app import create_app, create_task_app, serve
    from memtx.serving.limits import Limits

    is_task = get_published_task(arguments.checkpoint) is not None or is_task_model(arguments.checkpoint)
    name = arguments.served_model_name or Path(arguments.checkpoint).resolve().name.removesuffix(".ckpt")
    names = ("max_body_bytes", "max_tokens", "max_seconds", "max_concurrent_requests")
    limits = Limits(**{name: getattr(arguments, name) for name in names})
    if is_task:
        if arguments.window is not None:
            raise MemtxError("--window does not apply to a task model.", "Remove --window.")
        predictor = options.load_task_predictor(arguments)
        app = create_task_app(predictor, model_name=name, limits=limits, api_key=api_key)
        description = f"{predictor.task_name}, POST /v1/predict"
    else:
        from memtx.inference.chat_template import load_chat_template
        from memtx.inference.sessions.pool import SessionPool

        names = ("segment_length", "max_in_memory", "max_sessions", "max_batch_size")
        settings = {name: getattr(arguments, name) for name in names}
        template = load_chat_template(Path(arguments.checkpoint))
        settings["prefix_cache_bytes"] = arguments.prefix_cache
        settings["prefix_cache_disk_bytes"] = arguments.prefix_cache_disk
        pool = SessionPool(*options.load_model(arguments), arguments.session_dir, **settings)
        app = create_app(pool, model_name=name, limits=limits, api_key=api_key, chat_template=template)
        description = f"{len(pool.session_ids())} sessions in '{arguments.session_dir}', saved on exit, "
        description += f"{pool.session_bytes:,} bytes each, {pool.sessions_per_gb:,} per GB"

    def announce(address: str) -> None:
        sys.stderr.write(f"memtx: serving '{name}' at {address} ({description}); Ctrl-C stops\n")
        route, body = ("predict", {"input": "TEXT"}) if is_task else ("completions", {"model": name, "prompt": "Once"})
        words = ("curl", f"{address}/v1/{route}", "-H", "Content-Type: application/json", "-d", json.dumps(body))
        key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if api_key else ""  # the key itself is a secret
        sys.stderr.write(f"Try it with: {shlex.join(words)}{key}\n")
        sys.stderr.flush()

    serve(app, host=arguments.host, port=arguments.port, on_ready=announce)


def main(argv: list[str]) -> int:
    """Run ``memtx serve``."""
    parser = options.Parser(
        "memtx serve",
        "Serve a language model with OpenAI completions, persistent sessions and a page at /, or a task model with "
        "/v1/predict.",
    )
    add = parser.add_argument
    parser.add_model_options(window=True)
    add("--host", default="127.0.0.1", help="address to listen on; any other than localhost needs an API key")
    add("--port", type=options.number_range(int, 0, 65535), default=8000, help="port to listen on; 0 for any free port")
    add("--served-model-name", help="model name in requests; defaults to the checkpoint's name")
    add("--api-key", metavar="KEY", help=f"key that clients must send; prefer the variable {API_KEY_VARIABLE}")
    add("--session-dir", metavar="FOLDER", default="sessions", help="folder of saved sessions")
    add("--max-in-memory", type=int, default=256, help="maximum sessions in memory; others go to disk")
    add("--max-sessions", type=int, default=4096, help="maximum number of sessions")
    size, text = options.byte_size, "bytes of read prompts' states, so that no prefix is read twice"
    add("--prefix-cache", type=size, default="2GiB", metavar="SIZE", help=f"maximum {text}, such as 512MiB; 0 for none")
    text = "maximum bytes of them on disk, in the session folder, after they leave memory; 0 for none"
    add("--prefix-cache-disk", type=size, default="2GiB", metavar="SIZE", help=text)
    add("--max-concurrent-requests", type=int, default=128, help="maximum concurrent requests; more are refused")
    add("--max-body-bytes", type=int, default=8 << 20, metavar="BYTES", help="maximum size of a request")
    add("--max-tokens", type=int, default=4096, help="maximum tokens generated per text")
    add("--max-seconds", type=float, default=300.0, help="maximum seconds per request")
    add("--max-batch-size", type=int, default=64, help="maximum texts generated at once; others wait")
    return parser.run(argv, _serve)

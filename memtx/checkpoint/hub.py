"""Model folders on the Hugging Face hub, through ``huggingface_hub``; HF_ENDPOINT, HF_TOKEN and HF_HOME are its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memtx.errors import CheckpointError, missing_package_error

_REPO_ID = re.compile(r"(?P<repo_id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
"""Files that memtx reads; no code."""
_IGNORED = ("*/*", "consolidated*")
"""Other formats of the same weights, which large repositories have beside them."""
_PICKLES = ("pytorch_model*.bin",)


def is_repo_id(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is no local path but may be a repository: ``user/name`` or ``user/name@revision``."""
    name = os.fspath(path)
    if _REPO_ID.fullmatch(name) is None or any(part in name for part in ("--", "..", ".ckpt")):
        return False
    # Beside a folder it is a mistyped path, for which no one should wait for the network.
    return not Path(name).exists() and not Path(name.partition("/")[0]).is_dir()


def download(name: str, revision: str | None = None) -> Path:
    """Return the folder of a repository's files that memtx reads, downloaded unless they are in the cache.

    Args:
        name: ``user/name`` or ``user/name@revision``.
        revision: Branch, tag or commit. Defaults to the one in ``name``, else the main branch.

    Raises:
        CheckpointError: The repository or revision does not exist, or the hub cannot be reached.
        MemtxError: ``huggingface_hub`` is not installed.
    """
    match = _REPO_ID.fullmatch(name)
    assert match is not None, f"{name} is no repository"
    with _one_line_errors(f"'{name}' is no local path, and could not be read from the hub"):
        from huggingface_hub import snapshot_download

        def fetch(patterns: tuple[str, ...]) -> Path:
            return Path(
                snapshot_download(
                    match["repo_id"],
                    revision=revision or match["revision"],
                    endpoint=os.environ.get("HF_ENDPOINT") or None,
                    allow_patterns=list(patterns),
                    ignore_patterns=list(_IGNORED),
                )
            )

        folder = fetch(_PATTERNS)
        return folder if any(folder.glob("*.safetensors")) else fetch((*_PATTERNS, *_PICKLES))


def upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a model of memtx",
) -> str:
    """Upload a folder as one commit, creating the repository and the branch if needed, and return the commit's URL.

    Args:
        folder: Folder to upload.
        repo_id: ``user/name``.
        revision: Branch. Defaults to the main branch.
        private: If True, a new repository is private. Defaults to the rule of the account.
        token: Access token. Defaults to HF_TOKEN, or the one of ``hf auth login``.
        commit_message: Message of the commit.

    Raises:
        CheckpointError: The hub cannot be reached, or refuses.
        MemtxError: ``huggingface_hub`` is not installed.
    """
    with _one_line_errors(f"'{repo_id}' could not be uploaded to the hub"):
        from huggingface_hub import HfApi

        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=Path(folder), revision=revision, commit_message=commit_message
        )
        return str(commit.commit_url)


@contextmanager
def _one_line_errors(message: str) -> Iterator[None]:
    """Raise CheckpointError with ``message`` for every error of the hub's client and of the network below it."""
    try:
        yield
    except ImportError as error:
        raise missing_package_error("The hub", error, "hf") from error
    except Exception as error:  # the client and its HTTP library have no common base class
        raise CheckpointError(f"{message} ({_reason(error)}).", _hint(error)) from error


def _reason(error: Exception) -> str:
    """Return the sentence of an error that says what happened; the client's messages have several lines."""
    response = getattr(error, "response", None)
    if (status := getattr(response, "status_code", None)) is not None:
        detail = getattr(error, "server_message", None)
        return f"HTTP {status}: {detail.rstrip('.')}" if detail else f"HTTP {status}, {type(error).__name__}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).removeprefix("Got: ").rstrip(".")


def _hint(error: Exception) -> str:
    name, status = type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
    if name in ("RepositoryNotFoundError", "GatedRepoError", "LocalTokenNotFoundError") or status in (401, 403):
        return "Check the name; a private or gated repository needs HF_TOKEN or hf auth login."
    if name == "RevisionNotFoundError":
        return "Give a branch, tag or commit of the repository as revision."
    if status is not None:
        return "Try again, or look at the status of the hub."
    return "Check the path or name and the network; HF_HUB_OFFLINE=1 reads what is in the cache."

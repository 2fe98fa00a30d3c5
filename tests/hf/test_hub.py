"""Models on the hub: uploads, downloads by revision and errors, against a local server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import memtx
from memtx.checkpoint import hub
from memtx.checkpoint.hf_export import export_checkpoint
from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import CheckpointError
from tests.hf.fake_hub import FakeHub, serve


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        # Read at import.
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        yield server


def model(seed: int = 0) -> memtx.MemoryTransformer:
    torch.manual_seed(seed)
    memories = [partial(memtx.CompressedMemory, window=8)]
    return memtx.MemoryTransformer(257, dim=16, depth=1, heads=2, memories=memories).eval()


def test_push_and_load_by_revision(fake_hub: FakeHub) -> None:
    models = [model(seed) for seed in range(3)]
    url = models[0].push_to_hub("user/night", tokenizer=ByteTokenizer())
    first = url.rpartition("/")[2]
    models[1].push_to_hub("user/night", tokenizer=ByteTokenizer(), commit_message="Second")
    models[2].push_to_hub("user/night", tokenizer=ByteTokenizer(), revision="long")
    for name, revision, expected in (
        ("user/night", None, models[1]),
        ("user/night", first, models[0]),
        ("user/night", "long", models[2]),
        ("user/night@long", None, models[2]),
    ):
        loaded = memtx.from_pretrained(name, revision=revision)
        assert loaded.fingerprint == expected.fingerprint, (name, revision)
    assert type(models[0]).from_pretrained("user/night", revision=first).fingerprint == models[0].fingerprint
    _, tokenizer = load_model_and_tokenizer("user/night")
    assert tokenizer.encode_chunk("Aé").tolist() == [*"Aé".encode()]
    # Code of a repository is not even downloaded.
    assert not [request for request in fake_hub.requests if request.endswith(".py")]
    card = fake_hub.find("user/night", "main")
    assert card is not None
    assert b'from_pretrained("user/night"' in card[1]["README.md"]


def test_plain_folders_are_loaded_too(fake_hub: FakeHub, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "folder")
    hub.upload(tmp_path / "folder", "user/plain", private=True)
    assert "user/plain" in fake_hub.private
    assert memtx.from_pretrained("user/plain").fingerprint == model().fingerprint
    # A local folder of that name comes first.
    model(1).save_pretrained(tmp_path / "user" / "plain")
    assert memtx.from_pretrained("user/plain").fingerprint == model(1).fingerprint


def test_converted_run_is_uploaded(fake_hub: FakeHub, tmp_path: Path) -> None:
    from memtx.cli.main import main

    model().save_pretrained(tmp_path / "folder")
    ByteTokenizer().save(tmp_path / "folder" / "tokenizer.json")
    assert main(["convert", "folder", "out", "--to", "hf", "--push-to-hub", "user/run"]) == 0
    assert memtx.from_pretrained("user/run").fingerprint == model().fingerprint
    assert main(["generate", "--checkpoint", "user/run", "--prompt", "A", "--max-tokens", "3"]) == 0
    assert main(["generate", "--checkpoint", "user/missing", "--prompt", "A", "--max-tokens", "3"]) == 2
    assert main(["convert", "user/run", "plain", "--push-to-hub", "user/plain"]) == 0
    assert memtx.from_pretrained("user/plain").fingerprint == model().fingerprint
    export_checkpoint("user/run@main", tmp_path / "again")
    assert memtx.from_pretrained(tmp_path / "again").fingerprint == model().fingerprint


def test_errors_take_one_line(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model().push_to_hub("user/night", tokenizer=ByteTokenizer())
    (tmp_path / "runs").mkdir()
    cases: list[tuple[str, Callable[[], object]]] = [
        ("'user/other' is no local path, and could not be read.*404", lambda: memtx.from_pretrained("user/other")),
        ("revision", lambda: memtx.from_pretrained("user/night", revision="old")),
        ("401.*HF_TOKEN", lambda: model().push_to_hub("user/night", token="hf_wrong")),
        ("local path.*Remove revision", lambda: memtx.from_pretrained(tmp_path, revision="old")),
        ("does not exist", lambda: memtx.from_pretrained("runs/typo")),
        ("does not exist", lambda: memtx.from_pretrained("user/last.ckpt")),
        ("does not exist", lambda: memtx.from_pretrained("a/b/c")),
    ]
    for message, call in cases:
        with pytest.raises(CheckpointError, match=message) as refusal:
            call()
        assert "\n" not in str(refusal.value)
    memtx.from_pretrained("user/night")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert memtx.from_pretrained("user/night").fingerprint == model().fingerprint  # from the cache
    offline: list[Callable[[], object]] = [
        lambda: memtx.from_pretrained("user/night", revision="old"),
        lambda: model().push_to_hub("user/night"),
    ]
    for call in offline:
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE") as refusal:
            call()
        assert "\n" not in str(refusal.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=r"could not be read.*network"):
        memtx.from_pretrained("user/never")

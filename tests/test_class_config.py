"""Factories as data and back, and classes that a config must not reach."""

from __future__ import annotations

import functools
import json
from functools import partial
from typing import Any

import pytest
from torch import nn

from memtx.class_config import from_config, to_config
from memtx.errors import CheckpointError
from memtx.memory.compressed import CompressedMemory
from memtx.memory.compression import AttentionPooling, AutoEncoding, StridedConvolution
from memtx.memory.recurrent import RecurrentMemory

NESTED = partial(
    CompressedMemory,
    compression_rate=2,
    compression=partial(AttentionPooling, heads=2),
    reconstruction=AutoEncoding,
    compress_per_segment=True,
)


class Foreign(nn.Module):
    def __init__(self, dim: int, size: int = 1) -> None:
        super().__init__()
        self.size = (dim, size)


def is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, partial) and isinstance(b, partial):
        return (
            a.func is b.func
            and a.keywords.keys() == b.keywords.keys()
            and all(is_equal(value, b.keywords[key]) for key, value in a.keywords.items())
        )
    if isinstance(a, list):
        return len(a) == len(b) and all(map(is_equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize(
    "value",
    [1, 0.5, None, True, "text", [1, [2]], NESTED, RecurrentMemory, [NESTED, nn.Linear], partial(Foreign, size=3)],
)
def test_factories_survive_json(value: Any) -> None:
    assert is_equal(from_config(json.loads(json.dumps(to_config(value)))), value)


def test_restored_factories_build_their_objects() -> None:
    memory = from_config(to_config(NESTED))(8)
    assert (memory.dim, memory.compression_rate, memory.compress_per_segment) == (8, 2, True)
    assert isinstance(memory.compression, AttentionPooling)
    assert memory.compression.heads == 2


def test_jsonargparse_partials_are_saved_as_their_class() -> None:
    """jsonargparse passes a partial of its instantiator, with the class as the last positional argument."""

    def instantiator(*args: Any, **options: Any) -> Any:
        raise AssertionError

    factory = functools.partial(instantiator, object(), StridedConvolution)
    assert to_config(factory) == {"class_path": "memtx.memory.compression.StridedConvolution", "init_args": {}}


@pytest.mark.parametrize("value", [lambda dim: dim, nn.Linear(1, 1), partial(nn.Linear, 3), object()])
def test_objects_without_class_path_are_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        to_config(value)


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("memtx.memory.compression.StridedConvolutoin", {}, "Did you mean 'StridedConvolution'"),
        ("memtx.nothing.Here", {}, "cannot be imported"),
        ("memtx.memory.recurrent.RecurrentMemory", {"windw": 3}, "'windw'.*Did you mean 'window'"),
        ("not_imported_by_anyone.Thing", {}, "was not imported"),
        ("", {}, "was not imported"),
        # Modules of the standard library are always imported, also by memtx.
        ("os.system", {"command": "true"}, "neither a torch module nor a part of memtx"),
        ("subprocess.Popen", {"args": "true"}, "neither a torch module nor a part of memtx"),
        ("builtins.eval", {}, "neither a torch module nor a part of memtx"),
        ("memtx.files.write_text", {"path": "x"}, "neither a torch module nor a part of memtx"),
        ("memtx.class_config.importlib", {}, "neither a torch module nor a part of memtx"),
    ],
)
def test_unknown_classes_are_refused(path: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_config({"class_path": path, "init_args": arguments})

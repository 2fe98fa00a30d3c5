"""A CUDA device in name only, on which fake tensors of a CPU build of torch run: dtypes, graphs, launches, memory.

Importing this module must come before importing torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("fake_cuda.cpp")


def load_fake_device(torch_dir: Path) -> None:
    """Compile the device (two seconds) and load it."""
    assert "torch" not in sys.modules, "torch has looked for CUDA already"
    libraries = torch_dir / "lib"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fake_cuda.so"
        includes = [f"-I{torch_dir / 'include'}", f"-I{torch_dir / 'include/torch/csrc/api/include'}"]
        linking = [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
        command = ["c++", "-O0", "-shared", "-fPIC", "-std=c++20", *includes, str(SOURCE), *linking, "-o", str(library)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library))


spec = find_spec("torch")
assert spec is not None
assert spec.origin is not None
load_fake_device(Path(spec.origin).parent)

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Create all tensors as fake tensors on CUDA."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_device("cuda")
        try:
            yield
        finally:
            torch.set_default_device(None)


@contextlib.contextmanager
def cuda_autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Autocast on CUDA; ``torch.autocast`` would disable itself without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def _storages(values: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class LaunchCounter(TorchDispatchMode):
    """Count operators that compute: views and casts to the same dtype return a storage that they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        outputs = [storage._cdata for storage in _storages(out)]
        if func._schema.is_mutable or any(storage not in inputs for storage in outputs):
            self.counts[func._schema.name.partition("::")[2]] += 1
        return out


class MemoryTracker(TorchDispatchMode):
    """Track the bytes of the storages that are alive, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.counts: Counter[str] = Counter()
        self._seen: set[int] = set()

    def _free(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.current -= num_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.counts[func._schema.name.partition("::")[2]] += 1
        inputs = {storage._cdata for storage in _storages((args, kwargs or {}))}
        for storage in _storages(out):
            key, num_bytes = storage._cdata, storage.nbytes()
            if key not in inputs and key not in self._seen:
                self._seen.add(key)
                self.current += num_bytes
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self._free, key, num_bytes)
        return out


class GraphCounter:
    """A backend of ``torch.compile`` that counts graphs and runs them uncompiled, their backward traced as well."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.num_graphs = 0
        self.backend: Callable[..., Any] = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.num_graphs += 1
        return self.backend(graph, inputs)

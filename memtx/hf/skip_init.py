"""Modules without numbers: made where their weights will stand, but nothing is drawn and no page is touched.

Torch's own way, its meta device, would import a compiler's worth of modules, some 80 MB and a second or two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_INIT_FUNCTIONS = {
    # Either may be asked for: some of nn.init hand themselves over whole.
    *(Tensor.normal_, Tensor.uniform_),
    *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_),
}


class _SkipInitMode(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {**(kwargs or {})}
        return (args[0] if args else given["tensor"]) if func in _INIT_FUNCTIONS else func(*args, **given)


@contextmanager
def skip_init(dtype: torch.dtype) -> Iterator[None]:
    """Make modules of a type within the block, their matrices left as they were found in memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _SkipInitMode():
            yield
    finally:
        torch.set_default_dtype(before)

"""What is made once a call: layers of equal settings share lifetimes, masks and angles."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True)
class Memo:
    """A value that carries what was made of it."""

    _values: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def memo(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return ``compute()``, computed the first time the key is asked for."""
        if key not in self._values:
            self._values[key] = compute()
        return cast(T, self._values[key])

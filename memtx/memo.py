"""Caching of derived values: layers with equal settings share the masks and angles of one call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True)
class Memo:
    """Base class of values that cache results derived from them."""

    _values: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def memo(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return ``compute()``, which is called only once per ``key``."""
        if key not in self._values:
            self._values[key] = compute()
        return cast(T, self._values[key])

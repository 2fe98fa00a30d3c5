"""What is made once a call: layers of equal settings share lifetimes, masks and angles."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True)
class Once:
    """A value that carries what was made of it."""

    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return ``make()``, computed the first time the key is asked for."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

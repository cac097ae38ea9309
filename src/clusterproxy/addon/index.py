"""What is where, found from both sides. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

K = TypeVar("K", bound="Hashable")


class Index(Generic[K]):
    """Names, each under any number of keys: whoever asks for those of a key need not look at all of them."""

    def __init__(self) -> None:
        self._keys: dict[str, tuple[K, ...]] = {}
        self._names: dict[K, dict[str, None]] = {}

    def put(self, name: str, keys: Iterable[K]) -> None:
        """Have a name under these keys, and under no others."""
        for key in self._keys.pop(name, ()):
            names = self._names[key]
            del names[name]
            if not names:
                del self._names[key]
        if found := tuple(dict.fromkeys(keys)):
            self._keys[name] = found
        for key in found:
            self._names.setdefault(key, {})[name] = None

    def under(self, key: K) -> list[str]:
        """Return the names under a key, the last that was put there last."""
        return list(self._names.get(key, ()))

    def names(self) -> list[str]:
        """Return all names that are under any key."""
        return list(self._keys)

"""Somebody who changes back what was repaired is told of, and repairs wait for ever longer. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

import attrs
import trio

from clusterproxy.errors import ClusterProxyError
from clusterproxy.kube.resource import list_at, map_at, text_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from clusterproxy.kube.resource import Object

# So many repairs are made at once. Then there is a pause before each, which doubles.
_AT_ONCE: Final = 5
_PAUSE_MIN_S: Final = 1.0
_PAUSE_MAX_S: Final = 60.0
# After so long without a repair all is forgotten.
_PEACE_S: Final = 300.0

_SHOWN: Final = 5
# What the apiserver notes of our writes: the program's name in the user agent.
_OURSELVES: Final = "clusterproxy"


class ConflictingWriter(ClusterProxyError):
    """An object was changed back too often to be repaired now; the text says which, what in it, and by whom.

    Attributes:
      seconds: until it may be repaired again.
    """

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


@attrs.define
class _Repairs:
    wanted: object
    last: float
    count: int = 0


class Contention:
    """How often objects had to be written again although what is wanted of them had not changed."""

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        self._clock = clock
        self._repairs: dict[str, _Repairs] = {}

    def check(self, name: str, wanted: object, what: str, by: str = "") -> None:
        """Return if the object *name* may be written.

        Args:
          wanted: what it is to be; another one may be written at once.
          what: is wrong with it.
          by: whose doing that is, empty if that is not known.

        Raises:
          ConflictingWriter: not yet.
        """
        known = self._repairs.get(name)
        if known is None or known.wanted != wanted or known.count < _AT_ONCE:
            return
        pause = min(_PAUSE_MIN_S * 2 ** (known.count - _AT_ONCE), _PAUSE_MAX_S)
        seconds = known.last + pause - self._clock()
        if seconds > 0:
            raise ConflictingWriter(
                f"{name} is changed again whenever it is repaired ({what}) by {by or 'somebody else'}: end that, or "
                "say in the ManagedProxyConfiguration what is wanted. Until then it is repaired ever more seldom",
                seconds,
            )

    def written(self, name: str, wanted: object) -> None:
        """Note that an object was written."""
        now = self._clock()
        known = self._repairs.get(name)
        if known is None or known.wanted != wanted or now - known.last > _PEACE_S:
            self._repairs[name] = _Repairs(wanted, now)
        else:
            known.last = now
            known.count += 1


def differences(live: object, wanted: object) -> list[str]:
    """Return the paths at which two objects differ, the first few of them."""
    paths = [".".join(path).replace(".[", "[") for path in _differences(live, wanted, ())]
    return paths if len(paths) <= _SHOWN else [*paths[:_SHOWN], "…"]


def _differences(live: object, wanted: object, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(live, dict) and isinstance(wanted, dict):
        first, second = cast("Object", live), cast("Object", wanted)
        for key in sorted({*first, *second}):
            yield from _differences(first.get(key), second.get(key), (*path, key))
    elif isinstance(live, list) and isinstance(wanted, list):
        ones, others = cast("list[object]", live), cast("list[object]", wanted)
        if len(ones) != len(others):
            yield path
            return
        for place, (one, other) in enumerate(zip(ones, others, strict=True)):
            yield from _differences(one, other, (*path, f"[{place}]"))
    elif live != wanted:
        yield path


def last_writer(live: Object) -> str:
    """Return who else has written an object last, as far as the apiserver has noted that; or nothing."""
    others = [
        entry
        for entry in list_at(live, "metadata", "managedFields")
        if text_at(entry, "manager") not in ("", _OURSELVES)
        # Status is nobody's wish.
        and not text_at(entry, "subresource")
        and map_at(entry, "fieldsV1")
    ]
    if not others:
        return ""
    return text_at(max(others, key=lambda entry: text_at(entry, "time")), "manager")

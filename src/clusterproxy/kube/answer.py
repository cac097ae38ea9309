"""What an apiserver's answers mean. Pure."""

from __future__ import annotations

import json
from typing import Any, Final, cast

import attrs

from clusterproxy.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    KubeError,
    KubeUnavailable,
    NotFound,
    Unauthorized,
)

from .api import Change, WatchEvent
from .resource import Object, text_at

_EXCERPT: Final = 200

# Of a status alone. What is not here, below 500, is a plain KubeError.
_ERRORS: Final[dict[int, type[KubeError]]] = {
    400: Invalid,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    413: Invalid,
    422: Invalid,
    429: KubeUnavailable,
}

# What Go's mux says of a path that it does not know, which is how an apiserver says that it has no such
# group or version.
_NO_SUCH_PATH: Final = b"404 page not found"


@attrs.frozen
class Answer:
    """An answer that was read to its end.

    Attributes:
      call: what was asked, for messages: ``get /api/v1/secrets``.
      retry_after: seconds, None without a usable header.
    """

    call: str
    status: int
    body: bytes
    retry_after: float | None = None

    def object(self) -> Object:
        """Return the object that it carries.

        Raises:
          KubeError: it says that something is wrong, or says nothing that can be understood.
        """
        if not self.ok:
            raise self.error()
        document = _document(self.body)
        if document is None:
            raise KubeUnavailable(
                f"{self.call}: the answer is no JSON object: {self._excerpt()}", status=self.status
            )
        return document

    @property
    def ok(self) -> bool:
        """Whether the call was done."""
        return 200 <= self.status < 300

    def error(self) -> KubeError:
        """Return what it says is wrong."""
        document = _document(self.body)
        if document is not None and document.get("kind") == "Status":
            return failure(self.call, document, self.status)
        if self.status == 404 and not self.body.startswith(_NO_SUCH_PATH):
            # Of whoever stands before the apiserver. Believed, it would make controllers create anew what is there.
            kind: type[KubeError] = KubeUnavailable
        else:
            kind = _error_class(self.status, "")
        return kind(
            f"{self.call}: status {self.status}: {self._excerpt()}",
            status=self.status,
        )

    def _excerpt(self) -> str:
        text = self.body[: _EXCERPT + 1].decode(errors="replace").strip()
        return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"


def failure(call: str, document: Object, status: int = 0) -> KubeError:
    """Return the error that a ``Status`` object tells of (apimachinery: metav1.Status)."""
    code = document.get("code")
    if not status:
        status = code if isinstance(code, int) else 500
    reason = text_at(document, "reason")
    message = text_at(document, "message") or reason or f"status {status}"
    return _error_class(status, reason)(f"{call}: {message}", status=status, reason=reason)


def watch_event(call: str, line: bytes) -> WatchEvent:
    """Return what a line of a watch says.

    Raises:
      KubeError: it says that the watch has failed, or cannot be understood.
    """
    document = _document(line)
    found = document.get("object") if document is not None else None
    if document is None or not isinstance(found, dict):
        excerpt = line[:_EXCERPT].decode(errors="replace")
        raise KubeUnavailable(f"{call}: the watch said what is no event: {excerpt}")
    obj = cast("Object", found)
    kind = text_at(document, "type")
    if kind == "ERROR":
        raise failure(call, obj)
    try:
        return WatchEvent(Change(kind), obj)
    except ValueError:
        raise KubeUnavailable(f"{call}: the watch told of an unknown change {kind!r}") from None


def retry_after(header: str | None) -> float | None:
    """Return the seconds of a ``Retry-After``; a date, which no apiserver sends, is as no header."""
    if header is None or not header.strip().isdecimal():
        return None
    return float(header)


def _document(body: bytes) -> Object | None:
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return cast("Object", document) if isinstance(document, dict) else None


def _error_class(status: int, reason: str) -> type[KubeError]:
    if status == 409 and reason == "AlreadyExists":
        return AlreadyExists
    if status < 400 or status >= 500:
        return KubeUnavailable
    return _ERRORS.get(status, KubeError)

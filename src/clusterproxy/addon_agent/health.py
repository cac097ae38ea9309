"""What the proxy agent's liveness probe asks: whether its certificates have changed, and the way to the hub is there.

Source: controller-runtime ``pkg/healthz/healthz.go`` (texts), addon-framework ``pkg/utils/config_checker.go``.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

from clusterproxy.gotext import quote
from clusterproxy.http1 import Request, Response

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    Check = Callable[[], str]
    """Returns what is wrong, empty for nothing."""

_log = logging.getLogger("clusterproxy.addon_agent")

_NOSNIFF = {"X-Content-Type-Options": "nosniff"}


class Certificates:
    """Fails once after files have changed, so that a kubelet restarts who has read them only at its start.

    Two probes at one time see one failure: a check has no checkpoint. Files that cannot be read have not changed.

    Args:
      needless: whether who uses the files takes new ones while it runs; then the check does not fail.
    """

    def __init__(self, files: Sequence[Path], needless: Callable[[], bool]) -> None:
        self._files = files
        self._needless = needless
        self._readable = True
        self._known = self._read()

    def check(self) -> str:
        """Return what has changed, empty for nothing."""
        found = self._read()
        known = self._known
        if found is None or found == known:
            return ""
        self._known = found
        if known is None:
            return ""
        if self._needless():
            _log.info("the certificates have changed, and the proxy agent takes new ones by itself")
            return ""
        _log.info(
            "the certificates have changed: this probe fails, so that the proxy agent is restarted"
        )
        return "checksum not equal"

    def _read(self) -> bytes | None:
        digest = hashlib.sha256()
        try:
            for file in self._files:
                content = file.read_bytes()
                digest.update(len(content).to_bytes(8, "big") + content)
        except OSError as error:
            if self._readable:
                _log.warning("cannot read %s: %s", error.filename, error.strerror)
            self._readable = False
            return None
        self._readable = True
        return digest.digest()


def health_handler(checks: Mapping[str, Check]) -> Callable[[Request], Response]:
    """Return the handler of the health port: ``/healthz``, with ``?verbose`` and ``?exclude=CHECK``."""

    def handler(request: Request) -> Response:
        if request.path != "/healthz":
            return Response(404, b"404 page not found\n", headers=_NOSNIFF)
        return _answer(checks, set(request.query.get("exclude", ())), "verbose" in request.query)

    return handler


def _answer(checks: Mapping[str, Check], excluded: set[str], verbose: bool) -> Response:
    failed = False
    lines: list[str] = []
    for name, check in sorted(checks.items()):
        if name in excluded:
            lines.append(f"[+]{name} excluded: ok\n")
        elif check():
            # As the original: who may ask is not known here.
            lines.append(f"[-]{name} failed: reason withheld\n")
            failed = True
        else:
            lines.append(f"[+]{name} ok\n")
    if unknown := sorted(excluded - checks.keys()):
        names = ",".join(map(quote, unknown))
        lines.append(f"warn: some health checks cannot be excluded: no matches for {names}\n")
    lines.append(f"healthz check {'failed' if failed else 'passed'}\n")
    text = "".join(lines) if failed or verbose else "ok"
    return Response(500 if failed else 200, text.encode(), headers=_NOSNIFF)

"""Certificates that change while the program runs.

New handshakes use the new files; connections that are up keep what they have. Files are looked at
every few seconds instead of being watched: that sees Kubernetes' swap of the ``..data`` link,
a file rewritten in place, and changes on file systems that notify nobody.
"""

from __future__ import annotations

import logging
import os
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger("clusterproxy.tls")

OK: Final = "ok"
ERROR: Final = "error"

_INTERVAL_S: Final = 10.0
_END: Final = "-----END CERTIFICATE-----"
_SEQUENCE: Final = 0x30
_UTC_TIME: Final = 0x17
_VERSION: Final = 0xA0

# What tells one content of a file from another; None for a file that is not there.
_Stamp = tuple[int, int, int, int] | None


class ReloadingContext:
    """The context to use for the next handshake, made afresh when one of *files* changes.

    Args:
        factory: makes the context from the files; raises ConfigError when it cannot.
        files: all files that the factory reads.
        certificate: the one of them whose expiry :meth:`not_after` tells.
        on_reload: called with ``ok`` or ``error`` after each attempt to load changed files.

    Raises:
        ConfigError: the files do not load at the start.
    """

    def __init__(
        self,
        factory: Callable[[], ssl.SSLContext],
        files: Sequence[str],
        *,
        certificate: str | None = None,
        on_reload: Callable[[str], object] | None = None,
    ) -> None:
        self._factory = factory
        self._files = tuple(files)
        self._certificate = certificate
        self._on_reload = on_reload
        self._failure = ""
        # Taken before the files are read: what changes meanwhile is seen the next time.
        self._loaded: tuple[_Stamp, ...] = self._stamps()
        self._context = factory()
        self._not_after = self._read_expiry()

    def current(self) -> ssl.SSLContext:
        """Return the newest context that could be loaded."""
        return self._context

    @property
    def failure(self) -> str:
        """What is wrong with the files as they are now, so that older ones are in use; empty if nothing."""
        return self._failure

    def not_after(self) -> float | None:
        """Return when the certificate in use ends, in seconds since 1970; None if that is unknown."""
        return self._not_after

    async def watch(self, interval_s: float = _INTERVAL_S) -> Never:
        """Load changed files every *interval_s*, for ever.

        Cancellation: at any time.
        """
        while True:
            await trio.sleep(interval_s)
            self.check()

    def check(self) -> None:
        """Load the files if they changed, and keep what is in use if they do not load.

        A pair of which one half is not written yet fails too, so failures are tried again at every
        check, and logged once.
        """
        stamps = self._stamps()
        if stamps == self._loaded:
            self._failure = ""
            return
        self._load(stamps)

    def reload(self) -> None:
        """Make the context afresh because something beside the files changed, such as the TLS profile."""
        stamps = self._stamps()
        # If that fails every check tries again, though the files are as they were.
        self._loaded = ()
        self._load(stamps)

    def _load(self, stamps: tuple[_Stamp, ...]) -> None:
        try:
            context = self._factory()
        except ConfigError as error:
            result = ERROR
            if error.message != self._failure:
                self._failure = error.message
                log.warning("certificates not reloaded, the old ones stay in use: %s", error)
        else:
            result = OK
            self._failure = ""
            self._context = context
            self._loaded = stamps
            self._not_after = self._read_expiry()
            log.info("certificates reloaded: %s", ", ".join(self._files))
        if self._on_reload is not None:
            self._on_reload(result)

    def _stamps(self) -> tuple[_Stamp, ...]:
        return tuple(map(_stamp, self._files))

    def _read_expiry(self) -> float | None:
        return None if self._certificate is None else read_not_after(self._certificate)


def _stamp(path: str) -> _Stamp:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def read_not_after(path: str) -> float | None:
    """Return when the first certificate in a PEM file ends, None if that cannot be told.

    The ssl module tells it of a peer's certificate and of CAs, but not of our own.
    """
    try:
        pem = Path(path).read_text(encoding="utf-8", errors="replace")
        begin = pem.index("-----BEGIN CERTIFICATE-----")
        der = ssl.PEM_cert_to_DER_cert(pem[begin : pem.index(_END, begin) + len(_END)])
        return _not_after(der)
    except (OSError, ValueError, IndexError):
        return None


def _not_after(der: bytes) -> float:
    """Walk to ``tbsCertificate.validity.notAfter`` (RFC 5280 section 4.1)."""
    certificate = _content(der, 0, _SEQUENCE)
    tbs = _content(der, certificate[0], _SEQUENCE)
    at = tbs[0]
    if der[at] == _VERSION:
        at = _element(der, at)[1]
    for _ in ("serialNumber", "signature", "issuer"):
        at = _element(der, at)[1]
    start, _end = _content(der, at, _SEQUENCE)
    at = _element(der, start)[1]
    begin, end = _element(der, at)
    text = der[begin:end].decode("ascii")
    if der[at] == _UTC_TIME:
        # RFC 5280 section 4.1.2.5.1: two digits of a year between 1950 and 2049.
        text = ("19" if text[:2] >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _content(der: bytes, at: int, tag: int) -> tuple[int, int]:
    if der[at] != tag:
        raise ValueError(f"tag {der[at]:#x} at {at}")
    return _element(der, at)


def _element(der: bytes, at: int) -> tuple[int, int]:
    """Return where the content of the DER element at *at* begins and ends."""
    length = der[at + 1]
    begin = at + 2
    if length & 0x80:
        octets = length & 0x7F
        length = int.from_bytes(der[begin : begin + octets], "big")
        begin += octets
    return begin, begin + length

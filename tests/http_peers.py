"""Other people's clients for what speaks HTTP: curl, ``httpx`` with HTTP/2, ``websocket-client``.

Of a WebSocket and of HTTP/2 the parts are not ours, as those of our own tests in memory are.
"""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from typing import TYPE_CHECKING

import attrs
import httpx
import pytest
import websocket

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")

_MARK = b"\n--curl says--\n"


@attrs.frozen
class CurlAnswer:
    """What curl got.

    Attributes:
      version: of HTTP, "1.1" or "2".
      headers: of the last answer, each with its values in their order, by their names in small letters.
      error: curl's own, empty if there was none.
    """

    status: int
    version: str
    headers: dict[str, list[str]]
    body: bytes
    error: str


def curl(url: str, *options: str, ca: Path | None = None, stdin: bytes | None = None) -> CurlAnswer:
    """Ask by curl; *options* are its own, such as ``--http1.1``, ``--http2``, ``--header``, ``--data-binary @-``."""
    trust = () if ca is None else ("--cacert", str(ca))
    report = f"%{{stderr}}{_MARK.decode()}%{{json}}\n%{{header_json}}"
    command = ("curl", "--disable", "-sS", "--max-time", "30", "--noproxy", "*", *trust)
    done = subprocess.run(
        (*command, "--path-as-is", "--write-out", report, *options, url),
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        timeout=60,
        check=False,
    )
    error, _, told = done.stderr.partition(_MARK)
    values, end = json.JSONDecoder().raw_decode(told.decode())
    return CurlAnswer(
        status=values["response_code"],
        version=values["http_version"],
        headers=json.loads(told.decode()[end:]),
        body=done.stdout,
        error=error.decode(errors="replace") if done.returncode else "",
    )


def http2_client(ca: Path, **options: object) -> httpx.Client:
    """Return a client that speaks HTTP/2 only, and trusts *ca*; ``options`` are those of ``httpx.Client``."""
    return httpx.Client(
        http1=False,
        http2=True,
        verify=ssl.create_default_context(cafile=ca),
        trust_env=False,
        **options,  # type: ignore[arg-type]
    )


def open_websocket(
    url: str,
    ca: Path | None = None,
    *,
    protocols: tuple[str, ...] = (),
    headers: Mapping[str, str] | None = None,
    within_s: float = 20.0,
) -> websocket.WebSocket:
    """Return a WebSocket that is open; each call of it takes *within_s* at most, and its end closes it.

    Raises:
      websocket.WebSocketBadStatusException: the server answered otherwise; has its ``status_code`` and ``resp_body``.
    """
    return websocket.create_connection(
        url,
        timeout=within_s,
        subprotocols=list(protocols),
        header=dict(headers or {}),
        sslopt={} if ca is None else {"ca_certs": str(ca)},
        http_no_proxy=["*"],
        suppress_origin=True,
    )

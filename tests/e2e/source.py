"""A program in a managed cluster: an HTTP server, any path of which is the same gibibyte.

Usage: source.py PORT. Needs nothing but Python.
"""

from __future__ import annotations

import hashlib
import random
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 1 << 20
PIECES = 1024


def pieces() -> Iterator[bytes]:
    """Return all of it, in pieces of which no two are the same."""
    piece = random.Random(9).randbytes(PIECE)  # noqa: S311
    for number in range(PIECES):
        yield number.to_bytes(4, "big") + piece[4:]


def digest() -> str:
    """Return the SHA-256 of all of it."""
    whole = hashlib.sha256()
    for piece in pieces():
        whole.update(piece)
    return whole.hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(PIECES * PIECE))
        self.end_headers()
        for piece in pieces():
            self.wfile.write(piece)


if __name__ == "__main__":
    ThreadingHTTPServer(("", int(sys.argv[1])), Handler).serve_forever()

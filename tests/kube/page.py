"""A program for pods of tests: serves what a file says, and ends at once when it is told to.

Usage: page.py --file PATH. Listens on POD_IP:8080, half a second after its start.
"""

from __future__ import annotations

import http.server
import json
import os
import sys
import time
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answer = {
            "pod": os.environ["POD_NAME"],
            "text": Path(sys.argv[2]).read_text(),
            "arguments": sys.argv[3:],
            "account": sorted(path.name for path in ACCOUNT.glob("[a-z]*")),
        }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


if __name__ == "__main__":
    time.sleep(0.5)
    http.server.ThreadingHTTPServer((os.environ["POD_IP"], 8080), Page).serve_forever()

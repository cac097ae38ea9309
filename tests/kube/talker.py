"""A program for pods of tests: writes what it reads, and at POD_IP:8080 answers a request with its body."""

from __future__ import annotations

import http.server
import os
import sys
import threading


class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer((os.environ["POD_IP"], 8080), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        print(line, end="", flush=True)  # noqa: T201

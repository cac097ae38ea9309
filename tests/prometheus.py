"""Prometheus itself, as a service that somebody reaches through a proxy."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any, Self

import httpx
from kube.build import prometheus_program
from kube.control_plane import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class Prometheus:
    """Runs while its block lasts, scrapes itself each second, and knows no other target.

    Args:
      directory: of its data and log.
      address, port: where it listens.
      options: more of its flags, without the dashes, such as ``web.external-url`` (then with ``web.route-prefix=/``).

    Attributes:
      url: where it is without a proxy.
    """

    def __init__(
        self, directory: Path, address: str, port: int, options: Mapping[str, str] | None = None
    ) -> None:
        self.url = f"http://{address}:{port}"
        self._directory = directory
        self._listens = f"{address}:{port}"
        self._options = options or {}
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        program = prometheus_program()
        self._directory.mkdir(parents=True, exist_ok=True)
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [
                {"job_name": "itself", "static_configs": [{"targets": [self._listens]}]}
            ],
        }
        # JSON is YAML, too.
        (self._directory / "prometheus.yml").write_text(json.dumps(config))
        options = {
            "config.file": str(self._directory / "prometheus.yml"),
            "storage.tsdb.path": str(self._directory / "data"),
            "web.listen-address": self._listens,
            **self._options,
        }
        with (self._directory / "prometheus.log").open("ab") as log:
            self._process = subprocess.Popen(
                (
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    program,
                    *(f"--{name}={value}" for name, value in options.items()),
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            eventually(self._scraped, "Prometheus has scraped itself", within_s=60.0)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the result of a query, without a proxy."""
        answer = httpx.get(
            f"{self.url}/api/v1/query", params={"query": expression}, trust_env=False
        )
        answer.raise_for_status()
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return result

    def _scraped(self) -> bool:
        assert self._process.poll() is None, (self._directory / "prometheus.log").read_text()
        if httpx.get(f"{self.url}/-/ready", trust_env=False).status_code != 200:
            return False
        return bool(self.query('up{job="itself"} == 1'))

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

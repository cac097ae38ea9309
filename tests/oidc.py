"""An OpenID Connect issuer of which others say that it is right: npm's ``oidc-provider``, which is certified.

It is installed once into the user's cache folder, by oidc_issuer/package-lock.json, whose hashes npm checks.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import ssl
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import pytest
import trustme

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

_SOURCES: Final = Path(__file__).with_name("oidc_issuer")
_REDIRECT: Final = "https://client.test/callback"
_OLDEST_NODE: Final = 18


def missing_node() -> str:
    """Return why there can be no issuer here, or nothing."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "needs node and npm, for which the certified issuer of tokens is written"
    version = subprocess.run(("node", "--version"), capture_output=True, text=True, check=True)
    found = re.match(r"v(\d+)\.", version.stdout)
    if found is None or int(found[1]) < _OLDEST_NODE:
        return f"needs Node.js {_OLDEST_NODE} or newer, this is {version.stdout.strip()}"
    return ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the issuer, so that no such test is in the fast ones by mistake."""
    for item in items:
        if "oidc_issuer" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.programs)


@pytest.fixture(scope="session")
def oidc_issuer(tmp_path_factory: pytest.TempPathFactory, kube_slot: int) -> Iterator[OidcIssuer]:
    """An issuer with a CA of its own; its accounts and clients are what a test's tokens need."""
    if reason := missing_node():
        pytest.skip(reason)
    issuer = OidcIssuer(tmp_path_factory.mktemp("oidc-issuer"), 20643 + kube_slot)
    try:
        issuer.start()
        yield issuer
    finally:
        issuer.close()


class OidcIssuer:
    """Issues ID tokens by the authorization code flow.

    Args:
      port: of 127.0.0.1, where it listens.
      host: an address in its URL and certificate, of which the same port leads there.

    Attributes:
      issuer: its URL.
      ca: in PEM, of whom its certificate is.
      ca_file: the same.
    """

    def __init__(self, directory: Path, port: int, *, host: str = "127.0.0.1") -> None:
        self._directory = directory
        self._port = port
        self._host = host
        self._log = directory / "issuer.log"
        self._process: subprocess.Popen[bytes] | None = None
        authority = trustme.CA()
        leaf = authority.issue_cert(host)
        self.ca = authority.cert_pem.bytes().decode()
        self.ca_file = directory / "ca.crt"
        self.ca_file.write_text(self.ca)
        leaf.private_key_pem.write_to_path(directory / "key.pem")
        leaf.cert_chain_pems[0].write_to_path(directory / "cert.pem")
        self.issuer = ""

    def start(self) -> None:
        """Start it.

        Raises:
          AssertionError: it does not start, or npm cannot install it.
        """
        script = installed()
        with self._log.open("ab") as log:
            # It ends with its stdin, so also when this process is killed.
            self._process = subprocess.Popen(
                (
                    "node",
                    script,
                    str(self._port),
                    self._directory / "key.pem",
                    self._directory / "cert.pem",
                    self._host,
                ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self.issuer = self._answer()["issuer"]

    def close(self) -> None:
        """End it."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()

    # -- tokens ------------------------------------------------------------------------------------

    def token(
        self,
        subject: str = "alice",
        *,
        audience: str = "kubernetes",
        algorithm: str = "RS256",
        lifetime_s: float = 3600,
        **claims: Any,
    ) -> str:
        """Return an ID token, which somebody gets who logs in.

        Args:
          audience: the client's id.
          algorithm: RS256, PS256, ES256, ES384 or EdDSA.
          lifetime_s: whole seconds, at least 1.
          claims: beside ``sub``: email, email_verified, groups, name, preferred_username, roles and realm_access.
        """
        self._do({"account": subject, "claims": claims, "lifetime": lifetime_s})
        self._do({"client": audience, "algorithm": algorithm})
        verifier = secrets.token_urlsafe(48)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest())
        question = {
            "client_id": audience,
            "response_type": "code",
            "scope": "openid",
            "redirect_uri": _REDIRECT,
            "login_hint": subject,
            "code_challenge": challenge.rstrip(b"=").decode(),
            "code_challenge_method": "S256",
        }
        with self.client() as browser:
            endpoints = browser.get("/.well-known/openid-configuration").raise_for_status().json()
            answer = browser.get(endpoints["authorization_endpoint"], params=question)
            place = _followed(browser, answer)
            parameters = httpx.URL(place).params
            assert "code" in parameters, place
            answer = browser.post(
                endpoints["token_endpoint"],
                data={
                    "grant_type": "authorization_code",
                    "client_id": audience,
                    "redirect_uri": _REDIRECT,
                    "code": parameters["code"],
                    "code_verifier": verifier,
                },
            )
        assert answer.is_success, answer.text
        token: str = answer.json()["id_token"]
        return token

    def client(self) -> httpx.Client:
        """Return a client that trusts it."""
        return httpx.Client(
            base_url=self.issuer,
            verify=ssl.create_default_context(cadata=self.ca),
            timeout=30.0,
            trust_env=False,
        )

    def rotate(self, *, keep_old: bool = True) -> None:
        """Sign with new keys from now on, and publish them; the old ones stay published, or not."""
        self._do({"rotate": True, "keep": keep_old})

    # -- faults ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def refusing(self) -> Generator[None]:
        """Refuse connections in the block."""
        self._do({"listen": False})
        try:
            yield
        finally:
            self._do({"listen": True})

    @contextlib.contextmanager
    def hanging(self) -> Generator[None]:
        """Accept connections and answer nothing in the block."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _do(self, command: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        assert self._answer() == {}

    def _answer(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the issuer has ended:\n{self._log.read_text(errors='replace')}"
        return json.loads(line)


def _followed(browser: httpx.Client, answer: httpx.Response) -> str:
    """Follow redirections to the log-in and back, and return where they go out of the issuer."""
    for _ in range(5):
        assert answer.is_redirect, f"{answer.request.url}: {answer.text}"
        place: str = answer.headers["location"]
        if place.startswith(_REDIRECT):
            return place
        answer = browser.get(place)
    raise AssertionError(f"redirected for ever, to {answer.request.url}")


def installed() -> Path:
    """Return the script, beside the packages that it needs.

    Raises:
      AssertionError: npm cannot install them.
    """
    key = hashlib.sha256()
    for name in ("package.json", "package-lock.json", "issuer.js"):
        key.update((_SOURCES / name).read_bytes())
    version = json.loads((_SOURCES / "package.json").read_text())["dependencies"]["oidc-provider"]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("CLUSTERPROXY_CACHE") or Path(home) / "clusterproxy")
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"oidc-provider-{version}-{key.hexdigest()[:16]}"
    with (cache / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            part = folder.with_name(f"{folder.name}.{os.getpid()}")
            try:
                shutil.copytree(_SOURCES, part, ignore=lambda *_: ["node_modules"])
                _install(part)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder / "issuer.js"


def _install(folder: Path) -> None:
    command = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"

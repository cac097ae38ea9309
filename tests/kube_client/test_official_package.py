"""Of the official package no more is loaded than is used; the rest is there when it is needed."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import trustme
from certificates import write_ca
from scripted_apiserver import answer, scripted_apiserver, write_kubeconfig
from test_kube_session import FOUND, ask, server_context

if TYPE_CHECKING:
    from pathlib import Path

# What the whole package needs.
REST = "dateutil, kubernetes, pydantic, requests, requests_oauthlib, websocket"


def run(code: str, **environment: str) -> str:
    """Run a program in a process of its own, and return what it prints."""
    done = subprocess.run(
        (sys.executable, "-c", f"import sys\n{code}"),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_rest_is_not_loaded() -> None:
    loaded = f"print(*{{*{REST.split(', ')}}} & sys.modules.keys())"
    assert run(f"import clusterproxy.kube.session; {loaded}") == ""


def test_who_imports_the_package_gets_all_of_it() -> None:
    code = (
        "from clusterproxy.kube import official\n"
        "import kubernetes\n"
        "from kubernetes.config import kube_config\n"
        "print(kubernetes.client.ApiClient.__name__, callable(kubernetes.stream.stream))\n"
        "print(kubernetes.config.kube_config is kube_config, kube_config is not official.kube_config)"
    )
    assert run(code).split() == ["ApiClient", "True", "True", "True"]


def test_who_has_imported_it_before_keeps_it() -> None:
    code = (
        "import kubernetes\n"
        "from clusterproxy.kube import official\n"
        "print(kubernetes.config.kube_config is official.kube_config)\n"
        "print(sys.modules['kubernetes'] is kubernetes)"
    )
    assert run(code).split() == ["True", "True"]


def test_a_release_that_is_put_together_otherwise(tmp_path: Path) -> None:
    """Here a module needs what the package has in its own file."""
    package = tmp_path / "kubernetes"
    texts = {
        "__init__.py": "extra = 1",
        "client/__init__.py": "",
        "client/configuration.py": "class Configuration: pass",
        "client/rest.py": "class RESTClientObject: pass",
        "config/__init__.py": "",
        "config/incluster_config.py": "",
        "config/kube_config.py": "from kubernetes import extra",
    }
    for name, text in texts.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code = "from clusterproxy.kube import official; print(official.kube_config.extra, *sys.modules['kubernetes'].__path__)"
    assert run(code, PYTHONPATH=str(tmp_path)).split() == ["1", str(package)]


async def test_an_id_token_that_has_expired_is_renewed(tmp_path: Path) -> None:
    authority = trustme.CA()
    context = server_context(authority, tmp_path, "127.0.0.1")
    ca = write_ca(authority, tmp_path)
    claims = base64.urlsafe_b64encode(json.dumps({"exp": 1_000_000}).encode()).decode().strip("=")
    async with scripted_apiserver(context=context) as server:
        url = f"https://127.0.0.1:{server.port}"
        server.scripts.extend(
            [
                answer(200, {"token_endpoint": f"{url}/token"}),
                answer(200, {"access_token": "a", "token_type": "bearer", "id_token": "new", "refresh_token": "r"}),
                FOUND,
            ]
        )  # fmt: skip
        provider = {
            "client-id": "me",
            "client-secret": "s",
            "id-token": f"x.{claims}.x",
            "refresh-token": "r",
            "idp-issuer-url": url,
            "idp-certificate-authority": ca,
        }
        config = write_kubeconfig(
            tmp_path / "kubeconfig",
            url,
            user={"auth-provider": {"name": "oidc", "config": provider}},
            cluster={"certificate-authority": ca},
        )
        assert await ask(server, config) == "Bearer new"
    assert [asked.target for asked in server.asked[:2]] == [
        "/.well-known/openid-configuration",
        "/token",
    ]

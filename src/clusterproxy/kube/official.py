"""What is used of the official ``kubernetes`` package: the one module that imports it.

``import kubernetes`` loads clients for streams, watches and OIDC with pydantic and requests below them, which nothing here
uses: 15 MiB and a tenth of a second for every program. So the modules that are used are loaded without it, and are
copies of this module's own: whoever imports the package afterwards gets all of it.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from collections.abc import Generator
    from importlib.machinery import ModuleSpec

_PACKAGE: Final = "kubernetes"
_OAUTH: Final = "requests_oauthlib"


class _Later:
    """A class whose module is loaded when it is called. Only an ID token in a kubeconfig that has expired needs them."""

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name

    def __call__(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401  as the class
        return getattr(importlib.import_module(self._module), self._name)(*args, **options)


@contextmanager
def _without_the_rest() -> Generator[None]:
    """Let modules of the package be imported in the block, and nothing that they do not need."""
    before = dict(sys.modules)
    if _PACKAGE in before:
        yield
        return
    try:
        # What these two have in their own files loads the rest.
        for package in (_PACKAGE, f"{_PACKAGE}.config"):
            sys.modules[package] = module_from_spec(cast("ModuleSpec", find_spec(package)))
        client: Any = importlib.import_module(f"{_PACKAGE}.client")
        client.ApiClient = _Later(f"{_PACKAGE}.client.api_client", "ApiClient")
        oauth: Any = ModuleType(_OAUTH)
        oauth.OAuth2Session = _Later(_OAUTH, "OAuth2Session")
        sys.modules.setdefault(_OAUTH, oauth)
        yield
    finally:
        for name in [*sys.modules]:
            if name not in before and name.partition(".")[0] in (_PACKAGE, _OAUTH):
                del sys.modules[name]


try:
    with _without_the_rest():
        from kubernetes.client.configuration import Configuration as Configuration
        from kubernetes.client.rest import RESTClientObject as RESTClientObject
        from kubernetes.config import incluster_config as incluster_config
        from kubernetes.config import kube_config as kube_config
except (ImportError, AttributeError):
    # It is not there, which is told now, or a release that is put together otherwise.
    from kubernetes.client.configuration import Configuration as Configuration
    from kubernetes.client.rest import RESTClientObject as RESTClientObject
    from kubernetes.config import incluster_config as incluster_config
    from kubernetes.config import kube_config as kube_config

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import pytest

from clusterproxy.addon.ca_delivery import all_have
from clusterproxy.addon.certificates import new_authority

if TYPE_CHECKING:
    from clusterproxy.addon.fleet import Fleet

NOW = datetime(2026, 11, 26, 6, 0, 0, tzinfo=UTC)

Object = dict[str, Any]


@pytest.fixture(scope="module")
def authorities() -> tuple[bytes, bytes]:
    return new_authority(NOW).crt, new_authority(NOW, distinct=True).crt


def work(crt: bytes, *, applied: str = "True", observed: int = 2, number: int = 0) -> Object:
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "cluster-proxy-ca"},
        "data": {"ca.crt": base64.b64encode(crt).decode()},
    }
    condition = {"type": "Applied", "status": applied, "observedGeneration": observed}
    return {
        "metadata": {
            "name": f"addon-cluster-proxy-deploy-{number}",
            "labels": {"open-cluster-management.io/addon-name": "cluster-proxy"},
            "generation": 2,
        },
        "spec": {"workload": {"manifests": [secret]}},
        "status": {"conditions": [condition]},
    }


class Clusters:
    """Those of a :class:`Fleet` that were read."""

    def __init__(self, **works: list[Object]) -> None:
        self._works = works
        self.addons = self
        self.items: dict[tuple[str, str], Object] = {
            (cluster, "cluster-proxy"): {"metadata": {"namespace": cluster}} for cluster in works
        }

    def works_of(self, cluster: str) -> list[Object]:
        return self._works[cluster]

    def have(self, bundle: bytes) -> bool:
        return all_have(cast("Fleet", self), bundle)


def test_all_have_what_all_have_taken(authorities: tuple[bytes, bytes]) -> None:
    old, new = authorities
    assert Clusters().have(new)
    assert Clusters(a=[work(old + new)], b=[work(new + old)], c=[]).have(old + new)
    # With the authority of an HTTPS proxy
    assert Clusters(a=[work(old + new)]).have(old)


def test_one_that_lacks_something_is_waited_for(authorities: tuple[bytes, bytes]) -> None:
    old, new = authorities
    good = work(old + new)
    for bad in (
        work(old),
        work(old + new, applied="False"),
        work(old + new, observed=1),
        work(b"broken"),
        good | {"status": Object()},
    ):
        assert not Clusters(a=[good], b=[bad]).have(old + new)
    assert not Clusters(a=[good]).have(b"broken")


def test_an_addon_that_is_deleted_is_not_waited_for(authorities: tuple[bytes, bytes]) -> None:
    old, new = authorities
    clusters = Clusters(a=[work(old)])
    clusters.items["a", "cluster-proxy"]["metadata"]["deletionTimestamp"] = "2026-11-26T06:00:00Z"
    assert clusters.have(new)

"""What on the hub is waited for, as its objects say it; the rest is tried on a real apiserver."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import pytest

from clusterproxy.addon.ca_progress import CAProgress
from clusterproxy.addon.ca_rotation import State
from clusterproxy.addon.certificates import (
    Authority,
    Leaf,
    Usage,
    issue,
    new_authority,
    new_key,
)
from clusterproxy.addon.signer import Signer
from clusterproxy.kube.api import Listing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.events import EventRecorder
    from clusterproxy.kube.resource import Resource

NOW = datetime(2026, 11, 26, 6, 0, 0, tzinfo=UTC)
DAY = timedelta(days=1)

Object = dict[str, Any]


def secret(name: str, data: Mapping[str, bytes]) -> Object:
    encoded = {key: base64.b64encode(each).decode() for key, each in data.items()}
    return {"metadata": {"name": name}, "data": encoded}


class Hub:
    """The secrets of a hub in whose one namespace a configuration has all that it has."""

    def __init__(self, state: State, leaf_of: Authority) -> None:
        leaf = Leaf(name="proxy-server", hosts=("localhost",), usage=Usage.SERVER)
        crt, key = issue(leaf_of, leaf, NOW)
        data, _ = state.write()
        self.secrets = [
            secret("cluster-proxy-signer", data),
            secret("proxy-server-ca", {"ca.crt": state.bundle()}),
            secret("proxy-server", {"tls.crt": crt, "tls.key": key}),
        ]

    async def get(self, _resource: Resource, name: str, _namespace: str) -> Object:
        [found] = [each for each in self.secrets if each["metadata"]["name"] == name]
        return found

    async def list(self, resource: Resource, _namespace: str | None = None) -> Listing:
        configuration = {"spec": {"proxyServer": {"namespace": "n"}}}
        return Listing([configuration] if resource.kind != "Secret" else self.secrets, "1")

    async def lagging(self) -> tuple[str, ...]:
        api = cast("KubeApi", self)
        signer = Signer(api, "n", "cluster-proxy-signer")
        progress = CAProgress(api, signer, cast("EventRecorder", None), lambda _state: {})
        seen = await progress.look(NOW)
        assert seen is not None
        return seen.lagging


async def test_certificates_of_what_was_replaced_are_waited_for() -> None:
    old, new = new_authority(NOW), new_authority(NOW, distinct=True)
    retire = State(authority=new, previous=old.certificates)
    assert await Hub(retire, old).lagging() == ("Secret n/proxy-server",)
    assert await Hub(retire, new).lagging() == ()


@pytest.mark.parametrize("issuer", ["authority", "previous"])
async def test_an_authority_that_was_renewed_with_its_key_is_not_waited_for(issuer: str) -> None:
    key = new_key()
    old = new_authority(NOW - 300 * DAY, private_key=key)
    retire = State(authority=new_authority(NOW, private_key=key), previous=old.certificates)
    # Both have the name and the key of all that either has ever issued.
    lagging = await Hub(retire, retire.authority if issuer == "authority" else old).lagging()
    assert lagging == ()

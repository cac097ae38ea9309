from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from clusterproxy.addon.addon_configs import AddonConfigs
from clusterproxy.addon.chart_values import UnrenderableError
from clusterproxy.addon.registration import AddonVersion
from clusterproxy.addon.spec_hash import ConfigKey, spec_hash
from clusterproxy.kube.api import Change, WatchEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from clusterproxy.addon.fleet import Fleet
    from clusterproxy.kube.api import KubeApi

Object = dict[str, Any]

GROUP = "addon.open-cluster-management.io"


def key(name: str) -> ConfigKey:
    return ConfigKey(GROUP, "addondeploymentconfigs", "ns", name)


def config(replicas: str) -> Object:
    return {"spec": {"customizedVariables": [{"name": "replicas", "value": replicas}]}}


class Clusters:
    """A :class:`Fleet` with these configurations."""

    def __init__(self, **configs: Object) -> None:
        self.there = {key(name): each for name, each in configs.items()}
        self.addons = self
        self.handlers: list[Callable[[WatchEvent], object]] = []
        self.known = AddonConfigs(cast("KubeApi", None), cast("Fleet", self), AddonVersion.V1BETA1)

    def subscribe(self, handler: Callable[[WatchEvent], object]) -> None:
        self.handlers.append(handler)

    def configs(self, keys: Iterable[ConfigKey]) -> dict[ConfigKey, Object]:
        return {each: self.there[each] for each in keys if each in self.there}

    def put(self, addon: Object, change: Change = Change.MODIFIED) -> None:
        for handler in self.handlers:
            handler(WatchEvent(change, addon))


def addon(cluster: str, **hashes: str) -> Object:
    return {
        "metadata": {"name": "cluster-proxy", "namespace": cluster},
        "status": {
            "configReferences": [
                {
                    "group": GROUP,
                    "resource": "addondeploymentconfigs",
                    "desiredConfig": {"namespace": "ns", "name": name, "specHash": value},
                }
                for name, value in hashes.items()
            ]
        },
    }


def test_of_several_the_first_counts() -> None:
    one, two = config("1"), config("2")
    clusters = Clusters(one=one, two=two)
    hashes = {"one": spec_hash(one), "two": spec_hash(two)}
    for names, wanted in ((("one", "two"), one), (("two", "one"), two)):
        found = clusters.known.of(addon("c", **{name: hashes[name] for name in names}))
        assert (found.usable(), found.awaited) == (wanted, False)


def test_one_that_the_cluster_is_not_to_have_yet() -> None:
    clusters = Clusters(one=config("1"))
    for there in ("", spec_hash(config("0"))):
        assert clusters.known.of(addon("c", one=there)).awaited


def test_one_that_is_not_there() -> None:
    found = Clusters().known.of(addon("c", one="h"))
    assert not found.awaited
    with pytest.raises(UnrenderableError, match=r"^AddOnDeploymentConfig ns/one not found$"):
        found.usable()
    assert Clusters().known.of(addon("c")).usable() is None


def test_who_refers_to_what() -> None:
    clusters = Clusters()
    clusters.put(addon("a", one="h", two="h"), Change.ADDED)
    clusters.put(addon("b", two="h"), Change.ADDED)
    assert clusters.known.users(key("one")) == ["a"]
    assert clusters.known.users(key("two")) == ["a", "b"]
    clusters.put(addon("a", one="h"))
    clusters.put(addon("b", two="h"), Change.DELETED)
    assert clusters.known.users(key("one")) == ["a"]
    assert clusters.known.users(key("two")) == []

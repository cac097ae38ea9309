from __future__ import annotations

from clusterproxy.addon.cluster_profiles import access_provider, with_provider

ENTRY = access_provider("one", "here", "Y2VydA==")


def test_the_entry() -> None:
    assert ENTRY == {
        "name": "open-cluster-management",
        "cluster": {
            "server": "https://cluster-proxy-addon-user.here:9092/one",
            "certificate-authority-data": "Y2VydA==",
            "extensions": [
                {"name": "client.authentication.k8s.io/exec", "extension": {"clusterName": "one"}}
            ],
        },
    }


def test_others_stay_as_and_where_they_are() -> None:
    other = {"name": "other", "cluster": {}}
    stale = access_provider("one", "there", "")
    assert with_provider([], ENTRY) == [ENTRY]
    assert with_provider([other], ENTRY) == [other, ENTRY]
    assert with_provider([other, stale, "rubbish"], ENTRY) == [other, ENTRY, "rubbish"]
    assert with_provider([ENTRY, other], ENTRY) is None

from __future__ import annotations

from typing import Any

import pytest

from clusterproxy.addon.config import (
    BindAddress,
    ControllersConfig,
    ManagerConfig,
    parse_bind_address,
    parse_feature_gates,
)
from clusterproxy.cli.addon_manager import manager_flags
from clusterproxy.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":8080", BindAddress("", 8080)),
        ("127.0.0.1:1", BindAddress("127.0.0.1", 1)),
        ("[::1]:65535", BindAddress("::1", 65535)),
        ("0", BindAddress("", 0)),
        ("", BindAddress("", 0)),
    ],
)
def test_addresses(text: str, expected: BindAddress) -> None:
    assert parse_bind_address("x", text) == expected


@pytest.mark.parametrize("text", ["8080", "host", "host:", ":0", ":65536", ":-1", "h:1x"])
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--metrics-bind-address") as error:
        parse_bind_address("metrics-bind-address", text)
    assert error.value.field == "metrics-bind-address"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("ClusterProfile=true", True),
        (" ClusterProfile = True ,", True),
        ("ClusterProfile=false", False),
        ("AllAlpha=true", True),
        ("AllAlpha=true,ClusterProfile=false", False),
        ("ClusterProfile=true,AllAlpha=false", True),
        ("AllBeta=true", False),
    ],
)
def test_feature_gates(text: str, expected: bool) -> None:
    assert parse_feature_gates(text) == {"ClusterProfile": expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ClusterProfile", "missing bool value for ClusterProfile"),
        ("ClusterProfile=yes", "must be a bool"),
        ("Other=true", "unrecognized feature gate: Other"),
    ],
)
def test_mistakes_in_feature_gates(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_feature_gates(text)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"pod_namespace": ""}, "POD_NAMESPACE"),
        ({"image_pull_policy": "Sometimes"}, "image-pull-policy"),
        ({"signer_secret_name": ""}, "signer-secret-name"),
        ({"signer_secret_namespace": ""}, "signer-secret-namespace"),
        ({"agent_install_namespace": ""}, "agent-install-namespace"),
        ({"metrics_bind_address": "x"}, "metrics-bind-address"),
        ({"health_probe_bind_address": "x"}, "health-probe-bind-address"),
        ({"health_probe_bind_address": ":58080"}, "health-probe-bind-address"),
        ({"feature_gates": "x"}, "feature-gates"),
        ({"kube_api_qps": float("nan")}, "kube-api-qps"),
    ],
)
def test_what_is_wrong_with_a_manager_is_named(change: dict[str, Any], field: str) -> None:
    good: dict[str, Any] = {"pod_namespace": "here"}
    ManagerConfig(**good).validate()
    with pytest.raises(ConfigError) as error:
        ManagerConfig(**good | change).validate()
    assert error.value.field == field


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"certificates_namespace": ""}, "certificates-namespace"),
        ({"signer_secret_name": ""}, "signer-secret-name"),
        ({"signer_secret_namespace": ""}, "signer-secret-namespace"),
        ({"health_probe_addr": ":8080"}, "health-probe-addr"),
        ({"metrics_addr": "8080"}, "metrics-addr"),
    ],
)
def test_what_is_wrong_with_controllers_is_named(change: dict[str, Any], field: str) -> None:
    ControllersConfig().validate()
    with pytest.raises(ConfigError) as error:
        ControllersConfig(**change).validate()
    assert error.value.field == field


@pytest.mark.parametrize(
    ("args", "leads"),
    [
        (["--leader-elect=true"], True),
        (["-leader-elect=true"], True),
        (["-leader-elect"], True),
        (["-leader_elect=false"], False),
        (["-signer-secret-name", "x", "-leader-elect=1"], True),
        (["-v=4", "-leader-elect"], True),
    ],
)
def test_one_dash_is_as_good_as_two(args: list[str], leads: bool) -> None:
    assert manager_flags().parse(args).values["leader-elect"] is leads


@pytest.mark.parametrize("args", [["-unknown"], ["-unknown=1"], ["---x"], ["-=x"]])
def test_unknown_flags_are_refused_with_one_dash_too(args: list[str]) -> None:
    with pytest.raises(ConfigError):
        manager_flags().parse(args)

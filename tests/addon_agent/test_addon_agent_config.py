"""The add-on agent's configuration and command line."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from clusterproxy.addon_agent.config import AddonAgentConfig
from clusterproxy.cli.addon_agent import addon_agent_flags, main
from clusterproxy.errors import ConfigError


def test_flags_of_the_original_in_its_ways() -> None:
    flags = addon_agent_flags()
    parsed = flags.parse(
        (
            "--v=2",
            "-hub-kubeconfig",
            "/etc/kubeconfig/kubeconfig",
            "--cluster-name=c",
            "-enable-port-forward-proxy",
            "--enable-proxy-agent-health-check=false",
            "--logtostderr=true",
        )
    )
    config = AddonAgentConfig(**parsed.fields(flags), pod_namespace="here")
    config.validate()
    assert config.hub_kubeconfig == "/etc/kubeconfig/kubeconfig"
    assert config.cluster_name == "c"
    assert config.proxy_server_namespace == "open-cluster-management-addon"
    assert config.enable_port_forward_proxy
    assert not config.enable_proxy_agent_health_check
    assert config.verbosity == 2


def test_addresses() -> None:
    config = AddonAgentConfig(pod_namespace="here")
    assert config.health_address == ("", 8888)
    assert config.proxy_agent_address == ("localhost", 8093)
    config = AddonAgentConfig(
        pod_namespace="here",
        health_probe_bind_address="[::1]:1",
        proxy_agent_health_address=":8193",
    )
    config.validate()
    assert config.health_address == ("::1", 1)
    assert config.proxy_agent_address == ("localhost", 8193)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pod_namespace": ""}, "POD_NAMESPACE must be set in the environment"),
        ({"port_forward_port": 0}, "--port-forward-port must be between 1 and 65535, got 0"),
        ({"port_forward_port": 65536}, "got 65536"),
        ({"proxy_server_port": -1}, "--proxy-server-port must be between 1 and 65535, got -1"),
        ({"lease_interval_s": 0}, "--lease-interval must be greater than 0"),
        ({"health_probe_bind_address": "8888"}, '"8888" is not HOST:PORT or :PORT'),
        ({"health_probe_bind_address": ":70000"}, "--health-probe-bind-address"),
        ({"proxy_agent_health_address": "a:0"}, "--proxy-agent-health-address"),
        (
            {"proxy_server_namespace": "", "enable_port_forward_proxy": True},
            "--proxy-server-namespace must not be empty",
        ),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], message: str) -> None:
    config = AddonAgentConfig(**{"pod_namespace": "here", **wrong})
    with pytest.raises(ConfigError) as found:
        config.validate()
    assert message in found.value.message


def test_a_missing_namespace_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("POD_NAMESPACE", raising=False)
    assert main([]) == 1
    assert "POD_NAMESPACE must be set" in capsys.readouterr().err


def test_the_health_port_waits_for_no_kubernetes() -> None:
    code = (
        "import clusterproxy.cli.addon_agent, clusterproxy.addon_agent.app, sys; "
        "assert not {'kubernetes', 'wsproto', 'prometheus_client', 'urllib3', 'yaml', 'rich'} & sys.modules.keys()"
    )
    subprocess.run((sys.executable, "-c", code), check=True, timeout=60)

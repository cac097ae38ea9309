"""The command line of the user server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest

from clusterproxy.cli import user_server
from clusterproxy.cli.user_server import user_server_flags
from clusterproxy.errors import ConfigError
from clusterproxy.user_server.config import UserServerConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

# As the chart has them, and upstream's.
ARGUMENTS = (
    "--host=proxy-entrypoint.ns.svc",
    "--port=8090",
    "--proxy-ca-cert=/proxy-ca/ca.crt",
    "--proxy-cert=/proxy-client-tls/tls.crt",
    "--proxy-key=/proxy-client-tls/tls.key",
    "--server-port=9092",
    "--server-key=/user-tls/tls.key",
    "--server-cert=/user-tls/tls.crt",
    "--service-proxy-ca-cert=/proxy-ca/ca.crt",
    "--agent-install-namespace=spoke",
    "--exposed-services-configmap=exposed",
)


def config(*more: str, namespace: str = "ns") -> UserServerConfig:
    flags = user_server_flags()
    parsed = flags.parse([*ARGUMENTS, *more])
    return UserServerConfig(**parsed.fields(flags), pod_namespace=namespace)


def test_the_arguments_of_the_chart() -> None:
    made = config()
    made.validate()
    assert made.denies
    assert (made.drain_timeout_s, made.min_drain_duration_s) == (30, 10)
    assert made.health_port == 8000
    assert made.exposed_services_configmap == "exposed"
    assert not config("--exposed-services-mode=warn").denies
    config("--drain-timeout=0s", "--min-drain-duration=0s").validate()
    config("--drain-timeout=10s", "--min-drain-duration=10s").validate()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        # As upstream's Validate, in its order.
        (["--drain-timeout=-1s", "--server-cert="], "drain-timeout must not be negative, got -1s"),
        (["--min-drain-duration=-1s"], "min-drain-duration must not be negative"),
        (["--drain-timeout=9s"], "min-drain-duration must not exceed drain-timeout"),
        (["--server-cert=", "--server-key="], "the server-cert is required"),
        (["--server-key=", "--server-port=0"], "the server-key is required"),
        (["--server-port=0"], "the server-port is required"),
        (["--service-proxy-ca-cert="], "the service-proxy-ca-cert is required"),
        (["--host="], "the host is required"),
        (["--port=0"], "the port is required"),
        (["--proxy-ca-cert="], "the proxy-ca-cert is required"),
        (["--exposed-services-configmap="], "the exposed-services-configmap is required"),
        (["--proxy-key="], "only of use together"),
        (["--proxy-cert="], "only of use together"),
        (["--server-port=65536"], "--server-port: 65536 is no port"),
        (["--port=-1"], "--port: -1 is no port"),
        (["--health-port=0"], "--health-port: 0 is no port"),
        (["--health-port=9092"], "--health-port and --server-port are the same"),
        (["--exposed-services-mode=on"], '"on" is neither enforce nor warn'),
    ],
)
def test_mistakes(more: Sequence[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*more).validate()
    assert text in caught.value.message


def test_the_namespace_is_needed() -> None:
    with pytest.raises(ConfigError, match="pod namespace is empty, please set the POD_NAMESPACE"):
        config(namespace="").validate()


def test_no_certificate_at_all_may_do() -> None:
    attrs.evolve(config(), proxy_cert="", proxy_key="").validate()


def test_the_program_says_what_is_wrong(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("POD_NAMESPACE", "ns")
    assert user_server.main([*ARGUMENTS, "--server-cert="]) == 1
    error = capsys.readouterr().err
    assert error.endswith(
        "error: failed to validate user server options with the server-cert is required\n"
    )
    assert "--server-cert string" in error
    # Without a cluster there is no way to the apiserver.
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert user_server.main([*ARGUMENTS, "--kubeconfig=/none/such"]) == 1
    assert "/none/such" in capsys.readouterr().err

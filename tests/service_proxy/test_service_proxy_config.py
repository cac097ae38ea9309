"""Row H14, and the rest of the command line."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from clusterproxy.cli import program as cli_program
from clusterproxy.cli.service_proxy import main, service_proxy_flags
from clusterproxy.errors import ConfigError
from clusterproxy.service_proxy import program as service_program
from clusterproxy.service_proxy.config import ServiceProxyConfig

GOOD = ServiceProxyConfig(
    cert="c", key="k", hub_kubeconfig="h", pod_namespace="ns", oidc_issuer_url="", oidc_client_id=""
)
OIDC = attrs.evolve(GOOD, oidc_issuer_url="https://i.example", oidc_client_id="c")
TOGETHER = "--oidc-issuer-url and --oidc-client-id must be specified together"


def parsed(*args: str) -> ServiceProxyConfig:
    flags = service_proxy_flags()
    return ServiceProxyConfig(**flags.parse(args).fields(flags))


def test_what_the_chart_passes() -> None:
    config = parsed(
        "--additional-service-ca=/additional-service-ca/service-ca.crt",
        "--enable-impersonation=true",
        "--cert=/server-cert/tls.crt",
        "--key=/server-cert/tls.key",
        "--hub-kubeconfig=/etc/kubeconfig/kubeconfig",
        "--oidc-issuer-url=https://i.example",
        "--oidc-client-id=c",
        "--oidc-username-claim=email",
        "--oidc-username-prefix=oidc:",
        "--oidc-groups-claim=groups",
        "--oidc-groups-prefix=oidc:",
        "--oidc-reserved-name-prefixes=system:,dev:",
        "--oidc-signing-algs=RS256,ES256",
        "--oidc-required-claim=hd=a=b",
        "--oidc-required-claim= t = x ",
        "--oidc-ca-configmap=oidc-ca",
    )
    attrs.evolve(config, pod_namespace="ns").validate()
    oidc = config.oidc
    assert oidc is not None
    assert oidc.reserved_name_prefixes == ("system:", "dev:")
    assert oidc.signing_algs == ("RS256", "ES256")
    assert oidc.required_claims == (("hd", "a=b"), ("t", "x"))
    assert (oidc.username_claim, oidc.groups_prefix) == ("email", "oidc:")
    assert config.token_file == "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105
    assert config.root_ca == "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"


def test_no_reserved_prefixes() -> None:
    assert parsed("--oidc-reserved-name-prefixes=").oidc_reserved_name_prefixes == ()


def test_the_last_word_about_a_claim() -> None:
    config = attrs.evolve(OIDC, oidc_required_claim=(("a", "1"), ("b", "2"), ("a", "3")))
    assert config.oidc is not None
    assert config.oidc.required_claims == (("a", "3"), ("b", "2"))


def test_a_claim_without_a_value() -> None:
    with pytest.raises(ConfigError, match="malformed pair, expect string=string"):
        parsed("--oidc-required-claim=hd")


@pytest.mark.parametrize("config", [GOOD, OIDC])
def test_good(config: ServiceProxyConfig) -> None:
    config.validate()
    attrs.evolve(config, enable_impersonation=False, hub_kubeconfig="").validate()
    attrs.evolve(config, drain_timeout_s=0.0, min_drain_duration_s=0.0).validate()
    attrs.evolve(config, max_idle_conns=0, idle_conn_timeout_s=0.0, kube_api_qps=-1.0).validate()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"drain_timeout_s": -1.0, "cert": ""}, "drain-timeout must not be negative"),
        ({"min_drain_duration_s": -1.0}, "min-drain-duration must not be negative"),
        ({"min_drain_duration_s": 31.0}, "min-drain-duration must not exceed drain-timeout"),
        ({"cert": "", "key": ""}, "cert is required"),
        ({"key": "", "oidc_client_id": "x"}, "key is required"),
        ({"oidc_client_id": "x", "pod_namespace": ""}, TOGETHER),
        ({"oidc_issuer_url": "https://i.example"}, TOGETHER),
        ({"oidc_groups_claim": "g"}, "--oidc-groups-claim is of no use without --oidc-issuer-url"),
        ({"oidc_username_claim": "email"}, "--oidc-username-claim is of no use without"),
        ({"oidc_signing_algs": ("ES256",)}, "--oidc-signing-algs is of no use without"),
        ({"oidc_reserved_name_prefixes": ()}, "--oidc-reserved-name-prefixes is of no use without"),
        ({"oidc_required_claim": (("a", "b"),)}, "--oidc-required-claim is of no use without"),
        ({"oidc_ca_configmap": "x"}, "--oidc-ca-configmap is of no use without"),
        ({"pod_namespace": ""}, "please set the POD_NAMESPACE environment variable"),
        ({"hub_kubeconfig": ""}, "--hub-kubeconfig is required with --enable-impersonation"),
        ({"max_idle_conns": -1}, "--max-idle-conns must not be negative, got -1"),
        ({"idle_conn_timeout_s": -1.5}, "--idle-conn-timeout must not be negative, got -1.5s"),
        ({"tls_handshake_timeout_s": -1.0}, "--tls-handshake-timeout must not be negative"),
        ({"expect_continue_timeout_s": -1.0}, "--expect-continue-timeout must not be negative"),
        ({"kube_api_qps": float("nan")}, "--kube-api-qps must be a number, got nan"),
        ({"kube_api_qps": float("inf")}, "--kube-api-qps must be a number, got inf"),
        ({"port": 0}, "--port: 0 is no port"),
        ({"health_port": 65536}, "--health-port: 65536 is no port"),
        ({"health_port": 7443}, "--health-port and --port are the same"),
        ({"kube_api_address": "x"}, '--kube-api-address: "x" is not HOST:PORT'),
        ({"kube_api_address": ":443"}, "is not HOST:PORT"),
        ({"kube_api_address": "x:0"}, "is not HOST:PORT"),
        ({"kube_api_address": "x:https"}, "is not HOST:PORT"),
        ({"hub_group_mapping": (("", "x"),)}, '--hub-group-mapping: "" is no group'),
        ({"hub_group_mapping": (("a*b", "x"),)}, "has a * before its end"),
        ({"hub_group_mapping": (("a", "x*"),)}, 'has no * for that of "x*"'),
    ],
)  # fmt: skip
def test_mistakes(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        attrs.evolve(GOOD, **change).validate()
    assert text in caught.value.message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"oidc_issuer_url": "http://i.example"}, "URL scheme must be https"),
        ({"oidc_client_id": ""}, TOGETHER),
        ({"oidc_reserved_name_prefixes": ("",)}, "must not contain an empty prefix"),
        ({"oidc_signing_algs": ("HS256",)}, 'unsupported OIDC signing algorithm "HS256"'),
    ],
)
def test_mistakes_about_oidc(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        attrs.evolve(OIDC, **change).validate()
    assert text in caught.value.message


def test_where_the_apiserver_is() -> None:
    assert GOOD.apiserver is None
    assert parsed("--kube-api-address=10.0.0.1:6443").apiserver == ("10.0.0.1", 6443)
    assert parsed("--kube-api-address=[::1]:6443").apiserver == ("::1", 6443)


def test_groups_of_the_hub() -> None:
    config = parsed("--hub-group-mapping=system:masters=", "--hub-group-mapping", "*=hub:*")
    assert config.groups.groups(["system:masters", "a"]) == ("hub:a",)


def test_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--oidc-required-claim mapStringString" in shown
    assert "--token-review-cache-ttl duration" in shown


def test_a_mistake_ends_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POD_NAMESPACE", "ns")
    assert main(["--cert=x", "--key=y", "--oidc-client-id=z"]) == 1
    assert capsys.readouterr().err.endswith(f"with {TOGETHER}\n")


def test_what_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is found, and gets what the flags say; it runs in tests/kube."""
    ran: list[ServiceProxyConfig] = []

    async def run(config: ServiceProxyConfig) -> int:
        ran.append(config)
        return 0

    def run_at_once(main: Any, config: ServiceProxyConfig) -> int:
        with pytest.raises(StopIteration) as ended:
            main(config).send(None)
        return int(ended.value.value)

    monkeypatch.setattr(service_program, "run_service_proxy", run)
    monkeypatch.setattr(cli_program, "_run", run_at_once)
    monkeypatch.setenv("POD_NAMESPACE", "ns")
    assert main(["--cert=x", "--key=y", "--hub-kubeconfig=z"]) == 0
    assert (ran[0].pod_namespace, ran[0].hub_kubeconfig) == ("ns", "z")
    assert ran[0].given == {"cert", "key", "hub-kubeconfig"}

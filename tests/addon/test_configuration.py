from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from cryptography import x509
from golden_objects import (
    FULL,
    HOSTNAME,
    PORT_FORWARD,
    configuration_object,
    golden_configuration,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterproxy.addon.configuration import (
    Entrypoint,
    EntrypointType,
    InvalidConfiguration,
    Ports,
    ProxyAgent,
    ProxyConfiguration,
    ProxyServer,
    SecretNames,
    SignerType,
    is_host,
    parse_configuration,
)
from clusterproxy.addon.hub_objects import hub_objects, load_balancer, wanted_leaves


def problems_of(obj: dict[str, Any], **options: str) -> list[str]:
    with pytest.raises(InvalidConfiguration) as caught:
        parse_configuration(obj, **options)
    assert all(str(problem) in str(caught.value) for problem in caught.value.problems)
    return [str(problem) for problem in caught.value.problems]


def test_the_smallest_configuration_has_the_crds_defaults() -> None:
    assert parse_configuration(configuration_object()) == ProxyConfiguration(
        name="cluster-proxy",
        uid="u-1",
        generation=3,
        signer_type=SignerType.SELF_SIGNED,
        additional_sans=(),
        secrets=SecretNames(
            proxy_server="proxy-server", proxy_client="proxy-client", agent_server="agent-server"
        ),
        ports=Ports(proxy_server=8090, agent_server=8091, health_server=8092, admin_server=8095),
        proxy_server=ProxyServer(
            image="server:1",
            replicas=3,
            service_name="proxy-entrypoint",
            namespace="open-cluster-management-cluster-proxy",
            entrypoint=Entrypoint(
                type=EntrypointType.PORT_FORWARD,
                port=8091,
                load_balancer_name="proxy-agent-entrypoint",
            ),
        ),
        proxy_agent=ProxyAgent(image="agent:1", replicas=3),
        user_server_sans=None,
    )


def test_every_field_is_read() -> None:
    assert parse_configuration(FULL) == ProxyConfiguration(
        name="cluster-proxy",
        uid="u-1",
        generation=3,
        signer_type=SignerType.PROVIDED,
        additional_sans=("*.a.example", "10.1.2.3"),
        secrets=SecretNames(proxy_server="s1", proxy_client="s2", agent_server="s3"),
        ports=Ports(proxy_server=9090, agent_server=9091, health_server=9092, admin_server=9095),
        proxy_server=ProxyServer(
            image="server:1",
            replicas=2,
            service_name="entry",
            namespace="ns1",
            entrypoint=Entrypoint(
                type=EntrypointType.LOAD_BALANCER,
                hostname="hub.example",
                load_balancer_name="lb",
                load_balancer_annotations=(("a.example/b", "https://x/y?z"),),
                port=443,
            ),
            additional_args=("--v=4",),
            node_selector={"disk": "ssd"},
            tolerations=(
                {"key": "k", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5},
            ),
        ),
        proxy_agent=ProxyAgent(
            image="agent:1",
            replicas=1,
            additional_args=("--a",),
            image_pull_secrets=("p",),
            additional_service_proxy_args=("--b",),
            additional_service_ca_config_map="ca-map",
        ),
        user_server_sans=("u.example",),
    )


@pytest.mark.parametrize("situation", [HOSTNAME, PORT_FORWARD])
def test_the_originals_configurations_are_valid(situation: str) -> None:
    configuration = parse_configuration(golden_configuration(situation))
    assert configuration.proxy_server.namespace == "open-cluster-management-addon"
    assert (configuration.user_server_sans is None) == (situation == PORT_FORWARD)


def test_an_empty_value_is_as_none() -> None:
    configuration = parse_configuration(
        configuration_object(
            authentication={
                "signer": None,
                "dump": {"secrets": {"signingProxyServerSecretName": ""}},
            },
            proxyServer={"namespace": "", "entrypoint": {"type": "PortForward", "port": 0}},
            deploy=None,
            userServer={},
        )
    )
    assert configuration.secrets == SecretNames()
    assert configuration.proxy_server.namespace == "open-cluster-management-cluster-proxy"
    assert configuration.proxy_server.entrypoint.port == 8091
    assert configuration.user_server_sans == ()


SELF_SIGNED = "spec.authentication.signer.selfSigned"
SECRETS = "spec.authentication.dump.secrets"
ENTRYPOINT = "spec.proxyServer.entrypoint"


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"proxyServer": {"image": ""}}, "spec.proxyServer.image: is required and must not be empty"),
        ({"proxyAgent": {"image": None}}, "spec.proxyAgent.image: is required"),
        ({"proxyServer": {"image": 5}}, "spec.proxyServer.image: must be a string, not 5"),
        ({"proxyServer": {"replicas": -1}}, "spec.proxyServer.replicas: must be between 0 and"),
        ({"proxyServer": {"replicas": True}}, "spec.proxyServer.replicas: must be a whole number"),
        ({"proxyServer": {"replicas": 1.5}}, "spec.proxyServer.replicas: must be a whole number"),
        ({"proxyAgent": {"replicas": "3"}}, "spec.proxyAgent.replicas: must be a whole number"),
        ({"proxyServer": []}, "spec.proxyServer: must be an object, not []"),
        ({"proxyServer": {"namespace": "Ns"}}, "spec.proxyServer.namespace: 'Ns' is not a valid name"),
        (
            {"proxyServer": {"inClusterServiceName": "1a"}},
            "spec.proxyServer.inClusterServiceName: '1a' is not a valid name: use up to 63 lower case",
        ),
        (
            {"proxyServer": {"inClusterServiceName": "a" * 64}},
            "spec.proxyServer.inClusterServiceName: 'aaa",
        ),
        ({"proxyServer": {"additionalArgs": "--v=4"}}, "spec.proxyServer.additionalArgs: must be a list"),
        ({"proxyServer": {"additionalArgs": ["a", 1]}}, "spec.proxyServer.additionalArgs[1]: must be a string"),
        (
            {"proxyServer": {"nodePlacement": {"nodeSelector": {"a": True}}}},
            "spec.proxyServer.nodePlacement.nodeSelector['a']: must be a string, not True",
        ),
        (
            {"proxyServer": {"nodePlacement": {"tolerations": [{}, {"tolerationSeconds": "1"}]}}},
            "spec.proxyServer.nodePlacement.tolerations[1].tolerationSeconds: must be a whole number",
        ),
        ({"proxyServer": {"entrypoint": {"type": "NodePort"}}}, f"{ENTRYPOINT}.type: must be one of Hostname, "),
        (
            {"proxyServer": {"entrypoint": {"type": "Hostname"}}},
            f"{ENTRYPOINT}.hostname.value: is required and must not be empty",
        ),
        *(
            (
                {"proxyServer": {"entrypoint": {"type": "Hostname", "hostname": {"value": value}}}},
                f"{ENTRYPOINT}.hostname.value: '{value}' is neither a host name nor an IP address",
            )
            for value in ("https://a.example", "a.example:443", "[::1]", "fe80::1%eth0", "a..b", "10.0.0.256", "a b")
        ),
        ({"proxyServer": {"entrypoint": {"port": 65536}}}, f"{ENTRYPOINT}.port: must be between 0 and 65535"),
        (
            {
                "proxyServer": {
                    "entrypoint": {
                        "type": "LoadBalancerService",
                        "loadBalancerService": {"name": "proxy-entrypoint"},
                    }
                }
            },
            f"{ENTRYPOINT}.loadBalancerService.name: 'proxy-entrypoint' is the name in inClusterServiceName",
        ),
        (
            {"proxyServer": {"entrypoint": {"type": "LoadBalancerService", "port": 8090}}},
            f"{ENTRYPOINT}.port: 8090 is the port of clients at the load balancer",
        ),
        (
            {"proxyServer": {"entrypoint": {"loadBalancerService": {"annotations": [{"value": "v"}]}}}},
            f"{ENTRYPOINT}.loadBalancerService.annotations[0].key: is required",
        ),
        ({"deploy": {"ports": {"proxyServer": 80}}}, "spec.deploy.ports.proxyServer: must be between 1024 and 49151"),
        ({"deploy": {"ports": {"proxyServer": 49152}}}, "spec.deploy.ports.proxyServer: must be between"),
        (
            {"deploy": {"ports": {"proxyServer": 9000, "adminServer": 9000}}},
            "spec.deploy.ports.adminServer: is 9000, as is proxyServer: the ports must be different",
        ),
        ({"deploy": {"ports": {"healthServer": 8091}}}, "spec.deploy.ports.healthServer: is 8091, as is agentServer"),
        ({"authentication": {"signer": {"type": "Vault"}}}, "spec.authentication.signer.type: must be one of "),
        (
            {"authentication": {"signer": {"selfSigned": {"additionalSANs": ["a", "*.b", "münchen.example"]}}}},
            f"{SELF_SIGNED}.additionalSANs[2]: 'münchen.example' cannot be a name in a certificate",
        ),
        (
            {"authentication": {"signer": {"selfSigned": {"additionalSANs": [""]}}}},
            f"{SELF_SIGNED}.additionalSANs[0]: '' cannot be",
        ),
        ({"userServer": {"additionalSANs": ["a b"]}}, "spec.userServer.additionalSANs[0]: 'a b' cannot be"),
        ({"userServer": 1}, "spec.userServer: must be an object, not 1"),
        *(
            (
                {"authentication": {"dump": {"secrets": {"signingProxyClientSecretName": name}}}},
                f"{SECRETS}.signingProxyClientSecretName: '{name}' is ",
            )
            for name in (
                "proxy-server-ca",
                "cluster-proxy-signer",
                "cluster-proxy-user-serving-cert",
                "cluster-proxy-service-proxy-server-cert",
                "proxy-server",
            )
        ),
        (
            {"authentication": {"dump": {"secrets": {"signingAgentServerSecretName": "a_b"}}}},
            f"{SECRETS}.signingAgentServerSecretName: 'a_b' is not a valid name",
        ),
        (
            {"proxyAgent": {"additionalServiceCAConfigMap": "A"}},
            "spec.proxyAgent.additionalServiceCAConfigMap: 'A' is not a valid name",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_fix(spec: dict[str, Any], problem: str) -> None:
    problems = problems_of(configuration_object(**spec))
    assert len(problems) == 1
    assert problems[0].startswith(problem)


def test_all_problems_are_told_at_once() -> None:
    problems = problems_of(
        configuration_object(
            proxyServer={"image": "", "replicas": -1},
            proxyAgent={"image": ""},
            deploy={"ports": []},
        )
    )
    assert len(problems) == 4


def test_the_name_of_the_cas_secret_may_be_another() -> None:
    obj = configuration_object(
        authentication={"dump": {"secrets": {"signingProxyClientSecretName": "mine"}}}
    )
    assert parse_configuration(obj).secrets.proxy_client == "mine"
    (problem,) = problems_of(obj, signer_secret="mine")  # noqa: S106  a name
    assert problem.endswith("'mine' is where the CA's key is kept: choose another name")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("proxy-server-ca", "is where the CA's certificate is kept"),
        ("cluster-proxy-user-serving-cert", "is where the user server's certificate is kept"),
        (
            "cluster-proxy-service-proxy-server-cert",
            "is where the service proxies' certificate is kept",
        ),
        ("proxy-server", "is the name in signingProxyServerSecretName already"),
    ],
)
def test_a_certificate_is_not_kept_in_anothers_secret(name: str, why: str) -> None:
    secrets = {"signingAgentServerSecretName": name}
    (problem,) = problems_of(configuration_object(authentication={"dump": {"secrets": secrets}}))
    assert "signingAgentServerSecretName" in problem
    assert problem.endswith(f"'{name}' {why}: choose another name")


def test_a_hostname_that_is_not_used_need_not_be_valid() -> None:
    configuration = parse_configuration(
        configuration_object(
            proxyServer={"entrypoint": {"type": "PortForward", "hostname": {"value": "https://x"}}}
        )
    )
    assert configuration.proxy_server.entrypoint.type is EntrypointType.PORT_FORWARD


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("a", True),
        ("A.Example", True),
        ("my_host.example", True),
        ("10.0.0.1", True),
        ("::1", True),
        ("a" * 63 + ".example", True),
        ("a" * 64 + ".example", False),
        (".".join(["a" * 49] * 6), False),
        ("*.example", False),
        ("a.example.", False),
        ("-a", False),
        ("", False),
    ],
)
def test_hosts(text: str, is_one: bool) -> None:
    assert is_host(text) == is_one


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["*", "a.example", "::1", "--health-port", "--graceful-shutdown-timeout=9h"]),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3)
    ),
    max_leaves=5,
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(found for key, child in children for found in paths_of(child, (*path, key)))]


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_whatever_a_configuration_holds_it_is_refused_or_can_be_rendered(
    data: st.DataObject,
) -> None:
    obj: Any = {"root": copy.deepcopy(FULL)}
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([path for path in paths_of(obj) if path]))
        parent = obj
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = data.draw(JSON)
    try:
        configuration = parse_configuration(obj["root"])
    except InvalidConfiguration as error:
        problems = error.problems
    else:
        problems = ()
        check_rendering(configuration)
    assert all(problem.field and problem.message for problem in problems)


def check_rendering(configuration: ProxyConfiguration) -> None:
    json.dumps([rendered for _, rendered in hub_objects(configuration, b"pem")])
    json.dumps(load_balancer(configuration)[0])
    for leaf in wanted_leaves(configuration, "lb.example").values():
        for host in leaf.hosts:
            x509.DNSName(host)

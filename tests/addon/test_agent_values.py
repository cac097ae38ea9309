from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from agents import (
    CA,
    NAMESPACE,
    SERVICE_PROXY_SECRET,
    Case,
    cluster,
    configuration,
    deployment_config,
    pair,
    variables,
)
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.addon.agent_images import Image, Mirror, mirrored, parse_image
from clusterproxy.addon.agent_manifests import agent_manifests
from clusterproxy.addon.agent_values import (
    IMAGE_REGISTRIES,
    NODE_SELECTOR,
    install_namespace,
)
from clusterproxy.addon.certificates import load_certificates, new_authority, new_key
from clusterproxy.addon.chart_values import DEFAULTS, UnrenderableError, merge, parse_values
from clusterproxy.addon.config import ManagerConfig
from clusterproxy.addon.leaves import encoded
from clusterproxy.tunnel.agent_identity import service_proxy_host

HOST = "cluster-a140791d2b20a847f2c74c62c384f93fb83691d871e80385.open-cluster-management.proxy"
DIGEST = "sha256:" + "0123456789abcdef" * 4


def problems(case: Case) -> list[str]:
    with pytest.raises(UnrenderableError) as caught:
        case.objects()
    assert str(caught.value) == "; ".join(caught.value.problems)
    return list(caught.value.problems)


def balanced(*ingress: Any) -> Any:
    return {"status": {"loadBalancer": {"ingress": list(ingress)}}}


BALANCED = configuration(proxyServer={"entrypoint": {"type": "LoadBalancerService"}})


# -- all of them -----------------------------------------------------------------------------------


def test_the_values_of_a_configuration() -> None:
    values = Case().values()
    assert values == {
        **DEFAULTS,
        "hubKubeConfigSecret": "cluster-proxy-hub-kubeconfig",
        "managedKubeConfigSecret": "cluster-proxy-managed-kubeconfig",
        "agentDeploymentAnnotations": {
            "proxy.open-cluster-management.io/configuration-generation": "3"
        },
        "includeNamespaceCreation": True,
        "clusterName": "cluster1",
        "registry": "",
        "image": "agent",
        "tag": "1",
        "proxyAgentImage": "agent:1",
        "replicas": 3,
        "base64EncodedCAData": base64.b64encode(CA).decode(),
        "serviceEntryPoint": "127.0.0.1",
        "addonAgentArgs": [
            "--hub-kubeconfig=/etc/kubeconfig/kubeconfig",
            "--cluster-name=cluster1",
            "--proxy-server-namespace=open-cluster-management-cluster-proxy",
            "--enable-port-forward-proxy=true",
        ],
        "agentIdentifiers": f"host={HOST}&host=cluster1&host=cluster1.{NAMESPACE}",
        "serviceProxyHost": HOST,
        "enableKubeApiProxy": True,
        "addonInstallNamespace": NAMESPACE,
        "installMode": "Default",
    }
    parse_values(values)


def test_what_the_configuration_says_of_agents() -> None:
    agent = {
        "image": "quay.io/a/b:v1",
        "replicas": 0,
        "additionalArgs": ["--a"],
        "imagePullSecrets": ["p"],
        "additionalServiceProxyArgs": ["--b"],
        "additionalServiceCAConfigMap": "ca-map",
    }
    values = Case().given(configuration=configuration(proxyAgent=agent)).values()
    assert values["replicas"] == 0
    assert values["additionalProxyAgentArgs"] == ["--a"]
    assert values["proxyAgentImagePullSecrets"] == ["p"]
    assert values["additionalServiceProxyArgs"] == ["--b"]
    assert values["additionalServiceCAConfigMap"] == "ca-map"
    assert values["proxyAgentImage"] == "quay.io/a/b:v1"


def test_a_missing_configuration() -> None:
    # C5
    assert problems(Case().given(configuration=None)) == [
        'managedproxyconfigurations.proxy.open-cluster-management.io "cluster-proxy" not found'
    ]


def test_a_configuration_that_changes_its_image_changes_that_of_all_containers() -> None:
    case = Case().told(agent_image_name="")
    for image in ("quay.io/a/b:1", "quay.io/a/b:2"):
        containers = (
            case.given(configuration=configuration(proxyAgent={"image": image}))
            .with_service_proxy()
            .containers()
        )
        assert {container["image"] for container in containers.values()} == {image}


def test_without_the_proxy_to_the_apiserver() -> None:
    # C2
    values = Case().told(enable_kube_api_proxy=False).values()
    assert values["agentIdentifiers"] == f"host={HOST}"
    assert values["enableKubeApiProxy"] is False


def test_network_policies() -> None:
    assert Case().told(enable_network_policies=True).values()["networkPolicies"] == {
        "enabled": True
    }


# -- entry point -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_port", "port"), [({}, 8091), ({"port": 0}, 8091), ({"port": 443}, 443)]
)
def test_a_host_name(given_port: dict[str, int], port: int) -> None:
    entrypoint = {"type": "Hostname", "hostname": {"value": "hub.example"}, **given_port}
    # C7
    case = Case().given(configuration=configuration(proxyServer={"entrypoint": entrypoint}))
    assert dialled(case) == {"--proxy-server-host=hub.example", f"--proxy-server-port={port}"}


def dialled(case: Case) -> set[str]:
    """Return what the containers are told of where the hub is."""
    containers = case.containers()
    args = [*containers["proxy-agent"]["args"], *containers["addon-agent"]["args"]]
    return {
        arg
        for arg in args
        if arg.startswith(("--proxy-server-host", "--proxy-server-port", "--enable-port"))
    }


def test_the_hubs_apiserver() -> None:
    # C8
    assert dialled(Case()) == {
        "--proxy-server-host=127.0.0.1",
        "--proxy-server-port=8091",
        "--enable-port-forward-proxy=true",
    }


@pytest.mark.parametrize(
    ("ingress", "address"),
    [
        ([{"ip": "10.0.0.1"}], "10.0.0.1"),
        ([{"hostname": "elb.example"}], "elb.example"),
        ([{}, "x", {"ip": "10.0.0.2", "hostname": "elb.example"}], "10.0.0.2"),
    ],
)
def test_a_load_balancer(ingress: list[Any], address: str) -> None:
    # C6
    case = Case().given(configuration=BALANCED, load_balancer=balanced(*ingress))
    assert dialled(case) == {f"--proxy-server-host={address}", "--proxy-server-port=8091"}


@pytest.mark.parametrize("service", [{}, balanced(), balanced({}), {"status": "x"}])
def test_a_load_balancer_without_an_address(service: Any) -> None:
    # C6
    [problem] = problems(Case().given(configuration=BALANCED, load_balancer=service))
    assert problem == (
        "the load-balancer service for proxy-server ingress is not yet provisioned: Service "
        "open-cluster-management-cluster-proxy/proxy-agent-entrypoint has no address"
    )


def test_a_missing_load_balancer() -> None:
    # C6
    assert problems(Case().given(configuration=BALANCED)) == [
        'failed getting proxy loadbalancer: services "proxy-agent-entrypoint" not found'
    ]


@pytest.mark.parametrize("port", [8091, 0, 9443])
def test_the_addon_agent_listens_where_the_proxy_agent_dials(port: int) -> None:
    entrypoint = {"type": "PortForward", "port": port}
    case = Case().given(configuration=configuration(proxyServer={"entrypoint": entrypoint}))
    agent, addon = (case.containers()[name] for name in ("proxy-agent", "addon-agent"))
    assert f"--proxy-server-port={port or 8091}" in agent["args"]
    assert "--enable-port-forward-proxy=true" in addon["args"]
    # The original's agent knows no such flag.
    own = [arg for arg in addon["args"] if "port=" in arg]
    assert own == (["--port-forward-port=9443"] if port == 9443 else [])


def test_the_addon_agent_forwards_to_where_servers_listen() -> None:
    ports = {"agentServer": 9191}
    found = configuration(
        proxyServer={"entrypoint": {"type": "PortForward"}}, deploy={"ports": ports}
    )
    addon = Case().given(configuration=found).containers()["addon-agent"]
    assert "--proxy-server-port=9191" in addon["args"]


# -- hosts -----------------------------------------------------------------------------------------


def test_hosts() -> None:
    # C15
    assert service_proxy_host("cluster1") == HOST
    assert service_proxy_host("loopback").startswith(
        "cluster-64edaa3fb9310e98cdb183cddbf156d9964a05c017fa7f8e."
    )


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ("quay.io/org/img:tag", Image("quay.io/org", "img", "tag")),
        ("quay.io/org/img", Image("quay.io/org", "img", "latest")),
        ("img", Image("", "img", "latest")),
        ("img:1", Image("", "img", "1")),
        ("localhost:5000/img", Image("localhost:5000", "img", "latest")),
        ("reg:5000/a/b/img:v1.2_3-x", Image("reg:5000/a/b", "img", "v1.2_3-x")),
        ("[fd00::1]:5000/img:1", Image("[fd00::1]:5000", "img", "1")),
        (f"quay.io/org/img@{DIGEST}", Image("quay.io/org", "img", "", DIGEST)),
        (f"reg:5000/img:v1@{DIGEST}", Image("reg:5000", "img", "v1", DIGEST)),
    ],
)
def test_images(text: str, image: Image) -> None:
    # C16
    assert parse_image(text) == image
    assert str(image) == (f"{text}:latest" if image.tag == "latest" else text)


@pytest.mark.parametrize(
    "text",
    ["", "a/", "/a", "a:", "a b", "A", "a@", "a@sha256:12", "a:b:c", "r/:1", "r//a", "a\n"],
)
def test_what_is_no_image(text: str) -> None:
    with pytest.raises(ValueError, match="is no image: write REGISTRY/NAME:TAG or"):
        parse_image(text)


@pytest.mark.parametrize("image", ["quay.io/org/img", f"quay.io/org/img:v1@{DIGEST}", "img:1"])
def test_what_an_image_is_called_in_the_deployment(image: str) -> None:
    case = Case().told(agent_image_name=image)
    rendered = case.containers()["addon-agent"]["image"]
    assert parse_image(rendered) == parse_image(image)


def test_the_image_of_the_manager_itself() -> None:
    case = Case().told(agent_image_name=f"reg:5000/ours@{DIGEST}")
    containers = case.with_service_proxy().containers()
    assert containers["proxy-agent"]["image"] == "agent:1"
    assert containers["addon-agent"]["image"] == f"reg:5000/ours@{DIGEST}"
    assert containers["service-proxy"]["image"] == f"reg:5000/ours@{DIGEST}"


def test_images_that_are_none() -> None:
    assert problems(Case().told(agent_image_name="No Image")) == [
        "--agent-image-name: 'No Image' is no image: write REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST"
    ]
    [problem] = problems(Case().given(configuration=configuration(proxyAgent={"image": "a:b:c"})))
    assert problem.startswith("ManagedProxyConfiguration cluster-proxy: spec.proxyAgent.image: ")


@pytest.mark.parametrize(
    ("mirrors", "found"),
    [
        ([("quay.io/a", "reg/b")], "reg/b/img:1"),
        ([("quay.io/a/", "reg/b/")], "reg/b/img:1"),
        ([("quay.io/a/img", "reg/other")], "reg/other:1"),
        ([("quay.io", "one"), ("quay.io/a", "two")], "two/img:1"),
        ([("quay.io/a", "two"), ("quay.io", "one")], "one/a/img:1"),
        ([("quay.io/a", "two"), ("elsewhere", "one")], "two/img:1"),
        ([("", "reg")], "reg/img:1"),
        ([("", "")], "quay.io/a/img:1"),
        ([("quay.io/a", "")], "quay.io/a/img:1"),
        ([], "quay.io/a/img:1"),
    ],
)
def test_mirrors(mirrors: list[tuple[str, str]], found: str) -> None:
    # C13
    assert mirrored("quay.io/a/img:1", [Mirror(*each) for each in mirrors]) == found


def test_a_mirrored_digest_stays() -> None:
    image = f"quay.io/a/img@{DIGEST}"
    assert mirrored(image, [Mirror("", "reg:5000")]) == f"reg:5000/img@{DIGEST}"


def annotated(value: Any, name: str = IMAGE_REGISTRIES, **metadata: Any) -> Case:
    text = value if isinstance(value, str) else json.dumps(value)
    return Case().given(cluster=cluster(annotations={name: text}, **metadata))


def test_the_mirrors_of_a_cluster() -> None:
    # C13
    mirrors = {"registries": [{"source": "", "mirror": "reg/b", "more": 1}]}
    case = annotated(mirrors).with_service_proxy()
    assert {each["image"] for each in case.containers().values()} == {"reg/b/agent:1"}
    case = case.told(agent_image_name="quay.io/x/ours:2")
    assert case.containers()["addon-agent"]["image"] == "reg/b/ours:2"


def test_the_mirrors_of_an_add_on_come_first() -> None:
    mirrors = {"registries": [{"source": "agent", "mirror": "cluster"}]}
    case = annotated(mirrors)
    for source, image in (("agent", "addon:1"), ("else", "cluster:1")):
        own = deployment_config(registries=[{"source": source, "mirror": "addon"}])
        assert case.given(deployment_config=own).values()["proxyAgentImage"] == image


@pytest.mark.parametrize("value", ["null", "{}", '{"registries": null}', '{"registries": []}'])
def test_no_mirrors(value: str) -> None:
    assert annotated(value).values()["proxyAgentImage"] == "agent:1"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "must be JSON, not '{': "),
        ("", "must be JSON, not '': "),
        ("[" * 100_000, "must be JSON, not '[[["),
        ("[]", "the object: must be an object, not []"),
        ('{"registries": {}}', "registries: must be a list, not {}"),
        ('{"registries": [1]}', "registries[0]: must be an object, not 1"),
        (
            '{"registries": [{"source": "a", "mirror": 1}]}',
            "registries[0].mirror: must be a string, not 1",
        ),
    ],
)
def test_mirrors_that_cannot_be_read(value: str, message: str) -> None:
    # C13
    [problem] = problems(annotated(value))
    where = "ManagedCluster cluster1: metadata.annotations[open-cluster-management.io/image-registries]: "
    assert problem.startswith(where + message)


@pytest.mark.parametrize("mirror", ["Bad Mirror", "mirror.example/a:1"])
def test_a_mirror_that_makes_no_image_is_named(mirror: str) -> None:
    # C13
    mirrors = [{"source": "agent", "mirror": mirror}]
    case = annotated({"registries": mirrors})
    [problem] = problems(case)
    assert problem.startswith(
        "ManagedCluster cluster1: metadata.annotations[open-cluster-management.io/image-registries]: "
        f"'{mirror}:1' is no image"
    )
    case = case.given(deployment_config=deployment_config(registries=mirrors))
    [problem] = problems(case)
    assert problem.startswith(
        f"AddOnDeploymentConfig default/adc: spec.registries: '{mirror}:1' is no image"
    )


# -- the hub's own cluster -------------------------------------------------------------------------


def own(value: Any, label: Any = "true") -> Case:
    return annotated(value, NODE_SELECTOR, labels={"local-cluster": label})


@pytest.mark.parametrize("label", ["true", "True"])
def test_the_node_selector_of_the_hubs_own_cluster(label: str) -> None:
    # C14
    assert own({"a": "b"}, label).values()["nodeSelector"] == {"a": "b"}


@pytest.mark.parametrize(
    "case",
    [
        annotated({"a": "b"}, NODE_SELECTOR),
        own({"a": "b"}, "false"),
        own({"a": "b"}, None),
        own("null"),
        own({}),
        Case().given(cluster=cluster(labels={"local-cluster": "true"})),
    ],
)
def test_no_node_selector(case: Case) -> None:
    # C14
    assert case.values()["nodeSelector"] == {}


@pytest.mark.parametrize("value", ["[]", "x", '{"a": 1}', '{"a": {"b": "c"}}', "1"])
def test_a_node_selector_that_is_none(value: str) -> None:
    # C14
    [problem] = problems(own(value))
    assert problem.startswith(
        "ManagedCluster cluster1: metadata.annotations[open-cluster-management/nodeSelector]: "
    )


# -- service proxy ---------------------------------------------------------------------------------


def test_the_certificate_of_the_service_proxy() -> None:
    values = Case().with_service_proxy().values()
    assert values["enableServiceProxy"] is True
    data = SERVICE_PROXY_SECRET["data"]
    assert values["serviceProxySecretCert"] == data["tls.crt"]
    assert values["serviceProxySecretKey"] == data["tls.key"]


def test_a_missing_certificate_of_the_service_proxy() -> None:
    # C3
    case = Case().told(enable_service_proxy=True, signer_secret_namespace="hub")  # noqa: S106
    name = "cluster-proxy-service-proxy-server-cert"
    assert problems(case) == [
        f'failed to get secret {name} in the namespace hub: secrets "{name}" not found'
    ]
    for key, other in (("tls.crt", "tls.key"), ("tls.key", "tls.crt")):
        for wrong in ({}, {key: ""}, {key: "%"}, {key: 1}):
            secret = {"data": {other: "Zm9v", **wrong}}
            assert problems(case.given(service_proxy_secret=secret)) == [
                f"secret {name} does not contain {key} (in the namespace hub)"
            ]


@pytest.mark.parametrize(
    ("crt", "key", "said"),
    [
        (b"certificate", None, "tls.crt is no certificate in PEM"),
        (None, b"key", "tls.key cannot be read"),
        (None, pair()["tls.key"], "tls.key is not the key of tls.crt"),
        (pair()["tls.crt"], None, "tls.key is not the key of tls.crt"),
    ],
)
def test_a_certificate_of_the_service_proxy_that_is_none(
    crt: bytes | None, key: bytes | None, said: str
) -> None:
    right = pair()
    data = {"tls.crt": crt or right["tls.crt"], "tls.key": key or right["tls.key"]}
    case = Case().told(enable_service_proxy=True, signer_secret_namespace="hub")  # noqa: S106
    [told] = problems(case.given(service_proxy_secret={"data": encoded(data)}))
    assert told.startswith(
        f"secret cluster-proxy-service-proxy-server-cert (in the namespace hub): {said}"
    )
    assert told.endswith(
        "Put a certificate and its key there, or delete the secret: the controllers issue both"
    )


# -- AddOnDeploymentConfig -------------------------------------------------------------------------


def test_variables_are_texts_and_come_over_the_rest() -> None:
    # C10
    given = variables(
        replicas="2",
        serviceDomain="svc.example",
        enableImpersonation="false",
        oidcIssuerURL="https://issuer.example",
        anything="x",
        clusterName="other",
    )
    values = Case().given(deployment_config=given).values()
    assert values["replicas"] == "2"
    assert values["serviceDomain"] == "svc.example"
    assert values["enableImpersonation"] == "false"
    assert values["oidcIssuerURL"] == "https://issuer.example"
    assert values["anything"] == "x"
    assert values["clusterName"] == "cluster1"


def test_a_tag_by_variable_takes_the_digest_away() -> None:
    case = Case().told(agent_image_name=f"quay.io/org/img:v1@{DIGEST}")
    for name, value, image in (
        ("tag", "v2", "quay.io/org/img:v2"),
        ("image", "other", "quay.io/org/other:v1"),
        ("registry", "reg", f"reg/img:v1@{DIGEST}"),
    ):
        changed = case.given(deployment_config=variables(**{name: value}))
        assert changed.containers()["addon-agent"]["image"] == image


def test_where_the_agent_is_installed() -> None:
    # C10
    config = ManagerConfig(agent_install_namespace="own")
    assert install_namespace(config, None) == "own"
    assert install_namespace(config, deployment_config()) == "own"
    there = deployment_config(agentInstallNamespace="there")
    assert install_namespace(config, there) == "there"
    values = Case().given(deployment_config=there).values()
    assert values["addonInstallNamespace"] == values["spokeAddonNamespace"] == "there"
    assert "&host=cluster1.there" in values["agentIdentifiers"]
    with pytest.raises(UnrenderableError, match=r"^AddOnDeploymentConfig default/adc: spec\.agent"):
        install_namespace(config, deployment_config(agentInstallNamespace="No"))


def test_node_placement() -> None:
    # C10
    case = own({"a": "b"})
    assert case.given(deployment_config=deployment_config()).values()["nodeSelector"] == {"a": "b"}
    placed = deployment_config(nodePlacement={"nodeSelector": {"c": "d"}})
    values = case.given(deployment_config=placed).values()
    assert (values["nodeSelector"], values["tolerations"]) == ({"c": "d"}, [])
    empty = deployment_config(nodePlacement={})
    values = case.given(deployment_config=empty).values()
    assert (values["nodeSelector"], values["tolerations"]) == ({}, [])


def test_a_proxy_to_the_hub() -> None:
    proxy = {"httpProxy": "http://p:1", "httpsProxy": "http://p:2", "noProxy": "x", "caBundle": ""}
    values = Case().given(deployment_config=deployment_config(proxyConfig=proxy)).values()
    assert values["proxyConfig"] == {
        "HTTP_PROXY": "http://p:1",
        "HTTPS_PROXY": "http://p:2",
        "NO_PROXY": "x",
    }


def test_the_ca_of_a_proxy() -> None:
    # C10
    key = new_key()
    now = datetime(2026, 1, 1, tzinfo=UTC)
    hub, proxy = (new_authority(now, private_key=key).crt for _ in range(2))
    bundle = base64.b64encode(b"a comment\n" + proxy + hub + proxy).decode()
    case = Case().given(ca_bundle=hub)

    def ca_of(https_proxy: str) -> bytes:
        given = deployment_config(proxyConfig={"httpsProxy": https_proxy, "caBundle": bundle})
        values = case.given(deployment_config=given).values()
        return base64.b64decode(values["base64EncodedCAData"])

    assert ca_of("https://p:1") == proxy + hub
    assert load_certificates(ca_of("https://p:1"), "it")
    for other in ("http://p:1", ""):
        assert ca_of(other) == hub


def test_resources() -> None:
    # C10
    given = deployment_config(
        resourceRequirements=[
            {
                "containerID": "*:*:*",
                "resources": {"requests": {"cpu": 1}, "claims": [{"name": "x"}]},
            },
            {
                "containerID": "deployments:cluster-proxy-proxy-agent:proxy-agent",
                "resources": {"limits": {"memory": "64Mi"}},
            },
            {"containerID": "deployments:*:addon-*", "resources": {}},
            {"containerID": "deployments:cluster.proxy-proxy-agent:service-proxy", "resources": {}},
        ]
    )
    containers = Case().given(deployment_config=given).with_service_proxy().containers()
    assert {name: container["resources"] for name, container in containers.items()} == {
        "proxy-agent": {"limits": {"memory": "64Mi"}},
        "addon-agent": {},
        "service-proxy": {"requests": {"cpu": "1"}},
    }


@pytest.mark.timeout(10)
@pytest.mark.parametrize("part", ["*" * 40 + "z", "*".join("proxy-agent" * 4) + "*z"])
def test_a_pattern_that_nothing_matches_is_not_tried_for_ever(part: str) -> None:
    requirement = {"containerID": f"*:*:{part}", "resources": {"limits": {"cpu": "1"}}}
    given = deployment_config(resourceRequirements=[requirement])
    containers = Case().given(deployment_config=given).containers()
    assert not any("resources" in container for container in containers.values())


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"agentInstallNamespace": 1}, "spec.agentInstallNamespace"),
        ({"agentInstallNamespace": "a" * 64}, "spec.agentInstallNamespace"),
        ({"customizedVariables": {}}, "spec.customizedVariables"),
        ({"customizedVariables": [{"value": "x"}]}, "spec.customizedVariables[0].name"),
        (
            {"customizedVariables": [{"name": "x", "value": 1}]},
            "spec.customizedVariables[0].value",
        ),
        ({"nodePlacement": []}, "spec.nodePlacement"),
        ({"nodePlacement": {"nodeSelector": {"a": 1}}}, "spec.nodePlacement.nodeSelector['a']"),
        ({"nodePlacement": {"tolerations": {}}}, "spec.nodePlacement.tolerations"),
        ({"proxyConfig": {"httpProxy": []}}, "spec.proxyConfig.httpProxy"),
        ({"proxyConfig": {"caBundle": "%"}}, "spec.proxyConfig.caBundle"),
        ({"proxyConfig": {"caBundle": "Zm9v"}}, "spec.proxyConfig.caBundle"),
        ({"registries": "x"}, "spec.registries"),
        (
            {"resourceRequirements": [{"containerID": "a:b"}]},
            "spec.resourceRequirements[0].containerID",
        ),
        ({"resourceRequirements": [{}]}, "spec.resourceRequirements[0].containerID"),
        (
            {
                "resourceRequirements": [
                    {"containerID": "*:*:*", "resources": {"limits": {"cpu": "much"}}}
                ]
            },
            "spec.resourceRequirements[0].resources.limits[cpu]",
        ),
        (
            {
                "resourceRequirements": [
                    {"containerID": "*:*:*", "resources": {"limits": {"cpu": True}}}
                ]
            },
            "spec.resourceRequirements[0].resources.limits[cpu]",
        ),
        # Values of the chart.
        ({"nodePlacement": {"tolerations": [{"key": 1}]}}, "tolerations[0].key"),
        ({"customizedVariables": [{"name": "replicas", "value": "x"}]}, "replicas"),
        (
            {"customizedVariables": [{"name": "networkPolicies", "value": "true"}]},
            "networkPolicies",
        ),
        (
            {"customizedVariables": [{"name": "enableServiceProxy", "value": "on"}]},
            "enableServiceProxy",
        ),
        (
            {"customizedVariables": [{"name": "oidcReservedNamePrefixes", "value": "a,,b"}]},
            "oidcReservedNamePrefixes",
        ),
        ("x", "spec"),
    ],
)
def test_a_wrong_deployment_config(spec: Any, field: str) -> None:
    given = {"metadata": {"name": "adc", "namespace": "default"}, "spec": spec}
    [problem] = problems(Case().given(deployment_config=given))
    assert problem.startswith(f"AddOnDeploymentConfig default/adc: {field}: ")


def test_variables_that_do_not_go_together() -> None:
    together = "oidcIssuerURL and oidcClientID must be specified together"
    case = Case().with_service_proxy()
    given = variables(oidcIssuerURL="https://x", oidcRequiredClaimsJSON="[]")
    assert problems(case.given(deployment_config=given)) == [
        f"AddOnDeploymentConfig default/adc: {together}",
        "AddOnDeploymentConfig default/adc: oidcRequiredClaimsJSON must be a JSON object",
    ]
    # With what the ManagedProxyConfiguration says, or that alone
    args = {"additionalServiceProxyArgs": ["--oidc-issuer-url=a"]}
    configured = case.given(configuration=configuration(proxyAgent=args))
    given = variables(oidcIssuerURL="https://x", oidcClientID="c")
    [problem] = problems(configured.given(deployment_config=given))
    assert problem.startswith("AddOnDeploymentConfig default/adc: configure the OIDC issuer with")
    args = {"additionalServiceProxyArgs": ["--enable-impersonation"]}
    configured = case.given(configuration=configuration(proxyAgent=args))
    [problem] = problems(configured.given(deployment_config=deployment_config()))
    assert problem.startswith("additionalServiceProxyArgs must not set --enable-impersonation")


def test_all_that_is_wrong_is_told_at_once() -> None:
    case = annotated("{").told(enable_service_proxy=True, agent_image_name="No")
    case = case.given(configuration=BALANCED, deployment_config=deployment_config(registries=1))
    assert len(problems(case)) == 5


# -- hostile ---------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
_FIELDS = (
    "agentInstallNamespace",
    "customizedVariables",
    "nodePlacement",
    "proxyConfig",
    "registries",
    "resourceRequirements",
)


@given(
    spec=ANYTHING | st.dictionaries(st.sampled_from(_FIELDS), ANYTHING),
    annotation=ANYTHING | ANYTHING.map(json.dumps),
    balancer=st.dictionaries(st.sampled_from(["status", "spec"]), ANYTHING),
    data=ANYTHING,
)
def test_whatever_objects_say_there_are_values_or_problems(
    spec: Any, annotation: Any, balancer: Any, data: Any
) -> None:
    case = (
        Case()
        .told(enable_service_proxy=True)
        .given(
            configuration=BALANCED,
            cluster=cluster(
                labels={"local-cluster": "true"},
                annotations={IMAGE_REGISTRIES: annotation, NODE_SELECTOR: annotation},
            ),
            load_balancer=balancer,
            deployment_config={"metadata": data, "spec": spec},
            service_proxy_secret={"data": data},
        )
    )
    assert problems(case)


@given(ANYTHING | st.dictionaries(st.sampled_from([*DEFAULTS]), ANYTHING))
def test_whatever_values_are_there_are_objects_or_problems(given_values: Any) -> None:
    values = merge(DEFAULTS, given_values if isinstance(given_values, dict) else {})
    try:
        manifests = agent_manifests(values, NAMESPACE)
    except UnrenderableError as caught:
        error = caught
    else:
        assert len(manifests) >= 7
        return
    assert error.problems

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from agents import (
    NAMESPACE,
    SERVICE_PROXY_SECRET,
    Case,
    cluster,
    configuration,
    deployment_config,
    golden_case,
    golden_manifests,
    variables,
)
from compatibility import Place, differences, documented
from golden_objects import HOSTNAME, PORT_FORWARD, Object, golden_configuration

from clusterproxy.addon.agent_manifests import agent_manifests
from clusterproxy.addon.chart_values import DEFAULTS, UnrenderableError, merge
from clusterproxy.addon.configuration import parse_configuration

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

AGENT = "cluster-proxy-proxy-agent"
USUAL = [
    ("Namespace", NAMESPACE),
    ("ServiceAccount", "cluster-proxy"),
    ("Secret", "cluster-proxy-ca"),
    ("ClusterRole", "cluster-proxy-addon-agent-impersonator"),
    ("ClusterRoleBinding", f"cluster-proxy-addon-agent-impersonator:{NAMESPACE}"),
    ("Role", "cluster-proxy-addon-agent"),
    ("RoleBinding", "cluster-proxy-addon-agent"),
    ("Service", "cluster1"),
    ("Deployment", AGENT),
]
SERVICE_PROXY_CERTIFICATES = "cluster-proxy-service-proxy-server-certificates"
POLICY = "cluster-proxy-proxy-agent-network-policy"
ISSUER = {"oidcIssuerURL": "https://issuer.example", "oidcClientID": "cid"}


def render(**values: Any) -> dict[tuple[str, str], Object]:
    """Render the chart's values as a person gives them."""
    return {
        (obj["kind"], obj["metadata"]["name"]): obj
        for _, obj in agent_manifests(merge(DEFAULTS, values), NAMESPACE)
    }


def service_proxied(**values: Any) -> dict[tuple[str, str], Object]:
    return render(
        **{
            "enableServiceProxy": True,
            "serviceProxySecretCert": "Zm9v",
            "serviceProxySecretKey": "YmFy",
            **values,
        }
    )


def pod_of(objects: dict[tuple[str, str], Object]) -> Any:
    return objects["Deployment", AGENT]["spec"]["template"]["spec"]


def args_of(objects: dict[tuple[str, str], Object], name: str = "service-proxy") -> list[str]:
    [args] = [each["args"] for each in pod_of(objects)["containers"] if each["name"] == name]
    found: list[str] = args
    return found


def failure(**values: Any) -> str:
    with pytest.raises(UnrenderableError) as caught:
        service_proxied(**values)
    return str(caught.value)


# -- which objects ---------------------------------------------------------------------------------


def test_the_usual_objects() -> None:
    # C1
    assert list(Case().objects()) == USUAL


def test_each_object_says_what_it_is_and_where() -> None:
    values = Case().with_service_proxy().told(enable_network_policies=True).values()
    for resource, obj in agent_manifests(values, "ns"):
        assert (obj["apiVersion"], obj["kind"]) == (resource.api_version, resource.kind)
        assert obj["metadata"].get("namespace") == ("ns" if resource.namespaced else None)


def test_without_the_proxy_to_the_apiserver() -> None:
    # C2
    objects = Case().told(enable_kube_api_proxy=False).objects()
    assert list(objects) == [each for each in USUAL if each[0] != "Service"]


def test_with_the_service_proxy() -> None:
    # C3
    objects = Case().with_service_proxy().objects()
    certificates = ("Secret", SERVICE_PROXY_CERTIFICATES)
    assert set(objects) == {*USUAL, certificates}
    assert objects[certificates]["data"] == SERVICE_PROXY_SECRET["data"]
    assert [each["name"] for each in pod_of(objects)["containers"]] == [
        "proxy-agent",
        "addon-agent",
        "service-proxy",
    ]


def test_network_policies() -> None:
    # C4
    case = Case().told(enable_network_policies=True)
    objects = case.objects()
    assert set(objects) == {*USUAL, ("NetworkPolicy", POLICY)}
    without = objects["NetworkPolicy", POLICY]["spec"]
    assert {} not in without["egress"]
    assert {"protocol": "TCP", "port": 8091} in without["egress"][1]["ports"]
    with_proxy = case.with_service_proxy().objects()["NetworkPolicy", POLICY]["spec"]
    assert with_proxy["egress"] == [*without["egress"], {}]


def test_a_static_secret() -> None:
    objects = render(
        includeStaticProxyAgentSecret="true",
        staticProxyAgentSecretCert="Zm9v",
        staticProxyAgentSecretKey="YmFy",
    )
    name = "cluster-proxy-open-cluster-management.io-proxy-agent-signer-client-cert"
    assert objects["Secret", name]["data"] == {"tls.crt": "Zm9v", "tls.key": "YmFy"}


def test_exposed_services() -> None:
    objects = render(servicesToExpose=[{"Host": "h", "ExternalName": "a.b"}], serviceDomain="")
    assert objects["Service", "h"]["spec"] == {
        "type": "ExternalName",
        "externalName": "a.b.svc.cluster.local",
    }


def test_the_namespace_stays_when_the_add_on_goes() -> None:
    metadata = Case().objects()["Namespace", NAMESPACE]["metadata"]
    assert metadata["annotations"] == {"addon.open-cluster-management.io/deletion-orphan": ""}


@pytest.mark.parametrize(
    ("namespace", "name"),
    [
        ("open-cluster-management-agent-addon", "cluster-proxy-addon-agent-impersonator"),
        ("there", "cluster-proxy-addon-agent-impersonator:there"),
    ],
)
def test_where_a_deployment_config_puts_it(namespace: str, name: str) -> None:
    # C10
    given = deployment_config(agentInstallNamespace=namespace)
    objects = Case().given(deployment_config=given).objects()
    binding = objects["ClusterRoleBinding", name]
    assert [subject["namespace"] for subject in binding["subjects"]] == [namespace]
    assert objects["Deployment", AGENT]["metadata"]["namespace"] == namespace


@pytest.mark.parametrize(("text", "there"), [("true", True), ("false", False), ("", False)])
def test_a_variable_that_is_a_switch(text: str, there: bool) -> None:
    objects = Case().given(deployment_config=variables(enableKubeApiProxy=text)).objects()
    assert (("Service", "cluster1") in objects) is there


# -- Deployment ------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [2, "2", 2.0])
def test_replicas(replicas: Any) -> None:
    assert render(replicas=replicas)["Deployment", AGENT]["spec"]["replicas"] == 2


def test_replicas_by_variable() -> None:
    # C9
    objects = Case().given(deployment_config=variables(replicas="5")).objects()
    assert objects["Deployment", AGENT]["spec"]["replicas"] == 5


def test_replicas_by_configuration() -> None:
    # C9
    case = Case().given(configuration=configuration(proxyAgent={"replicas": 4}))
    assert case.objects()["Deployment", AGENT]["spec"]["replicas"] == 4


def test_the_domain_of_services_by_variable() -> None:
    # C10
    objects = Case().given(deployment_config=variables(serviceDomain="svc.example")).objects()
    assert objects["Service", "cluster1"]["spec"] == {
        "type": "ExternalName",
        "externalName": "kubernetes.default.svc.example",
    }


def test_placement_and_pull_secrets() -> None:
    # C10
    tolerations = [{"key": "k", "operator": "Exists", "tolerationSeconds": 5}]
    placement = {"nodeSelector": {"a": "b"}, "tolerations": tolerations}
    given = deployment_config(nodePlacement=placement)
    pod = pod_of(Case().given(deployment_config=given).objects())
    assert (pod["nodeSelector"], pod["tolerations"]) == ({"a": "b"}, tolerations)
    assert "imagePullSecrets" not in pod
    assert pod_of(render(proxyAgentImagePullSecrets=["p"]))["imagePullSecrets"] == [{"name": "p"}]
    bare = pod_of(render(tolerations=[], nodeSelector={}))
    assert not {"nodeSelector", "tolerations", "hostAliases"} & bare.keys()


def test_a_proxy_to_the_hub() -> None:
    # C10
    [agent, *_] = pod_of(render(proxyConfig={"HTTPS_PROXY": "https://p:1", "NO_PROXY": None}))[
        "containers"
    ]
    assert agent["env"] == [
        {"name": "HTTPS_PROXY", "value": "https://p:1"},
        {"name": "ROOT_CA_CERT", "value": "/etc/ca/ca.crt"},
    ]


def test_only_those_who_need_it_get_the_accounts_token() -> None:
    pod = pod_of(service_proxied())
    assert pod["automountServiceAccountToken"] is False
    mounted = {
        each["name"]: "/var/run/secrets/kubernetes.io/serviceaccount"
        in {mount["mountPath"] for mount in each["volumeMounts"]}
        for each in pod["containers"]
    }
    assert mounted == {"proxy-agent": False, "addon-agent": True, "service-proxy": True}


@pytest.mark.parametrize("objects", [render(), service_proxied(additionalServiceCAConfigMap="m")])
def test_what_is_mounted_is_a_volume_and_the_other_way_round(
    objects: dict[tuple[str, str], Object],
) -> None:
    pod = pod_of(objects)
    mounts = [mount for each in pod["containers"] for mount in each["volumeMounts"]]
    assert {mount["name"] for mount in mounts} == {each["name"] for each in pod["volumes"]}
    assert all(mount["readOnly"] for mount in mounts)


def test_further_authorities_of_services() -> None:
    objects = service_proxied(additionalServiceCAConfigMap="m")
    assert args_of(objects)[1] == "--additional-service-ca=/additional-service-ca/service-ca.crt"
    assert {
        "name": "additional-service-ca",
        "configMap": {"name": "m", "optional": True},
    } in pod_of(objects)["volumes"]


# -- OIDC ------------------------------------------------------------------------------------------


def oidc_args(**values: Any) -> list[str]:
    return [arg for arg in args_of(service_proxied(**ISSUER, **values)) if "--oidc" in arg]


def test_the_least_that_an_issuer_needs() -> None:
    # C11
    assert oidc_args() == [
        "--oidc-issuer-url=https://issuer.example",
        "--oidc-client-id=cid",
        "--oidc-reserved-name-prefixes=system:",
    ]


def test_all_that_can_be_said_of_an_issuer() -> None:
    # C11
    assert oidc_args(
        oidcUsernameClaim="email",
        oidcUsernamePrefix="oidc:",
        oidcGroupsClaim="groups",
        oidcGroupsPrefix="g:",
        oidcReservedNamePrefixes="system:,kube:",
        oidcSigningAlgs=["ES256", "RS256"],
        oidcRequiredClaimsJSON='{"b": "2=<3>", "a": "1", "": "\\ud800"}',
        oidcCAConfigMap="ca",
        additionalServiceProxyArgs=["--oidc-x"],
    ) == [
        "--oidc-issuer-url=https://issuer.example",
        "--oidc-client-id=cid",
        "--oidc-username-claim=email",
        "--oidc-username-prefix=oidc:",
        "--oidc-groups-claim=groups",
        "--oidc-groups-prefix=g:",
        "--oidc-reserved-name-prefixes=system:,kube:",
        "--oidc-signing-algs=ES256,RS256",
        "--oidc-required-claim==\ufffd",
        "--oidc-required-claim=a=1",
        "--oidc-required-claim=b=2=<3>",
        "--oidc-ca-configmap=ca",
        "--oidc-x",
    ]


@pytest.mark.parametrize("none", ["", []])
def test_no_reserved_prefixes(none: Any) -> None:
    # C11
    assert "--oidc-reserved-name-prefixes=" in oidc_args(oidcReservedNamePrefixes=none)


def test_signing_algorithms_as_a_text() -> None:
    assert "--oidc-signing-algs=ES256,RS256" in oidc_args(oidcSigningAlgs="ES256,RS256")


@pytest.mark.parametrize(
    "claims", ["{", "[]", "null", '"x"', "1", '{"a": NaN}', '{"a": "b"}, {}', "[" * 50_000]
)
def test_claims_that_are_no_object(claims: str) -> None:
    # C11
    assert failure(**ISSUER, oidcRequiredClaimsJSON=claims) == (
        "oidcRequiredClaimsJSON must be a JSON object"
    )


@pytest.mark.parametrize("value", [1, True, None, [], {}])
def test_claims_that_are_no_texts(value: Any) -> None:
    # C11
    claims = json.dumps({"a": "b", "c": value})
    assert failure(**ISSUER, oidcRequiredClaimsJSON=claims) == (
        "oidcRequiredClaimsJSON values must be strings"
    )


@pytest.mark.parametrize("half", ["oidcIssuerURL", "oidcClientID"])
def test_half_an_issuer(half: str) -> None:
    # C11
    assert failure(**{half: "https://x"}) == (
        "oidcIssuerURL and oidcClientID must be specified together"
    )


@pytest.mark.parametrize("prefixes", ["a,,b", ",", "a,", [""], ["a", ""], [1]])
def test_prefixes_that_would_reserve_all_names(prefixes: Any) -> None:
    # C11
    assert failure(oidcReservedNamePrefixes=prefixes).startswith("oidcReservedNamePrefixes")


def test_prefixes_have_to_be_given() -> None:
    assert failure(oidcReservedNamePrefixes=None) == (
        "oidcReservedNamePrefixes: is required; an empty text reserves none"
    )


# -- impersonation ---------------------------------------------------------------------------------


def impersonates(objects: dict[tuple[str, str], Object]) -> bool:
    rules = objects["ClusterRole", "cluster-proxy-addon-agent-impersonator"]["rules"]
    return {"apiGroups": [""], "resources": ["users", "groups"], "verbs": ["impersonate"]} in rules


@pytest.mark.parametrize("value", ["1", "t", "T", "TRUE", "true", "True"])
def test_users_of_the_hub(value: str) -> None:
    # C12
    objects = service_proxied(enableImpersonation=value)
    assert impersonates(objects)
    assert f"--enable-impersonation={value}" in args_of(objects)


@pytest.mark.parametrize(
    ("values", "granted"),
    [
        ({}, False),
        (ISSUER, True),
        ({"additionalServiceProxyArgs": ["--oidc-issuer-url=https://x"]}, True),
        ({"additionalServiceProxyArgs": ["--oidc-issuer-url", "https://x"]}, True),
        ({"additionalServiceProxyArgs": ["--oidc-issuer-url="]}, False),
        ({"additionalServiceProxyArgs": ["--oidc-issuer-urls=x"]}, False),
    ],
)
@pytest.mark.parametrize("off", ["false", "0", "F"])
def test_who_is_impersonated_without_users_of_the_hub(values: Any, granted: bool, off: str) -> None:
    # C12
    assert impersonates(service_proxied(enableImpersonation=off, **values)) is granted


def test_nobody_is_impersonated_without_a_service_proxy() -> None:
    # C12
    objects = render(
        **ISSUER, additionalServiceProxyArgs=["--oidc-issuer-url=x", "--enable-impersonation"]
    )
    role = objects["ClusterRole", "cluster-proxy-addon-agent-impersonator"]
    assert role["rules"] == []


def test_what_the_service_proxy_may_read() -> None:
    reads = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list", "watch"]}
    role = ("Role", "cluster-proxy-addon-agent")
    assert reads not in render()[role]["rules"]
    assert reads in service_proxied()[role]["rules"]


@pytest.mark.parametrize("args", [["--enable-impersonation"], ["--enable-impersonation=false"]])
def test_impersonation_by_argument(args: list[str]) -> None:
    # C12
    assert failure(additionalServiceProxyArgs=args) == (
        "additionalServiceProxyArgs must not set --enable-impersonation; use enableImpersonation instead"
    )


@pytest.mark.parametrize("value", ["", "yes", "TrUe"])
def test_impersonation_that_is_neither(value: str) -> None:
    assert failure(enableImpersonation=value) == "enableImpersonation must be true or false"


def test_two_issuers() -> None:
    # C12
    args = ["--oidc-issuer-url=a", "--oidc-issuer-url", "b"]
    assert failure(additionalServiceProxyArgs=args) == (
        "additionalServiceProxyArgs must set --oidc-issuer-url at most once"
    )
    assert failure(**ISSUER, additionalServiceProxyArgs=args[:1]) == (
        "configure the OIDC issuer with either oidcIssuerURL or --oidc-issuer-url in additionalServiceProxyArgs, "
        "not both"
    )


# -- other failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["serviceProxySecretCert", "serviceProxySecretKey"])
def test_a_service_proxy_without_a_certificate(missing: str) -> None:
    # C3
    assert failure(**{missing: ""}) == (
        "serviceProxySecretCert and serviceProxySecretKey must be set when enableServiceProxy is true"
    )


def test_all_that_is_wrong_is_told_at_once() -> None:
    message = failure(
        enableImpersonation="x",
        oidcClientID="c",
        includeStaticProxyAgentSecret=True,
        enableKubeApiProxy=True,
        clusterName="",
    )
    assert [problem[:20] for problem in message.split("; ")] == [
        "enableImpersonation ",
        "oidcIssuerURL and oi",
        "staticProxyAgentSecr",
        "clusterName must be ",
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("replicas", "two", "must be a whole number between 0 and 999999999, not 'two'"),
        ("replicas", -1, "must be between 0 and 999999999, not -1"),
        ("replicas", 1.5, "must be a whole number, not 1.5"),
        ("replicas", None, "is required"),
        ("serviceEntryPointPort", "0", "must be a whole number between 1 and 65535, not '0'"),
        ("serviceEntryPointPort", 65_536, "must be between 1 and 65535, not 65536"),
        ("includeNamespaceCreation", "true", "must be true or false, not 'true'"),
        ("enableServiceProxy", "on", "must be true or false, not 'on'"),
        ("networkPolicies", "x", "must be an object, not 'x'"),
        ("enableImpersonation", True, "must be a string, not True"),
        ("additionalProxyAgentArgs", "x", "must be a list, not 'x'"),
        ("base64EncodedCAData", "a b", "must be base64, not 'a b'"),
        ("agentDeploymentName", "", "is required and must not be empty"),
    ],
)
def test_values_of_the_wrong_type(name: str, value: Any, message: str) -> None:
    with pytest.raises(UnrenderableError) as caught:
        render(**{name: value})
    assert str(caught.value) == f"{name}: {message}"


@pytest.mark.parametrize("pattern", ["(", "x{99999999999}", "(?P<a>)(?P<a>)"])
def test_a_pattern_that_is_none(pattern: str) -> None:
    with pytest.raises(UnrenderableError) as caught:
        render(**{"global": {"resourceRequirements": [{"containerIDRegex": pattern}]}})
    where = "global.resourceRequirements[0].containerIDRegex"
    assert str(caught.value).startswith(f"{where}: {pattern!r} is no regular expression: ")


def test_a_pattern_that_python_may_read_otherwise_one_day() -> None:
    requirement = {"containerIDRegex": "[[]|agent$", "resources": {"limits": {"cpu": "1"}}}
    objects = render(**{"global": {"resourceRequirements": [requirement]}})
    assert {
        each["name"]: each["resources"]["limits"]["cpu"] for each in pod_of(objects)["containers"]
    } == {"proxy-agent": "1", "addon-agent": "1"}


# -- the original ----------------------------------------------------------------------------------

# What an apiserver adds to what it is given, and nothing else: what is left out of ours is the default.
PROBE = {"failureThreshold": 3, "successThreshold": 1, "timeoutSeconds": 1}
FILLED_IN: Mapping[str, Collection[str]] = {
    "spec": {
        "sessionAffinity": "None",
        "progressDeadlineSeconds": 600,
        "revisionHistoryLimit": 10,
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"},
        },
    },
    "spec.template.spec": {
        "dnsPolicy": "ClusterFirst",
        "restartPolicy": "Always",
        "schedulerName": "default-scheduler",
    },
    "spec.template.spec.containers[]": {
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
    },
    "spec.template.spec.containers[].livenessProbe": PROBE,
    "spec.template.spec.containers[].livenessProbe.httpGet": {"scheme": "HTTP"},
    "spec.template.spec.containers[].readinessProbe": PROBE,
    "spec.template.spec.containers[].readinessProbe.httpGet": {"scheme": "HTTP"},
    "spec.template.spec.containers[].env[].valueFrom.fieldRef": {"apiVersion": "v1"},
    **{
        f"spec.template.spec.volumes.{name}": {"defaultMode": 0o644}
        for name in (
            "ca.secret",
            "hub.secret",
            "hub-kubeconfig.secret",
            "service-proxy-server-cert.secret",
            "additional-service-ca.configMap",
        )
    },
}
CUSTOM = "07-custom-namespace"


def hostname() -> Case:
    return golden_case(HOSTNAME).with_service_proxy()


def port_forward() -> Case:
    return golden_case(PORT_FORWARD)


def custom_namespace() -> Case:
    """Return what a person has configured in the situation that is not in the other files."""
    spec = golden_configuration(HOSTNAME)["spec"]
    spec = {
        **spec,
        "proxyServer": {
            **spec["proxyServer"],
            "entrypoint": {
                "type": "Hostname",
                "hostname": {"value": "hub.example"},
                "port": 443,
            },
        },
        "proxyAgent": {
            "image": "quay.io/open-cluster-management/cluster-proxy:v1",
            "replicas": 2,
            "additionalArgs": ["--keepalive-time=30s"],
            "imagePullSecrets": ["ps"],
            "additionalServiceCAConfigMap": "svc-ca",
        },
    }
    configured = parse_configuration({**golden_configuration(HOSTNAME), "spec": spec})
    [config] = [
        each for each in golden_manifests(CUSTOM) if each["kind"] == "AddOnDeploymentConfig"
    ]
    case = Case().given(configuration=configured, cluster=cluster(), deployment_config=config)
    return case.with_service_proxy().told(enable_network_policies=True)


SITUATIONS = {
    "02-hub-addon": hostname,
    "03-manifests": port_forward,
    "07-hub-addon": lambda: port_forward().with_service_proxy(),
    CUSTOM: custom_namespace,
}


def rules_of(role: Object) -> dict[str, list[tuple[str, ...]]]:
    """Return what a role allows, by resource."""
    allowed: dict[str, list[tuple[str, ...]]] = {}
    for rule in role["rules"]:
        for resource in rule["resources"]:
            allowed.setdefault(resource, []).extend(
                (*rule["apiGroups"], *rule.get("resourceNames", ()), verb) for verb in rule["verbs"]
            )
    return {resource: sorted(verbs) for resource, verbs in allowed.items()}


def meaning(obj: Object) -> Object:
    """Return what of an object is the same in all installations; lists whose order means nothing by name."""
    obj = {key: value for key, value in obj.items() if key not in {"status", "type"}}
    if obj["kind"] == "Secret":
        obj["data"] = sorted(obj["data"])
    if obj["kind"] == "Namespace":
        obj.pop("spec", None)
        obj["metadata"] = {key: each for key, each in obj["metadata"].items() if key != "labels"}
    if "rules" in obj:
        obj["rules"] = rules_of(obj)
    if obj["kind"] == "Deployment":
        pod = obj["spec"]["template"]["spec"]
        # Two names of one field.
        pod["serviceAccountName"] = pod.pop("serviceAccountName", pod.pop("serviceAccount", ""))
        pod["volumes"] = {each["name"]: each for each in pod["volumes"]}
        for container in pod["containers"]:
            container["volumeMounts"] = {each["name"]: each for each in container["volumeMounts"]}
    return obj


def found(situation: str) -> set[Place]:
    theirs = {
        (obj["kind"], obj["metadata"]["name"]): meaning(obj)
        for obj in golden_manifests(situation)
        if obj["kind"] != "AddOnDeploymentConfig"
    }
    ours = {key: meaning(obj) for key, obj in SITUATIONS[situation]().objects().items()}
    return {
        (*key, path)
        for key in theirs.keys() | ours.keys()
        for path in (
            differences(theirs[key], ours[key], filled_in=FILLED_IN)
            if key in theirs and key in ours
            else {""}
        )
    }


TABLE = documented(Path(__file__).with_name("agent_differences.md"))


@pytest.mark.parametrize("situation", SITUATIONS)
def test_no_difference_is_undocumented(situation: str) -> None:
    assert found(situation) <= TABLE


def test_every_documented_difference_is_there() -> None:
    assert set().union(*map(found, SITUATIONS)) == TABLE

"""The agent's chart renders to what the manager makes of the same values, and fails where and as it does."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from agents import NAMESPACE, Case, configuration, deployment_config
from examples import examples
from helm_programs import Object, Renderer, helm, needs_helm, renderer
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterproxy.addon.agent_manifests import agent_manifests
from clusterproxy.addon.chart_values import CHART_VERSION, DEFAULTS, UnrenderableError, merge
from clusterproxy.addon_agent.config import AddonAgentConfig
from clusterproxy.agent.config import AgentConfig
from clusterproxy.cli.addon_agent import addon_agent_flags
from clusterproxy.cli.agent import agent_flags
from clusterproxy.cli.service_proxy import service_proxy_flags
from clusterproxy.service_proxy.config import ServiceProxyConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

# The first use may have to build Helm.
pytestmark = [pytest.mark.programs, needs_helm, pytest.mark.timeout(600)]

CHART = Path(__file__).parents[2] / "deploy" / "charts" / "cluster-proxy-agent"


@pytest.fixture(scope="module")
def chart() -> Iterator[Renderer]:
    with renderer(CHART) as running:
        yield running


# -- values ----------------------------------------------------------------------------------------

SWITCHES = ["1", "t", "T", "TRUE", "true", "True", "0", "f", "F", "FALSE", "false", "False"]
WORDS = st.text("abcXYZ019-._:/=,", max_size=12)
TEXTS = WORDS | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
CLAIMS = st.dictionaries(TEXTS, TEXTS, max_size=3).map(json.dumps)
MAPS = st.dictionaries(TEXTS, TEXTS, max_size=3)
SWITCH = st.booleans() | st.sampled_from([*SWITCHES, ""])
BASE64 = st.sampled_from(["", "Zm9v", "Zm9vCg=="])
ARGUMENTS = st.lists(
    TEXTS
    | st.sampled_from(
        [
            "--oidc-issuer-url",
            "--oidc-issuer-url=",
            "--oidc-issuer-url=https://i",
            "--oidc-issuer-urls=x",
            "--enable-impersonation",
            "--enable-impersonation=true",
        ]
    ),
    max_size=3,
)
TOLERATION = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("key", "operator", "value", "effect"), TEXTS | st.none()),
        "tolerationSeconds": st.integers(-5, 2**40),
    },
)
CONTAINERS = ("proxy-agent", "addon-agent", "service-proxy")
REQUIREMENT = st.fixed_dictionaries(
    {
        "containerIDRegex": st.sampled_from(
            [
                "^.+:.+:.+$",
                "^deployments:.+:.+$",
                "x",
                *(f"^deployments:cluster-proxy-proxy-agent:{name}$" for name in CONTAINERS),
            ]
        )
    },
    optional={
        "resources": st.fixed_dictionaries(
            {},
            optional={
                "requests": st.dictionaries(WORDS, WORDS, max_size=3),
                "limits": st.dictionaries(WORDS, st.integers(0, 9), max_size=3),
            },
        )
    },
)

RIGHT: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(
        (
            "additionalServiceCAConfigMap",
            "agentIdentifiers",
            "clusterName",
            "digest",
            "image",
            "oidcCAConfigMap",
            "oidcClientID",
            "oidcGroupsClaim",
            "oidcGroupsPrefix",
            "oidcIssuerURL",
            "oidcUsernameClaim",
            "oidcUsernamePrefix",
            "proxyAgentImage",
            "registry",
            "serviceDomain",
            "serviceEntryPoint",
            "serviceProxyHost",
            "spokeAddonNamespace",
            "tag",
            "unknown",
        ),
        TEXTS,
    ),
    **dict.fromkeys(
        ("additionalProxyAgentArgs", "addonAgentArgs", "proxyAgentImagePullSecrets"),
        st.lists(TEXTS, max_size=3),
    ),
    **dict.fromkeys(
        (
            "base64EncodedCAData",
            "serviceProxySecretCert",
            "serviceProxySecretKey",
            "staticProxyAgentSecretCert",
            "staticProxyAgentSecretKey",
        ),
        BASE64,
    ),
    **dict.fromkeys(
        ("enableKubeApiProxy", "enableServiceProxy", "includeStaticProxyAgentSecret"), SWITCH
    ),
    "additionalServiceProxyArgs": ARGUMENTS,
    "agentDeploymentAnnotations": MAPS,
    "agentDeploymentName": TEXTS.filter(bool),
    "enableImpersonation": st.sampled_from(SWITCHES) | WORDS,
    "global": st.fixed_dictionaries(
        {}, optional={"resourceRequirements": st.lists(REQUIREMENT, max_size=4)}
    ),
    "includeNamespaceCreation": st.booleans(),
    "networkPolicies": st.fixed_dictionaries({}, optional={"enabled": st.booleans()}),
    "nodeSelector": MAPS,
    "oidcRequiredClaimsJSON": CLAIMS
    | WORDS
    | st.sampled_from(
        [
            "",
            "null",
            "[]",
            "{",
            '"x"',
            '{"a": 1}',
            '{"a": null}',
            '{"a": {}}',
            '{"Error": "b"}',
            '{"a": "b"}, {"c": "d"}',
            '{"a": "b"}, "v": 1',
            '{"a": NaN}',
            ' {"b": "\\ud800", "a": "<&>", "b": "2"} ',
        ]
    ),
    "oidcReservedNamePrefixes": st.sampled_from(["", "system:", "a,b"])
    | st.lists(TEXTS.filter(bool), max_size=3),
    "oidcSigningAlgs": TEXTS | st.lists(TEXTS, max_size=3),
    "proxyConfig": st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"), TEXTS | st.none())
    ),
    "replicas": st.integers(0, 999_999_999) | st.sampled_from(["0", "7", "100000000", 2.0]),
    "serviceEntryPointPort": st.integers(1, 65_535) | st.sampled_from(["1", "443", "65535"]),
    "servicesToExpose": st.lists(
        st.fixed_dictionaries({"Host": TEXTS.filter(bool), "ExternalName": TEXTS.filter(bool)}),
        max_size=2,
        unique_by=lambda service: service["Host"],
    ),
    "tolerations": st.lists(TOLERATION, max_size=3),
}
# Where values are put over, so that not all sets of them fail.
SERVICE_PROXY = {
    "enableServiceProxy": True,
    "serviceProxySecretCert": "Zm9v",
    "serviceProxySecretKey": "Zm9v",
    "enableImpersonation": "false",
}
ISSUER = {**SERVICE_PROXY, "oidcIssuerURL": "https://i", "oidcClientID": "c"}
ALL = {
    **ISSUER,
    "includeStaticProxyAgentSecret": True,
    "staticProxyAgentSecretCert": "Zm9v",
    "staticProxyAgentSecretKey": "Zm9v",
    "oidcRequiredClaimsJSON": '{"b": "<1>", "a": "2=\\u00e9\\n"}',
    "oidcSigningAlgs": ["ES256", "RS256"],
    "global": {
        "resourceRequirements": [
            {"containerIDRegex": ".*", "resources": {"requests": {"cpu": "1"}}},
            {"containerIDRegex": "proxy$", "resources": {"limits": {"memory": 1000000}}},
        ]
    },
}
REQUIRED = (
    "agentDeploymentName",
    "oidcReservedNamePrefixes",
    "replicas",
    "serviceEntryPointPort",
)
VALUES = st.builds(
    merge,
    st.sampled_from([{}, SERVICE_PROXY, ISSUER, ALL]),
    st.fixed_dictionaries(
        {},
        optional={
            name: strategy if name in REQUIRED else strategy | st.none()
            for name, strategy in RIGHT.items()
        },
    ),
)
NAMESPACES = st.sampled_from(
    [
        "open-cluster-management-agent-addon",
        "open-cluster-management-cluster-proxy",
        "123",
        "true",
    ]
)

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 70_000)
    | st.sampled_from([1.5, 2_000_000_000, "x", "-1", "01", "65536", "a,,b", ","]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=4,
)


# -- comparison ------------------------------------------------------------------------------------


def without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_null(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_null(each) for each in value]
    return value


def by_name(objects: list[Object]) -> dict[tuple[str, str], Object]:
    found = {(each["kind"], each["metadata"]["name"]): without_null(each) for each in objects}
    assert len(found) == len(objects)
    return found


def ours(values: Object, namespace: str) -> list[Object]:
    return [obj for _, obj in agent_manifests(merge(DEFAULTS, values), namespace)]


def named(problems: str) -> set[str]:
    """Return the values that Helm's validation complains about."""
    missing = re.findall(r"at '': missing propert(?:y|ies) (.+)", problems)
    return {*re.findall(r"at '/(\w+)", problems), *re.findall(r"'(\w+)'", " ".join(missing))}


# -- tests -----------------------------------------------------------------------------------------


def check(chart: Renderer, values: Object, namespace: str) -> None:
    theirs = chart.render(values, namespace)
    try:
        objects = ours(values, namespace)
    except UnrenderableError as caught:
        error = caught
    else:
        assert theirs.error == ""
        assert by_name(theirs.objects) == by_name(objects)
        return
    if wrong_types := named(theirs.error):
        assert {re.split(r"\W", problem)[0] for problem in error.problems} == wrong_types
    else:
        assert theirs.error.endswith(f": {error}")


MANY = settings(max_examples=examples(500), deadline=None)


@MANY
@given(values=VALUES, namespace=NAMESPACES)
def test_the_same_objects_and_failures(chart: Renderer, values: Object, namespace: str) -> None:
    check(chart, values, namespace)


@MANY
@given(values=st.dictionaries(st.sampled_from([*RIGHT]), JUNK, min_size=1, max_size=2))
def test_values_of_the_wrong_type(chart: Renderer, values: Object) -> None:
    check(chart, values, "ns")


# -- the programs ----------------------------------------------------------------------------------

ADDRESS = {"type": "Hostname", "hostname": {"value": "hub.example"}, "port": 443}
GROUPS = "--hub-group-mapping=system:masters="
OIDC = {
    "oidcIssuerURL": "https://issuer.example",
    "oidcClientID": "kubectl",
    "oidcUsernameClaim": "email",
    "oidcUsernamePrefix": "oidc:",
    "oidcGroupsClaim": "groups",
    "oidcGroupsPrefix": "oidc:",
    "oidcReservedNamePrefixes": "system:,cluster:",
    "oidcSigningAlgs": "RS256,ES256",
    "oidcCAConfigMap": "issuer",
    "oidcRequiredClaimsJSON": '{"hd": "example"}',
}


def told(values: Object) -> Case:
    variables = [{"name": name, "value": value} for name, value in values.items()]
    return Case().given(deployment_config=deployment_config(customizedVariables=variables))


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case().with_service_proxy(),
        Case().given(
            configuration=configuration(
                deploy={"ports": {"agentServer": 9091}},
                proxyServer={"entrypoint": {"type": "PortForward", "port": 9443}},
                proxyAgent={"additionalArgs": ["--v=4", "--keepalive-time=30s"]},
            )
        ),
        Case()
        .given(
            configuration=configuration(
                proxyServer={"entrypoint": ADDRESS},
                proxyAgent={
                    "additionalServiceProxyArgs": [GROUPS, "--authenticate-services"],
                    "additionalServiceCAConfigMap": "services",
                },
            )
        )
        .with_service_proxy(),
        told(OIDC).with_service_proxy(),
        told({**OIDC, "enableImpersonation": "false"}).with_service_proxy(),
    ],
    ids=["defaults", "service proxy", "port forward", "arguments", "issuer", "issuer only"],
)
def test_the_programs_take_what_they_are_told(chart: Renderer, case: Case) -> None:
    """What the flags of each container say, read as the program reads it, beside what is around it."""
    rendered = chart.render(case.values(), NAMESPACE)
    assert rendered.error == ""
    [deployment] = (each for each in rendered.objects if each["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    containers = {each["name"]: each for each in pod["containers"]}
    for each in containers.values():
        mounted = {mount["mountPath"].rstrip("/") for mount in each["volumeMounts"]}
        files = [PurePosixPath(arg.partition("=")[2]) for arg in each["args"] if "=/" in arg]
        assert all(str(file.parent) in mounted for file in files)
    ready = agent_flags()
    agent = AgentConfig(
        **ready.parse(containers["proxy-agent"]["args"]).fields(ready), proxy_environment={}
    )
    assert {agent.agent_cert, agent.agent_key, agent.ca_cert} == {
        "/etc/tls/tls.crt",
        "/etc/tls/tls.key",
        "/etc/ca/ca.crt",
    }
    addon = addon_agent(containers["addon-agent"])
    # It answers for the proxy agent, and asks it.
    probe = containers["proxy-agent"]["livenessProbe"]["httpGet"]
    assert addon.health_address == ("", probe["port"])
    assert addon.proxy_agent_address[1] == agent.health_server_port
    if addon.enable_port_forward_proxy:
        assert f"{agent.proxy_server_host}:{agent.proxy_server_port}" == (
            f"127.0.0.1:{addon.port_forward_port}"
        )
    if "service-proxy" not in containers:
        return
    proxy = service_proxy(containers["service-proxy"])
    for kind in ("livenessProbe", "readinessProbe"):
        assert containers["service-proxy"][kind]["httpGet"]["port"] == proxy.health_port
    assert pod["terminationGracePeriodSeconds"] > proxy.drain_timeout_s
    assert_rights(rendered.objects, proxy)


def addon_agent(container: Object) -> AddonAgentConfig:
    assert container["command"] == ["/agent"]
    flags = addon_agent_flags()
    [environment] = container["env"]
    assert environment["name"] == "POD_NAMESPACE"
    told = flags.parse(container["args"]).fields(flags)
    config = AddonAgentConfig(**told, pod_namespace=NAMESPACE)
    config.validate()
    return config


def service_proxy(container: Object) -> ServiceProxyConfig:
    flags = service_proxy_flags()
    [environment] = container["env"]
    assert environment["name"] == "POD_NAMESPACE"
    [command, *arguments] = container["args"]
    assert [*container["command"], command] == ["/cluster-proxy", "service-proxy"]
    parsed = flags.parse(arguments)
    assert not parsed.arguments
    config = ServiceProxyConfig(**parsed.fields(flags), pod_namespace=NAMESPACE, given=parsed.given)
    config.validate()
    return config


def assert_rights(objects: list[Object], proxy: ServiceProxyConfig) -> None:
    """The account has what the service proxy and the add-on agent need, and nothing else."""
    rules = {
        (each["kind"], group, resource): (rule["verbs"], rule.get("resourceNames"))
        for each in objects
        if each["kind"] in {"Role", "ClusterRole"}
        for rule in each["rules"]
        for group in rule["apiGroups"]
        for resource in (f"{name} {' '.join(rule['verbs'])}" for name in rule["resources"])
    }
    reads, keeps = ["get", "list", "watch"], ["get", "update", "patch"]
    leases = "coordination.k8s.io"
    wanted: dict[tuple[str, str, str], tuple[list[str], list[str] | None]] = {
        ("Role", leases, "leases create"): (["create"], None),
        ("Role", leases, "leases get update patch"): (keeps, ["cluster-proxy"]),
        ("Role", "", "configmaps get list watch"): (reads, None),
        ("ClusterRole", "authentication.k8s.io", "tokenreviews create"): (["create"], None),
    }
    if proxy.enable_impersonation or proxy.oidc is not None:
        for who in ("users", "groups"):
            wanted["ClusterRole", "", f"{who} impersonate"] = (["impersonate"], None)
    assert rules == wanted


# -- the rest --------------------------------------------------------------------------------------


def test_a_pattern_that_is_none(chart: Renderer) -> None:
    values = {"global": {"resourceRequirements": [{"containerIDRegex": "("}]}}
    assert "containerIDRegex" in chart.render(values, "ns").error
    with pytest.raises(UnrenderableError, match="containerIDRegex: '\\(' is no regular expression"):
        ours(values, "ns")


def test_the_defaults_are_those_of_the_chart() -> None:
    assert yaml.safe_load((CHART / "values.yaml").read_text()) == DEFAULTS
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (about["name"], about["version"]) == ("cluster-proxy-agent-only", CHART_VERSION)


def test_every_value_has_a_rule() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["properties"].keys() == DEFAULTS.keys() == RIGHT.keys() - {"unknown"}


def test_helm_finds_nothing_wrong_with_the_chart() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


def test_helm_itself_renders_the_same() -> None:
    name = "open-cluster-management-cluster-proxy"
    done = helm("template", "cluster-proxy", str(CHART), "--namespace", name)
    assert done.returncode == 0, done.stderr
    objects = [each for each in yaml.safe_load_all(done.stdout) if each is not None]
    assert by_name(objects) == by_name(ours({}, name))


def test_helm_itself_says_what_is_wrong() -> None:
    done = helm("template", str(CHART), "--set", "enableServiceProxy=true")
    assert done.returncode != 0
    assert "serviceProxySecretCert and serviceProxySecretKey must be set" in done.stderr
    done = helm("template", str(CHART), "--set-string", "replicas=many")
    assert done.returncode != 0
    assert "at '/replicas'" in done.stderr

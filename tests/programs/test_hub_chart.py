"""The hub's chart: what it makes of which values, and that this fits together and with the programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from chart_snapshots import FOLDER, SNAPSHOTS, snapshot
from examples import examples
from helm_programs import Object, Renderer, helm, needs_helm, renderer
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterproxy.addon.config import ControllersConfig, ManagerConfig
from clusterproxy.addon.configuration import (
    PROXY_SERVER_CA_SECRET,
    USER_SERVER_SECRET,
    EntrypointType,
    SecretNames,
    parse_configuration,
)
from clusterproxy.addon.proxy_deployment import SELECTOR, proxy_deployment
from clusterproxy.cli.addon_manager import manager_flags
from clusterproxy.cli.controllers import controllers_flags
from clusterproxy.cli.server import server_flags
from clusterproxy.cli.user_server import user_server_flags
from clusterproxy.kube.tls_profile import CONFIG_MAP as TLS_PROFILE
from clusterproxy.user_server.config import UserServerConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

# The first use may have to build Helm.
pytestmark = [pytest.mark.programs, needs_helm, pytest.mark.timeout(600)]

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "charts" / "cluster-proxy"
ABOUT = yaml.safe_load((CHART / "Chart.yaml").read_text())
TAG = f"v{ABOUT['version']}"
NAMESPACE = "open-cluster-management-addon"
MANAGER, USER = "cluster-proxy-addon-manager", "cluster-proxy-addon-user"
ROLE = "open-cluster-management:cluster-proxy:addon-manager"

Found = dict[tuple[str, str], Object]


@pytest.fixture(scope="module")
def chart() -> Iterator[Renderer]:
    with renderer(CHART) as running:
        yield running


def render(chart: Renderer, namespace: str = NAMESPACE, /, **values: Any) -> Found:
    rendered = chart.render(values, namespace)
    assert rendered.error == ""
    found = {(each["kind"], each["metadata"]["name"]): each for each in rendered.objects}
    assert len(found) == len(rendered.objects), "two objects of one name"
    return found


def failure(chart: Renderer, **values: Any) -> str:
    return chart.render(values, NAMESPACE).error


def container(found: Found, deployment: str, name: str) -> Object:
    pod = found["Deployment", deployment]["spec"]["template"]["spec"]
    [container] = (each for each in pod["containers"] if each["name"] == name)
    assert isinstance(container, dict)
    return container


def images(found: Found) -> dict[str, str]:
    """Return all images by what runs them."""
    configuration = found["ManagedProxyConfiguration", "cluster-proxy"]["spec"]
    return {
        **{part: configuration[part]["image"] for part in ("proxyServer", "proxyAgent")},
        **{
            each["name"]: each["image"]
            for (kind, _), obj in found.items()
            if kind == "Deployment"
            for each in obj["spec"]["template"]["spec"]["containers"]
        },
    }


# -- group I of the conformance list ---------------------------------------------------------------

ALWAYS = {
    ("ServiceAccount", "cluster-proxy"),
    ("ServiceAccount", MANAGER),
    ("ClusterRole", ROLE),
    ("ClusterRoleBinding", ROLE),
    ("Role", ROLE),
    ("RoleBinding", ROLE),
    ("Deployment", MANAGER),
    ("ManagedProxyConfiguration", "cluster-proxy"),
    ("ClusterManagementAddOn", "cluster-proxy"),
}
PLACED = {("Placement", "cluster-proxy-placement"), ("ManagedClusterSetBinding", "global")}
WITH_USER = {
    ("ServiceAccount", USER),
    ("Role", USER),
    ("RoleBinding", USER),
    ("Deployment", USER),
    ("Service", USER),
}


def test_i1_defaults(chart: Renderer) -> None:
    found = render(chart)
    assert found.keys() == ALWAYS | PLACED
    entrypoint = found["ManagedProxyConfiguration", "cluster-proxy"]["spec"]["proxyServer"]
    assert entrypoint["entrypoint"] == {"type": "PortForward", "port": 8091}
    addon = found["ClusterManagementAddOn", "cluster-proxy"]
    assert addon["apiVersion"] == "addon.open-cluster-management.io/v1beta1"
    [placement] = addon["spec"]["installStrategy"]["placements"]
    assert placement == {"name": "cluster-proxy-placement", "namespace": NAMESPACE}


@pytest.mark.parametrize("balanced", [True, False])
def test_i2_the_address_wins(chart: Renderer, balanced: bool) -> None:
    server = {"entrypointAddress": "hub.example", "entrypointLoadBalancer": balanced, "port": 443}
    found = render(chart, proxyServer=server)["ManagedProxyConfiguration", "cluster-proxy"]
    assert found["spec"]["proxyServer"]["entrypoint"] == {
        "type": "Hostname",
        "hostname": {"value": "hub.example"},
        "port": 443,
    }


def test_i2_the_load_balancer(chart: Renderer) -> None:
    found = render(chart, proxyServer={"entrypointLoadBalancer": True})
    configuration = found["ManagedProxyConfiguration", "cluster-proxy"]
    assert configuration["spec"]["proxyServer"]["entrypoint"] == {
        "type": "LoadBalancerService",
        "loadBalancerService": {},
        "port": 8091,
    }


@pytest.mark.parametrize("given", [{"placementNamespace": "there"}, {}])
def test_i3_a_placement_of_ones_own(chart: Renderer, given: Object) -> None:
    found = render(chart, installByPlacement={"placementName": "mine", **given})
    assert found.keys() == ALWAYS
    strategy = found["ClusterManagementAddOn", "cluster-proxy"]["spec"]["installStrategy"]
    # As in the original, it is the release's if none is said.
    namespace = given.get("placementNamespace", NAMESPACE)
    assert strategy["placements"] == [{"name": "mine", "namespace": namespace}]


def test_i3_a_namespace_without_a_placement(chart: Renderer) -> None:
    found = render(chart, installByPlacement={"placementNamespace": "there"})
    assert found.keys() == ALWAYS | PLACED
    placement = found["Placement", "cluster-proxy-placement"]["metadata"]
    strategy = found["ClusterManagementAddOn", "cluster-proxy"]["spec"]["installStrategy"]
    assert strategy["placements"] == [{key: placement[key] for key in ("name", "namespace")}]


def test_i4_the_user_server(chart: Renderer) -> None:
    found = render(chart, enableServiceProxy=True)
    assert found.keys() == ALWAYS | PLACED | WITH_USER
    assert "--enable-service-proxy=true" in container(found, MANAGER, "manager")["args"]
    assert "userServer" not in found["ManagedProxyConfiguration", "cluster-proxy"]["spec"]


@pytest.mark.parametrize(("sans", "spec"), [([], {}), (["u.example"], {"additionalSANs": ["u.example"]})])  # fmt: skip
def test_i4_its_certificate(chart: Renderer, sans: list[str], spec: Object) -> None:
    found = render(chart, userServer={"enabled": True, "additionalSANs": sans})
    assert found["ManagedProxyConfiguration", "cluster-proxy"]["spec"]["userServer"] == spec
    assert found.keys() == ALWAYS | PLACED


def test_i4_exposed_services(chart: Renderer) -> None:
    services: list[Object] = [
        {"namespace": "default", "service": "hello", "port": 8000, "protocol": "http"},
        {"namespace": "default", "service": "hello-https", "port": "8443", "protocol": "https"},
        {"namespace": "123", "service": "true"},
    ]
    assert not any(kind == "ConfigMap" for kind, _ in render(chart, exposedServices=services))
    found = render(
        chart,
        enableServiceProxy=True,
        exposedServices=services,
        exposedServicesConfigMapName="mine",
    )
    assert found.keys() == ALWAYS | PLACED | WITH_USER | {("ConfigMap", "mine")}
    data = found["ConfigMap", "mine"]["data"]
    assert data.keys() == {"services"}
    services[0]["port"] = "8000"
    assert yaml.safe_load(data["services"]) == services
    args = container(found, USER, "user-server")["args"]
    assert "--exposed-services-configmap=mine" in args
    assert "mine" in found["Role", USER]["rules"][0]["resourceNames"]


@pytest.mark.parametrize("name", ["", None])
def test_i4_the_usual_name_of_the_list(chart: Renderer, name: str | None) -> None:
    """The original's releases up to v0.11.0 have no name for it, and --reuse-values brings that along."""
    services = [{"namespace": "default", "service": "hello"}]
    found = render(
        chart,
        enableServiceProxy=True,
        exposedServices=services,
        exposedServicesConfigMapName=name,
    )
    usual = "cluster-proxy-exposed-services"
    assert yaml.safe_load(found["ConfigMap", usual]["data"]["services"]) == services
    assert f"--exposed-services-configmap={usual}" in container(found, USER, "user-server")["args"]
    assert usual in found["Role", USER]["rules"][0]["resourceNames"]


@pytest.mark.parametrize("mode", ["enforce", "warn", "", None])
def test_services_that_are_not_exposed(chart: Renderer, mode: str | None) -> None:
    found = render(chart, enableServiceProxy=True, userServer={"exposedServicesMode": mode})
    args = container(found, USER, "user-server")["args"]
    # The original's program does not know the flag.
    modes = [each for each in args if each.startswith("--exposed-services-mode")]
    assert modes == (["--exposed-services-mode=warn"] if mode == "warn" else [])


def test_i5_no_impersonation(chart: Renderer) -> None:
    text = json.dumps(list(render(chart, enableImpersonation=False).values()))
    assert "tokenreviews" not in text
    assert "clusterroles" not in text


def test_i6_images(chart: Renderer) -> None:
    user = {"enableServiceProxy": True}
    assert set(images(render(chart, **user)).values()) == {f"cluster-proxy:{TAG}"}
    found = render(chart, registry="registry.example/team", **user)
    assert set(images(found).values()) == {f"registry.example/team/cluster-proxy:{TAG}"}
    found = render(
        chart,
        registry="r",
        image="i",
        tag="t",
        proxyServerImage="s/server",
        proxyAgentImage="a/agent",
        **user,
    )
    assert images(found) == {
        "manager": "r/i:t",
        "controllers": "r/i:t",
        "user-server": "r/i:t",
        "proxyServer": "s/server:t",
        "proxyAgent": "a/agent:t",
    }
    assert "--agent-image=r/i:t" in container(found, USER, "controllers")["args"]


@pytest.mark.parametrize(
    ("value", "image"),
    [
        ("r.example/a:v1", "r.example/a:v1"),
        ("r.example:5000/a:v1", "r.example:5000/a:v1"),
        ("r.example:5000/a", "r.example:5000/a:t"),
        (f"r.example/a@sha256:{'0' * 64}", f"r.example/a@sha256:{'0' * 64}"),
    ],
)
def test_i6_images_with_tags_of_their_own(chart: Renderer, value: str, image: str) -> None:
    found = images(render(chart, tag="t", proxyServerImage=value, proxyAgentImage=value))
    assert (found["proxyServer"], found["proxyAgent"], found["manager"]) == (
        image,
        image,
        "cluster-proxy:t",
    )


def test_i7_network_policies(chart: Renderer) -> None:
    def policies(**values: Any) -> set[str]:
        found = render(chart, networkPolicies={"enabled": True}, **values)
        assert "--enable-network-policies=true" in container(found, MANAGER, "manager")["args"]
        return {name for kind, name in found if kind == "NetworkPolicy"}

    two = {f"{MANAGER}-network-policy", "cluster-proxy-proxy-server-network-policy"}
    assert policies() == two
    assert policies(enableServiceProxy=True) == two | {f"{USER}-network-policy"}


def ports(rules: list[Object]) -> list[tuple[str, int]]:
    return [(port["protocol"], port["port"]) for rule in rules for port in rule["ports"]]


def test_i7_what_they_let_through(chart: Renderer) -> None:
    everywhere = [
        *((protocol, port) for port in (53, 5353) for protocol in ("UDP", "TCP")),
        ("TCP", 443),
        ("TCP", 6443),
    ]
    found = render(chart, networkPolicies={"enabled": True}, enableServiceProxy=True)
    policies = {name: obj["spec"] for (kind, name), obj in found.items() if kind == "NetworkPolicy"}
    manager, user, server = (
        policies[f"{name}-network-policy"] for name in (MANAGER, USER, "cluster-proxy-proxy-server")
    )
    assert all(each["policyTypes"] == ["Ingress", "Egress"] for each in policies.values())
    assert ports(manager["ingress"]) == []
    assert ports(manager["egress"]) == ports(server["egress"]) == everywhere
    assert ports(user["ingress"]) == [("TCP", 9092)]
    assert ports(user["egress"]) == [*everywhere, ("TCP", 8090)]
    assert user["egress"][-1]["to"] == [{"podSelector": {"matchLabels": SELECTOR}}]
    assert ports(server["ingress"]) == [("TCP", 8090), ("TCP", 8091), ("TCP", 8090)]
    assert server["ingress"][-1]["from"] == [{"podSelector": user["podSelector"]}]


def test_i7_monitors_are_let_through(chart: Renderer) -> None:
    switched_on = {"networkPolicies": {"enabled": True}, "serviceMonitor": {"enabled": True}}
    found = render(chart, enableServiceProxy=True, **switched_on)
    pods = {name: name for name in (MANAGER, USER, "cluster-proxy-proxy-server")}
    for name, of in {**pods, "cluster-proxy-user-server": USER}.items():
        [metrics] = found["Service", f"{name}-metrics"]["spec"]["ports"]
        policy = found["NetworkPolicy", f"{of}-network-policy"]["spec"]
        assert ("TCP", metrics["targetPort"]) in ports(policy["ingress"])


# -- rights ----------------------------------------------------------------------------------------


def in_namespace(obj: Object, namespace: str) -> Object:
    for each in (obj["metadata"], *obj.get("subjects", ())):
        if "namespace" in each:
            each["namespace"] = namespace
    return obj


def manifest(namespace: str) -> Found:
    """Return deploy/manager/rbac.yaml as objects."""
    objects = yaml.safe_load_all((DEPLOY / "manager" / "rbac.yaml").read_text())
    return {
        (each["kind"], each["metadata"]["name"]): in_namespace(each, namespace) for each in objects
    }


def test_the_managers_rights_are_those_of_the_manifest(chart: Renderer) -> None:
    found = render(chart, "123", featureGates={"clusterProfile": True})
    wanted = manifest("123")
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("impersonation", [True, False])
@pytest.mark.parametrize("profiles", [True, False])
def test_rights_that_are_switched_off(chart: Renderer, impersonation: bool, profiles: bool) -> None:
    found = render(
        chart, enableImpersonation=impersonation, featureGates={"clusterProfile": profiles}
    )
    for key, obj in manifest(NAMESPACE).items():
        if "rules" in obj:
            obj["rules"] = [
                rule
                for rule in obj["rules"]
                if (impersonation or not {"clusterroles", "tokenreviews"} & {*rule["resources"]})
                and (profiles or "multicluster.x-k8s.io" not in rule["apiGroups"])
            ]
        assert found[key] == obj


def test_accounts_and_tokens(chart: Renderer) -> None:
    found = render(chart, enableServiceProxy=True)
    bound = {
        (subject["name"], name)
        for (kind, name), obj in found.items()
        if kind.endswith("RoleBinding")
        for subject in obj["subjects"]
    }
    assert bound == {(MANAGER, ROLE), (USER, USER)}
    assert found["ServiceAccount", "cluster-proxy"]["automountServiceAccountToken"] is False
    for name in (MANAGER, USER):
        pod = found["Deployment", name]["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] == name


@pytest.mark.parametrize(
    ("copy", "original"),
    [
        ("files/manager-rbac.yaml", "manager/rbac.yaml"),
        (
            "crds/managedproxyconfigurations.yaml",
            "crds/managedproxyconfigurations.yaml",
        ),
    ],
)
def test_what_the_chart_has_a_copy_of(copy: str, original: str) -> None:
    same = (CHART / copy).read_text() == (DEPLOY / original).read_text()
    assert same, f"cp deploy/{original} deploy/charts/cluster-proxy/{copy}"


# -- what is not in the original's chart -----------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "budgets"),
    [
        ({"replicas": 1}, set()),
        ({"replicas": 2}, {MANAGER, "cluster-proxy-proxy-server"}),
        (
            {"replicas": 3, "enableServiceProxy": True},
            {MANAGER, "cluster-proxy-proxy-server", USER},
        ),
        ({"replicas": 2, "podDisruptionBudget": {"enabled": False}}, set()),
    ],
)
def test_budgets(chart: Renderer, values: Object, budgets: set[str]) -> None:
    found = render(chart, **values)
    assert {name for kind, name in found if kind == "PodDisruptionBudget"} == budgets


def test_the_ingress(chart: Renderer) -> None:
    ingress = {
        "enabled": True,
        "className": "nginx",
        "annotations": {"nginx.ingress.kubernetes.io/backend-protocol": "HTTPS"},
        "host": "clusters.example",
        "tlsSecretName": "clusters-tls",
    }
    found = render(chart, enableServiceProxy=True, userServer={"ingress": ingress})["Ingress", USER]
    assert found["metadata"]["annotations"] == ingress["annotations"]
    assert found["spec"] == {
        "ingressClassName": "nginx",
        "rules": [
            {
                "host": "clusters.example",
                "http": {
                    "paths": [
                        {
                            "path": "/",
                            "pathType": "Prefix",
                            "backend": {"service": {"name": USER, "port": {"name": "https"}}},
                        }
                    ]
                },
            }
        ],
        "tls": [{"hosts": ["clusters.example"], "secretName": "clusters-tls"}],
    }


def test_the_monitor(chart: Renderer) -> None:
    monitor = {"enabled": True, "interval": "1m", "labels": {"release": "prometheus"}}
    found = render(chart, serviceMonitor=monitor)
    metrics = {name for kind, name in found if kind == "Service"}
    assert metrics == {f"{MANAGER}-metrics", "cluster-proxy-proxy-server-metrics"}
    made = found["ServiceMonitor", "cluster-proxy"]
    assert made["metadata"]["labels"] == {"release": "prometheus"}
    [endpoint] = made["spec"]["endpoints"]
    assert endpoint == {"port": "metrics", "path": "/metrics", "interval": "1m"}


def test_where_pods_run(chart: Renderer) -> None:
    tolerations = [{"key": "infra", "operator": "Exists", "effect": "NoSchedule"}]
    found = render(
        chart,
        enableServiceProxy=True,
        nodeSelector={"disk": "ssd"},
        tolerations=tolerations,
        imagePullSecrets=["pull"],
    )
    for name in (MANAGER, USER):
        pod = found["Deployment", name]["spec"]["template"]["spec"]
        assert pod["nodeSelector"] == {"disk": "ssd"}
        assert pod["tolerations"] == tolerations
        assert pod["imagePullSecrets"] == [{"name": "pull"}]
    account = found["ServiceAccount", "cluster-proxy"]
    assert account["imagePullSecrets"] == [{"name": "pull"}], "the manager hands them on"


def test_arguments_of_proxy_servers(chart: Renderer) -> None:
    found = render(chart, proxyServer={"additionalArgs": ["--v=4"]})
    server = found["ManagedProxyConfiguration", "cluster-proxy"]["spec"]["proxyServer"]
    assert server["additionalArgs"] == ["--v=4"]


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        (None, "verify"),
        (["--keepalive-time=30s"], "verify"),
        (["--agent-identity=require"], "require"),
        (["--agent-identity=off"], "off"),
    ],
)
def test_what_agents_may_claim(chart: Renderer, arguments: list[str] | None, mode: str) -> None:
    """Arguments of one's own leave the default, which is in the Deployment that the manager makes."""
    found = render(chart, proxyServer={"additionalArgs": arguments})
    configuration = parse_configuration(found["ManagedProxyConfiguration", "cluster-proxy"])
    made = proxy_deployment(configuration, "VersionTLS12", (), "IfNotPresent")
    [server] = made["spec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each["value"] for each in server["env"]}
    flags = server_flags(agent_identity=environment["PROXY_SERVER_AGENT_IDENTITY"])
    assert flags.parse(server["args"]).fields(flags)["agent_identity"] == mode


def on_a_cluster_with(*versions: str) -> Object:
    """Return the ClusterManagementAddOn where the add-on API has these versions."""
    given = [f"--api-versions=addon.open-cluster-management.io/{each}" for each in versions]
    done = helm("template", "cluster-proxy", str(CHART), "--namespace", NAMESPACE, *given)
    assert done.returncode == 0, done.stderr
    objects = [each for each in yaml.safe_load_all(done.stdout) if each]
    [addon] = (each for each in objects if each["kind"] == "ClusterManagementAddOn")
    assert isinstance(addon, dict)
    return addon


@pytest.mark.parametrize("versions", [("v1beta1",), ("v1alpha1", "v1beta1")])
def test_the_newer_version_of_the_addon_api(versions: tuple[str, ...]) -> None:
    addon = on_a_cluster_with(*versions)
    assert addon["apiVersion"].endswith("/v1beta1")
    [config] = addon["spec"]["defaultConfigs"]
    assert config == {
        "group": "proxy.open-cluster-management.io",
        "resource": "managedproxyconfigurations",
        "name": "cluster-proxy",
    }


def test_the_older_version_of_the_addon_api() -> None:
    addon = on_a_cluster_with("v1alpha1")
    assert addon["apiVersion"].endswith("/v1alpha1")
    assert "defaultConfigs" not in addon["spec"]
    # As the original's chart had it up to v0.10.0.
    assert addon["spec"]["supportedConfigs"] == [
        {
            "group": "proxy.open-cluster-management.io",
            "resource": "managedproxyconfigurations",
            "defaultConfig": {"name": "cluster-proxy"},
        },
        {"group": "addon.open-cluster-management.io", "resource": "addondeploymentconfigs"},
    ]
    assert addon["spec"]["installStrategy"]["type"] == "Placements"


# -- values that are wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": "many"}, "at '/replicas': 'many' does not match pattern"),
        ({"replicas": -1}, "at '/replicas': minimum: got -1, want 0"),
        ({"replicas": None}, "missing property 'replicas'"),
        ({"image": ""}, "at '/image': minLength"),
        ({"tag": 1.5}, "at '/tag': got number, want null or string"),
        ({"enableServiceProxy": "yes"}, "at '/enableServiceProxy': 'yes' does not match pattern"),
        ({"proxyServer": {"port": 0}}, "at '/proxyServer/port': minimum: got 0, want 1"),
        ({"proxyServer": {"port": 65_536}}, "at '/proxyServer/port': maximum"),
        ({"proxyServer": {"hostname": "x"}}, "additional properties 'hostname' not allowed"),
        ({"proxyServer": {"imagePullPolicy": "Sometimes"}}, "'Always', 'IfNotPresent', 'Never'"),
        ({"userServer": {"additionalSANs": "x"}}, "at '/userServer/additionalSANs': got string"),
        ({"userServer": True}, "at '/userServer': got boolean, want null or object"),
        (
            {"userServer": {"exposedServicesMode": "off"}},
            "at '/userServer/exposedServicesMode': value must be one of 'enforce', 'warn'",
        ),
        ({"exposedServices": [{"service": "x"}]}, "missing property 'namespace'"),
        (
            {"exposedServices": [{"namespace": "a", "service": "b", "cluster": "c"}]},
            "at '/exposedServices/0': additional properties 'cluster' not allowed",
        ),
        ({"exposedServicesConfigMapName": "A_B"}, "at '/exposedServicesConfigMapName': 'A_B' does"),
        ({"featureGates": {"clusterprofile": True}}, "'clusterprofile' not allowed"),
        (
            {"userServer": {"ingress": {"enabled": True}}},
            "needs enableServiceProxy: without it there is no user server; userServer.ingress.host must be set",
        ),
        *(
            (
                {"proxyServer": {"entrypointAddress": address}},
                "proxyServer.entrypointAddress must be a host name or an IP address, without scheme",
            )
            for address in ("https://hub.example", "hub.example:443", "10.1.2.3:443", "[fd00::1]")
        ),
        (
            {"proxyServer": {"entrypointLoadBalancer": "true", "port": "8090"}},
            "proxyServer.port must not be 8090 with proxyServer.entrypointLoadBalancer",
        ),
        *(
            ({"registry": registry}, "registry must be the name of a registry")
            for registry in ("https://registry.example/team", "registry.example/team/")
        ),
        ({"userServer": {"additionalSANs": ["a b"]}}, "at '/userServer/additionalSANs/0': 'a b'"),
        (
            {"installByPlacement": {"placementName": "Mine"}},
            "at '/installByPlacement/placementName': 'Mine' does not match pattern",
        ),
    ],
)
def test_what_is_wrong_is_said(chart: Renderer, values: Object, message: str) -> None:
    assert message in failure(chart, **values)


def test_values_of_other_releases_are_let_pass(chart: Renderer) -> None:
    # With --reuse-values the original's subchart is among them, and nothing that only ours has.
    original: Object = {
        "registry": "quay.io/open-cluster-management",
        "image": "cluster-proxy",
        "tag": "v0.12.0",
        "cluster-proxy-common": {"global": {}},
        "global": {},
        "userServer": {"ingress": None, "resources": None},
        "proxyServer": {"additionalArgs": None},
        **dict.fromkeys(("manager", "controllers", "podDisruptionBudget", "serviceMonitor")),
        **dict.fromkeys(("imagePullSecrets", "nodeSelector", "tolerations")),
    }
    found = render(chart, replicas=2, enableServiceProxy=True, **original)
    assert found.keys() == ALWAYS | PLACED | WITH_USER


# -- any values ------------------------------------------------------------------------------------

SWITCH = st.booleans() | st.sampled_from(["true", "false", "1", "F"])
NAMES = st.sampled_from(["a", "123", "true", "null", "1e3", "team-a", "x.y"])
LABELS = st.dictionaries(NAMES, st.text("abc: #{}'\"\\\n", max_size=6), max_size=2)
ADDRESSES = st.sampled_from(["", "hub.example", "10.1.2.3", "fd00::1"])
PORTS = st.integers(1, 65_535) | st.integers(1, 65_535).map(str)


def mapping(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Object]:
    return st.fixed_dictionaries({}, optional=fields)


VALUES = mapping(
    registry=st.sampled_from(["", "registry.example/team", "r:5000/a"]) | st.none(),
    image=st.sampled_from(["cluster-proxy", "clusterproxy"]),
    tag=st.sampled_from(["", "v1", "1.0", "123"]) | st.none(),
    proxyServerImage=st.sampled_from(["", "r.example/server"]) | st.none(),
    proxyAgentImage=st.sampled_from(["", "r.example/agent"]) | st.none(),
    imagePullSecrets=st.lists(NAMES, max_size=2) | st.none(),
    replicas=st.integers(0, 5) | st.sampled_from(["0", "2", 3.0]),
    spokeAddonNamespace=st.sampled_from(["open-cluster-management-cluster-proxy", "123", "true"]),
    proxyServer=mapping(
        entrypointLoadBalancer=SWITCH,
        entrypointAddress=ADDRESSES | st.none(),
        port=PORTS,
        imagePullPolicy=st.sampled_from(["Always", "IfNotPresent", "Never", "", None]),
        additionalArgs=st.lists(st.sampled_from(["--v=4", "--keepalive-time=30s"])) | st.none(),
    ),
    installByPlacement=st.sampled_from(
        [
            {"placementName": "", "placementNamespace": "x"},
            {"placementName": "123", "placementNamespace": "true"},
            {"placementName": "x", "placementNamespace": None},
            None,
        ]
    ),
    enableKubeApiProxy=SWITCH,
    enableServiceProxy=SWITCH | st.none(),
    enableImpersonation=SWITCH,
    featureGates=mapping(clusterProfile=SWITCH | st.none()) | st.none(),
    userServer=mapping(
        enabled=SWITCH | st.none(),
        additionalSANs=st.lists(st.sampled_from(["u.example", "*.u.example", "10.0.0.1"]))
        | st.none(),
        exposedServicesMode=st.sampled_from(["enforce", "warn", "", None]),
        resources=mapping(requests=st.just({"cpu": 1})) | st.none(),
        ingress=mapping(annotations=LABELS, className=NAMES, tlsSecretName=NAMES) | st.none(),
    )
    | st.none(),
    exposedServices=st.lists(
        st.fixed_dictionaries(
            {"namespace": NAMES, "service": NAMES},
            optional={
                "port": PORTS | st.none(),
                "protocol": st.sampled_from(["http", "https"]) | st.none(),
            },
        ),
        max_size=3,
    )
    | st.none(),
    exposedServicesConfigMapName=NAMES | st.sampled_from(["", None]),
    networkPolicies=mapping(enabled=SWITCH | st.none()) | st.none(),
    manager=mapping(resources=st.just({"limits": {"memory": "1Gi"}}) | st.none()) | st.none(),
    controllers=mapping(resources=st.none()) | st.none(),
    podDisruptionBudget=mapping(enabled=SWITCH) | st.none(),
    serviceMonitor=mapping(enabled=SWITCH, interval=st.sampled_from(["", "5s"]), labels=LABELS)
    | st.none(),
    nodeSelector=LABELS | st.none(),
    tolerations=st.lists(mapping(key=NAMES, tolerationSeconds=st.integers(0, 10**7)), max_size=2)
    | st.none(),
    unknown=NAMES,
)
NAMESPACES = st.sampled_from([NAMESPACE, "multicluster-engine", "123", "true"])


@settings(max_examples=examples(400), deadline=None)
@given(values=VALUES, namespace=NAMESPACES)
def test_all_fits_together(chart: Renderer, values: Object, namespace: str) -> None:
    found = render(chart, namespace, **values)
    check_namespaces(found, namespace)
    check_selectors(found)
    check_references(found)
    check_programs(found, namespace)
    for image in images(found).values():
        name, _, tag = image.rpartition(":")
        assert name not in {"", "/"}
        assert tag not in {"", "latest"}


CLUSTER_WIDE = {
    "ClusterManagementAddOn",
    "ClusterRole",
    "ClusterRoleBinding",
    "ManagedProxyConfiguration",
}


def check_namespaces(found: Found, namespace: str) -> None:
    for (kind, _), obj in found.items():
        wanted = None if kind in CLUSTER_WIDE else namespace
        assert obj["metadata"].get("namespace") == wanted
        for subject in obj.get("subjects", ()):
            assert found["ServiceAccount", subject["name"]]
            assert subject["namespace"] == namespace


def check_selectors(found: Found) -> None:
    """Each selects the pods of one Deployment, of the chart or of the manager."""
    pods = [SELECTOR]
    for (kind, _), obj in found.items():
        if kind == "Deployment":
            labels = obj["spec"]["template"]["metadata"]["labels"]
            assert obj["spec"]["selector"]["matchLabels"] == labels
            for spread in obj["spec"]["template"]["spec"]["topologySpreadConstraints"]:
                assert spread["labelSelector"]["matchLabels"] == labels
            pods.append(labels)
    for (kind, _), obj in found.items():
        spec = obj.get("spec", {})
        if kind == "Service":
            selector = spec["selector"]
        elif kind == "NetworkPolicy":
            selector = spec["podSelector"]["matchLabels"]
        elif kind == "PodDisruptionBudget":
            selector = spec["selector"]["matchLabels"]
        elif kind == "ServiceMonitor":
            services = [
                name
                for (other, name), each in found.items()
                if other == "Service"
                and spec["selector"]["matchLabels"].items()
                <= each["metadata"].get("labels", {}).items()
            ]
            assert all(name.endswith("-metrics") for name in services)
            assert len(services) >= 2
            continue
        else:
            continue
        assert sum(selector.items() <= labels.items() for labels in pods) == 1, obj


def check_references(found: Found) -> None:
    """What pods mount and run under is there, or is made by the manager."""
    made = {USER_SERVER_SECRET, PROXY_SERVER_CA_SECRET, SecretNames().proxy_client}
    for (kind, _), obj in found.items():
        if kind == "Deployment":
            pod = obj["spec"]["template"]["spec"]
            assert found["ServiceAccount", pod["serviceAccountName"]]
            volumes = {
                each["name"]: each["secret"]["secretName"] for each in pod.get("volumes", ())
            }
            assert set(volumes.values()) <= made
            for each in pod["containers"]:
                mounted = {
                    mount["name"]: mount["mountPath"] for mount in each.get("volumeMounts", ())
                }
                assert mounted.keys() <= volumes.keys()
                paths = {arg.partition("=")[2] for arg in each["args"] if "=/" in arg}
                assert all(Path(path).parent.as_posix() in mounted.values() for path in paths)
        elif kind.endswith("RoleBinding"):
            assert found[obj["roleRef"]["kind"], obj["roleRef"]["name"]]


def check_programs(found: Found, namespace: str) -> None:
    """Read what is there as the programs do."""
    manager = container(found, MANAGER, "manager")
    flags = manager_flags()
    parsed = flags.parse(manager["args"])
    config = ManagerConfig(**parsed.fields(flags), pod_namespace=namespace)
    config.validate()
    assert config.leader_elect
    assert config.signer_secret_namespace == namespace
    listening = {each["name"]: each["containerPort"] for each in manager["ports"]}
    assert listening == {
        "metrics": config.metrics_address.port,
        "health": config.health_address.port,
    }
    if ("Deployment", USER) in found:
        controllers = container(found, USER, "controllers")
        flags = controllers_flags()
        [command, *arguments] = controllers["args"]
        assert command == "controllers"
        told = ControllersConfig(**flags.parse(arguments).fields(flags))
        told.validate()
        assert told.certificates_namespace == told.signer_secret_namespace == namespace
        assert [each["containerPort"] for each in controllers["ports"]] == [
            told.metrics_address.port,
            told.health_address.port,
        ]
        check_user_server(found, namespace)
    configuration = parse_configuration(found["ManagedProxyConfiguration", "cluster-proxy"])
    server = configuration.proxy_server
    assert server.namespace == namespace
    assert server.service_name == "proxy-entrypoint"
    assert (server.entrypoint.type is EntrypointType.HOSTNAME) == bool(server.entrypoint.hostname)


def check_user_server(found: Found, namespace: str) -> None:
    server = container(found, USER, "user-server")
    flags = user_server_flags()
    [command, *arguments] = server["args"]
    assert [*server["command"], command] == ["/cluster-proxy", "user-server"]
    parsed = flags.parse(arguments)
    assert not parsed.arguments
    config = UserServerConfig(**parsed.fields(flags), pod_namespace=namespace, given=parsed.given)
    config.validate()
    assert config.host == f"proxy-entrypoint.{namespace}.svc"
    listening = {each["name"]: each["containerPort"] for each in server["ports"]}
    assert listening == {"https": config.server_port, "health": config.health_port}
    [port] = found["Service", USER]["spec"]["ports"]
    assert port["targetPort"] == config.server_port
    for kind in ("livenessProbe", "readinessProbe"):
        assert server[kind]["httpGet"]["port"] == config.health_port
    pod = found["Deployment", USER]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > config.drain_timeout_s
    [profile_and_list, *_] = found["Role", USER]["rules"]
    assert profile_and_list == {
        "apiGroups": [""],
        "resources": ["configmaps"],
        "resourceNames": [TLS_PROFILE, config.exposed_services_configmap],
        "verbs": ["get", "list", "watch"],
    }
    if ("ServiceMonitor", "cluster-proxy") in found:
        [metrics] = found["Service", "cluster-proxy-user-server-metrics"]["spec"]["ports"]
        assert metrics["targetPort"] == config.health_port


# -- the chart itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_what_a_change_of_the_charts_changes(name: str, tmp_path: Path) -> None:
    """Look at the difference; if it is meant, write it: ``PYTHONPATH=tests python -m chart_snapshots``."""
    assert snapshot(name, tmp_path) == (FOLDER / f"{name}.yaml").read_text()


def test_helm_finds_nothing_wrong_with_the_chart() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_version_is_the_projects() -> None:
    project = (CHART.parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{ABOUT["appVersion"]}"\n' in project
    assert ABOUT["name"] == "cluster-proxy"


#: All values of the original's chart but images, which are ours.
ORIGINAL = {
    "replicas": 1,
    "spokeAddonNamespace": "open-cluster-management-cluster-proxy",
    "proxyServer": {
        "entrypointLoadBalancer": False,
        "entrypointAddress": "",
        "port": 8091,
        "imagePullPolicy": "IfNotPresent",
    },
    "installByPlacement": {"placementName": "", "placementNamespace": ""},
    "enableKubeApiProxy": True,
    "enableServiceProxy": False,
    "enableImpersonation": True,
    "featureGates": {"clusterProfile": False},
    "userServer": {"enabled": False, "additionalSANs": []},
    "exposedServicesConfigMapName": "cluster-proxy-exposed-services",
    "exposedServices": [],
    "networkPolicies": {"enabled": False},
}


def test_the_originals_values_have_its_defaults() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for name, value in ORIGINAL.items():
        if isinstance(value, dict):
            assert value.items() <= values[name].items()
        else:
            assert values[name] == value
    images = ("registry", "image", "tag", "proxyServerImage", "proxyAgentImage")
    assert {name: values[name] for name in images} == {
        **dict.fromkeys(images, ""),
        "image": "cluster-proxy",
    }


def test_every_value_has_a_rule() -> None:
    def check(values: Object, rules: Object) -> None:
        assert values.keys() == rules["properties"].keys()
        for name, value in values.items():
            rule = rules["properties"][name]
            if isinstance(value, dict) and "properties" in rule:
                check(value, rule)

    schema = json.loads((CHART / "values.schema.json").read_text())
    check(yaml.safe_load((CHART / "values.yaml").read_text()), schema)

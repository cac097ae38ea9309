from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

import pytest
from compatibility import Place, differences, documented, meaning
from golden_objects import (
    FULL,
    HOSTNAME,
    PORT_FORWARD,
    Object,
    configuration_object,
    golden,
    golden_configuration,
)

from clusterproxy.addon.certificates import Usage
from clusterproxy.addon.configuration import ProxyConfiguration, parse_configuration
from clusterproxy.addon.hub_objects import (
    hub_objects,
    load_balancer,
    rendered_hash,
    service_proxy_leaf,
    tls_config_hash,
    wanted_leaves,
)
from clusterproxy.cli.server import server_flags
from clusterproxy.kube.resource import DEPLOYMENTS, ROLES, SECRETS, SERVICE_ACCOUNTS, SERVICES

CA = b"-----BEGIN CERTIFICATE-----\n"


def configuration(**spec: Any) -> ProxyConfiguration:
    return parse_configuration(configuration_object(**spec))


def rendered(config: ProxyConfiguration, **options: Any) -> dict[tuple[str, str], Object]:
    return {
        (obj["kind"], obj["metadata"]["name"]): obj for _, obj in hub_objects(config, CA, **options)
    }


def deployment(config: ProxyConfiguration, **options: Any) -> Object:
    return rendered(config, **options)["Deployment", config.name]


def pod_of(obj: Object) -> Any:
    return obj["spec"]["template"]["spec"]


def container_of(obj: Object) -> Any:
    (container,) = pod_of(obj)["containers"]
    return container


def with_args(*arguments: str) -> Object:
    return deployment(configuration(proxyServer={"additionalArgs": list(arguments)}))


# What the apiserver and its controllers fill in or count, which is the same for whatever was sent.
FILLED_IN = {
    "metadata": {"generation"},
    "": {"status", "type"},
    "spec": {
        "internalTrafficPolicy", "ipFamilies", "ipFamilyPolicy", "sessionAffinity",
        "progressDeadlineSeconds", "revisionHistoryLimit",
    },
    "spec.ports[]": {"protocol"},
    "spec.template.spec": {"dnsPolicy", "restartPolicy", "schedulerName"},
    "spec.template.spec.containers[]": {"terminationMessagePath", "terminationMessagePolicy"},
    "spec.template.spec.volumes[].secret": {"defaultMode"},
}  # fmt: skip


def comparable(obj: Object, configuration: Object) -> Object:
    # Certificates are compared in tests/kube/test_golden.py.
    return meaning({**obj, "data": {}} if obj["kind"] == "Secret" else obj, configuration)


@pytest.mark.parametrize("situation", [HOSTNAME, PORT_FORWARD])
def test_the_objects_are_the_originals(situation: str) -> None:
    theirs = golden(situation)
    live = golden_configuration(situation)
    config = parse_configuration(live)
    ours = rendered(config)
    assert theirs.keys() == {
        *(ours.keys() - {("ServiceAccount", "cluster-proxy-proxy-server")}),
        *(("Secret", name) for name in wanted_leaves(config)),
        # These are made elsewhere.
        ("ManagedProxyConfiguration", "cluster-proxy"),
        ("Namespace", "open-cluster-management-addon"),
        ("Secret", "cluster-proxy-signer"),
    }
    found: set[Place] = set()
    for key, obj in ours.items():
        paths = {""}
        if key in theirs:
            paths = differences(
                comparable(theirs[key], live), comparable(obj, live), filled_in=FILLED_IN
            )
        found |= {(*key, path) for path in paths}
    assert found == {each for each in documented() if each[0] != "ManagedProxyConfiguration"}


def test_hashes_are_the_originals() -> None:
    theirs = golden(HOSTNAME)
    ours = rendered(parse_configuration(golden_configuration(HOSTNAME)))
    for key in (
        ("ServiceAccount", "cluster-proxy"),
        ("Service", "proxy-entrypoint"),
        ("RoleBinding", "cluster-proxy-addon-agent:portforward"),
    ):
        assert ours[key]["metadata"]["annotations"] == theirs[key]["metadata"]["annotations"]
    prefix = "proxy.open-cluster-management.io"
    # Those of the role and the deployment too, if they hold what the original's do.
    role = theirs["Role", "cluster-proxy-addon-agent:portforward"]
    sent = {"rules": role["rules"]}
    assert rendered_hash(ROLES, sent) == role["metadata"]["annotations"][f"{prefix}/rendered-hash"]
    live = theirs["Deployment", "cluster-proxy"]
    sent = {
        "spec": {
            "replicas": 1,
            "selector": live["spec"]["selector"],
            "strategy": {"type": "Recreate"},
            "template": {
                "metadata": live["spec"]["template"]["metadata"],
                "spec": {
                    "containers": [
                        {
                            key: value
                            for key, value in container_of(live).items()
                            if not key.startswith("terminationMessage")
                        }
                    ],
                    "securityContext": pod_of(live)["securityContext"],
                    "serviceAccountName": "cluster-proxy",
                    "volumes": [
                        {
                            "name": each["name"],
                            "secret": {"secretName": each["secret"]["secretName"]},
                        }
                        for each in pod_of(live)["volumes"]
                    ],
                },
            },
        }
    }
    annotations = live["metadata"]["annotations"]
    assert rendered_hash(DEPLOYMENTS, sent) == annotations[f"{prefix}/rendered-hash"]
    assert tls_config_hash("VersionTLS12", ()) == annotations[f"{prefix}/tls-config-hash"]


def test_a_hash_is_that_of_what_counts() -> None:
    role = {"rules": [{"verbs": ["get"], "resources": ["pods"]}]}
    assert rendered_hash(ROLES, role) == rendered_hash(
        ROLES, {"rules": [{"resources": ["pods"], "verbs": ["get"]}]}
    )
    assert rendered_hash(ROLES, role) != rendered_hash(ROLES, {"rules": []})
    # Go writes JSON that is safe within HTML.
    text = r'{"a":"\u003c\u0026\u003e\u2028é"}'
    assert rendered_hash(SECRETS, {"a": "<&>\u2028é"}) == hashlib.sha256(text.encode()).hexdigest()
    first, second = (
        {key: obj["metadata"]["annotations"] for key, obj in rendered(configuration()).items()}
        for _ in range(2)
    )
    assert first == second


def test_the_tls_hash_tells_profiles_apart() -> None:
    hashes = {
        tls_config_hash(version, suites)
        for version in ("VersionTLS12", "VersionTLS13", "")
        for suites in ((), ("A",), ("A", "B"))
    }
    assert len(hashes) == 9
    assert all(re.fullmatch("[0-9a-f]{16}", each) for each in hashes)


def test_objects_say_whose_they_are() -> None:
    for (kind, _), obj in rendered(configuration()).items():
        assert obj["metadata"]["namespace"] == "open-cluster-management-cluster-proxy"
        assert obj["metadata"]["ownerReferences"] == [
            {
                "apiVersion": "proxy.open-cluster-management.io/v1alpha1",
                "kind": "ManagedProxyConfiguration",
                "name": "cluster-proxy",
                "uid": "u-1",
                "blockOwnerDeletion": True,
            }
        ]
        annotations = obj["metadata"]["annotations"]
        assert annotations["proxy.open-cluster-management.io/configuration-generation"] == "3"
        assert ("proxy.open-cluster-management.io/tls-config-hash" in annotations) == (
            kind == "Deployment"
        )


def test_objects_come_in_an_order_in_which_they_can_be_used() -> None:
    resources = [resource for resource, _ in hub_objects(configuration(), CA)]
    assert resources[:5] == [SERVICE_ACCOUNTS, SERVICE_ACCOUNTS, SERVICES, SECRETS, DEPLOYMENTS]


def test_everything_configured_is_in_the_deployment() -> None:
    obj = deployment(
        parse_configuration(FULL),
        tls_min_version="VersionTLS13",
        cipher_suites=("A", "B"),
        image_pull_policy="Always",
    )
    container = container_of(obj)
    assert container["args"] == [
        "--server-count=2",
        "--proxy-strategies=destHost",
        "--server-ca-cert=/etc/server-ca-pki/ca.crt",
        "--server-cert=/etc/server-pki/tls.crt",
        "--server-key=/etc/server-pki/tls.key",
        "--cluster-ca-cert=/etc/server-ca-pki/ca.crt",
        "--cluster-cert=/etc/agent-pki/tls.crt",
        "--cluster-key=/etc/agent-pki/tls.key",
        "--server-port=9090",
        "--agent-port=9091",
        "--health-port=9092",
        "--admin-port=9095",
        "--v=4",
        "--cipher-suites=A,B",
        "--tls-min-version=VersionTLS13",
    ]
    assert container["image"] == "server:1"
    assert container["imagePullPolicy"] == "Always"
    assert obj["spec"]["replicas"] == 2
    assert [port["containerPort"] for port in container["ports"]] == [9090, 9091, 9092]
    assert pod_of(obj)["nodeSelector"] == {"disk": "ssd"}
    assert pod_of(obj)["tolerations"][0]["tolerationSeconds"] == 5
    assert [each["secret"]["secretName"] for each in pod_of(obj)["volumes"]] == [
        "proxy-server-ca",
        "s1",
        "s3",
    ]


@pytest.mark.parametrize("arguments", [(), ("--v=4",), ("--agent-identity=require",)])
def test_servers_look_at_agents_unless_arguments_say_otherwise(arguments: tuple[str, ...]) -> None:
    container = container_of(with_args(*arguments))
    environment = {each["name"]: each["value"] for each in container["env"]}
    # No flag, for an image of the original's would not start with it.
    assert [each for each in container["args"] if "identity" in each] == [
        each for each in arguments if "identity" in each
    ]
    flags = server_flags(agent_identity=environment["PROXY_SERVER_AGENT_IDENTITY"])
    told = flags.parse(container["args"]).fields(flags)["agent_identity"]
    assert told == ("require" if "--agent-identity=require" in arguments else "verify")


@pytest.mark.parametrize(
    "flag",
    ["--agent-namespace=a", "--agent-service-account=b", "--authentication-audience=c"],
)
def test_agents_with_tokens_need_no_certificate(flag: str) -> None:
    # With the flag the listener would demand one.
    authority = "--cluster-ca-cert=/etc/server-ca-pki/ca.crt"
    assert authority in container_of(with_args())["args"]
    assert authority not in container_of(with_args(flag))["args"]


def test_the_servers_account_pulls_with_the_secrets_of_the_originals() -> None:
    found = rendered(configuration(), pull_secrets=[{"name": "mirror"}])
    assert found["ServiceAccount", "cluster-proxy-proxy-server"]["imagePullSecrets"] == [
        {"name": "mirror"}
    ]
    assert "imagePullSecrets" not in found["ServiceAccount", "cluster-proxy"]


def test_without_a_tls_profile_there_are_no_such_arguments() -> None:
    args = container_of(deployment(configuration(), tls_min_version=""))["args"]
    assert not any("tls" in arg.partition("=")[0] or "cipher" in arg for arg in args)


def test_services_lead_from_the_ports_that_are_dialled_to_those_that_are_listened_on() -> None:
    service = rendered(parse_configuration(FULL))["Service", "entry"]
    assert [(port["port"], port["targetPort"]) for port in service["spec"]["ports"]] == [
        (8090, 9090),
        (8091, 9091),
    ]
    balancer, problems = load_balancer(parse_configuration(FULL))
    assert not problems
    assert balancer == {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "lb",
            "namespace": "ns1",
            "annotations": {"a.example/b": "https://x/y?z"},
        },
        "spec": {
            "type": "LoadBalancer",
            "selector": {"proxy.open-cluster-management.io/component-name": "proxy-server"},
            "ports": [
                {"name": "proxy-server", "port": 8090, "targetPort": 9090, "protocol": "TCP"},
                {"name": "agent-server", "port": 443, "targetPort": 9091, "protocol": "TCP"},
            ],
        },
    }


def test_annotations_that_cannot_be_are_told() -> None:
    good = ["a", "A_b.c-d", "service.beta.kubernetes.io/aws-load-balancer-type", "a/b"]
    bad = ["a b", "/a", "a/", "A.example/b", "a/b/c", "x" * 64, f"{'a.' * 127}example/b"]
    config = configuration(
        proxyServer={
            "entrypoint": {
                "type": "LoadBalancerService",
                "loadBalancerService": {
                    "annotations": [{"key": key, "value": "any thing"} for key in good + bad]
                },
            }
        }
    )
    service, problems = load_balancer(config)
    assert service["metadata"]["annotations"] == dict.fromkeys(good, "any thing")
    assert [problem.field for problem in problems] == [
        f"spec.proxyServer.entrypoint.loadBalancerService.annotations[{place}].key"
        for place in range(len(good), len(good) + len(bad))
    ]


def test_the_bundle_is_in_its_secret() -> None:
    secret = rendered(configuration())["Secret", "proxy-server-ca"]
    assert base64.b64decode(secret["data"]["ca.crt"]) == CA


def test_probes_follow_the_health_port_that_arguments_give() -> None:
    for arguments in (
        ("--health-port=9000",),
        ("--health-port", "9000"),
        ("--health-port=1", "--health-port=9000"),
    ):
        container = container_of(with_args(*arguments))
        assert container["ports"][2] == {"name": "health", "containerPort": 9000, "protocol": "TCP"}
        assert container["readinessProbe"]["httpGet"]["port"] == "health"
    assert container_of(with_args("--health-port=http"))["ports"][2]["containerPort"] == 8092
    container = container_of(with_args("--health-bind-address=127.0.0.1"))
    assert (
        container["readinessProbe"]
        is container["livenessProbe"]
        is container["startupProbe"]
        is None
    )
    assert container_of(with_args("--health-bind-address=0.0.0.0"))["livenessProbe"]


@pytest.mark.parametrize(
    ("argument", "seconds"),
    [("", 45), ("25s", 45), ("1m", 80), ("1.5s", 45), ("soon", 45), ("-1h", 45)],
)
def test_pods_may_end_in_their_own_time(argument: str, seconds: int) -> None:
    obj = with_args(f"--graceful-shutdown-timeout={argument}")
    assert pod_of(obj)["terminationGracePeriodSeconds"] == seconds


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ((), False),
        (("--v=4",), False),
        (("--enable-lease-controller",), True),
        (("--enable-lease-controller", "false"), True),
        (("--enable-lease-controller=true",), True),
        (("--enable-lease-controller=true", "--enable-lease-controller=false"), False),
        (("--agent-namespace=n",), True),
        (("--agent-namespace", "n"), True),
        (("--authentication-audience=",), False),
    ],
)
def test_only_a_server_that_asks_an_apiserver_has_rights(
    arguments: tuple[str, ...], needed: bool
) -> None:
    pod = pod_of(with_args(*arguments))
    assert pod["automountServiceAccountToken"] == needed
    assert pod["serviceAccountName"] == (
        "cluster-proxy" if needed else "cluster-proxy-proxy-server"
    )
    account = rendered(configuration())["ServiceAccount", "cluster-proxy-proxy-server"]
    assert account["automountServiceAccountToken"] is False


def test_certificates_of_every_entrypoint() -> None:
    common = {"127.0.0.1", "localhost", "proxy-entrypoint.n", "proxy-entrypoint.n.svc"}

    def hosts(entrypoint: Object, address: str = "") -> set[str]:
        config = configuration(proxyServer={"namespace": "n", "entrypoint": entrypoint})
        leaves = wanted_leaves(config, address)
        assert {name: leaf.usage for name, leaf in leaves.items()} == {
            "proxy-server": Usage.SERVER,
            "agent-server": Usage.SERVER,
            "proxy-client": Usage.CLIENT,
        }
        (found,) = {frozenset(leaf.hosts) for leaf in leaves.values()}
        return set(found) - common

    assert hosts({"type": "PortForward"}, "ignored") == set()
    assert hosts({"type": "Hostname", "hostname": {"value": "h.example"}}) == {"h.example"}
    assert hosts({"type": "LoadBalancerService"}) == set()
    assert hosts({"type": "LoadBalancerService"}, "1.2.3.4") == {"1.2.3.4"}
    assert hosts({"type": "LoadBalancerService"}, "lb.example") == {"lb.example"}


def test_additional_hosts() -> None:
    leaves = wanted_leaves(parse_configuration(FULL), "lb.example")
    assert leaves.keys() == {"s1", "s2", "s3", "cluster-proxy-user-serving-cert"}
    assert {"*.a.example", "10.1.2.3", "lb.example", "entry.ns1.svc"} <= set(leaves["s1"].hosts)
    assert set(leaves["cluster-proxy-user-serving-cert"].hosts) == {
        "127.0.0.1",
        "localhost",
        "cluster-proxy-addon-user",
        "cluster-proxy-addon-user.ns1",
        "cluster-proxy-addon-user.ns1.svc",
        "cluster-proxy-addon-user.ns1.svc.cluster.local",
        "u.example",
    }
    assert service_proxy_leaf().name == "cluster-proxy-service-proxy-server-cert"

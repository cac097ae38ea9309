"""The agent's Deployment on a managed cluster, as it should be. Pure.

Source: upstream ``pkg/proxyagent/agent/manifests/charts/addon-agent/templates/addon-agent-deployment.yaml``; what differs
from it is in docs/compatibility.md.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, cast

from .chart_values import CHART_VERSION, FALSE, TRUE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clusterproxy.kube.resource import Object

    from .chart_values import ChartValues, Oidc

SERVICE_ACCOUNT: Final = "cluster-proxy"

#: Of the agent's pods. A Deployment's selector cannot be changed.
SELECTOR: Final = {
    "open-cluster-management.io/addon": "cluster-proxy",
    "proxy.open-cluster-management.io/component-name": "proxy-agent",
}

CA_SECRET: Final = "cluster-proxy-ca"
SERVICE_PROXY_SECRET: Final = "cluster-proxy-service-proxy-server-certificates"
# These two the klusterlet makes; a pod waits for them.
CERTIFICATE_SECRET: Final = (
    "cluster-proxy-open-cluster-management.io-proxy-agent-signer-client-cert"
)
_HUB_KUBECONFIG_SECRET: Final = "cluster-proxy-hub-kubeconfig"

# What resource requirements call the containers, whatever the Deployment is called.
_CONTAINER_ID: Final = "deployments:cluster-proxy-proxy-agent:"

_OWN_TOKEN: Final = "kube-api-access"
_OWN_TOKEN_PATH: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
_OWN_TOKEN_S: Final = 3607

_IMPERSONATION_FLAG: Final = "--enable-impersonation"
_ISSUER_FLAG: Final = "--oidc-issuer-url"


def needs_impersonation(values: ChartValues) -> bool:
    """Whether the service proxy acts as users whom it has authenticated itself, and must be allowed to."""
    return values.service_proxy and (
        values.impersonation in TRUE
        or values.oidc.issuer != ""
        or any(
            arg == _ISSUER_FLAG or (_is_flag(arg, _ISSUER_FLAG) and arg != f"{_ISSUER_FLAG}=")
            for arg in values.service_proxy_args
        )
    )


def failures(values: ChartValues) -> Iterator[str]:
    """Yield what is wrong with values that belong together; the words are those of the original, where it has any."""
    if values.service_proxy:
        yield from _service_proxy_failures(values)
    if values.static_secret and not (values.static_cert and values.static_key):
        yield (
            "staticProxyAgentSecretCert and staticProxyAgentSecretKey must be set when includeStaticProxyAgentSecret "
            "is true"
        )
    if values.kube_api_proxy and not values.cluster:
        yield "clusterName must be set when enableKubeApiProxy is true"


def _service_proxy_failures(values: ChartValues) -> Iterator[str]:
    if values.impersonation not in (*TRUE, *FALSE):
        yield "enableImpersonation must be true or false"
    if any(_is_flag(arg, _IMPERSONATION_FLAG) for arg in values.service_proxy_args):
        yield (
            "additionalServiceProxyArgs must not set --enable-impersonation; use enableImpersonation instead"
        )
    issuers = sum(_is_flag(arg, _ISSUER_FLAG) for arg in values.service_proxy_args)
    if issuers > 1:
        yield "additionalServiceProxyArgs must set --oidc-issuer-url at most once"
    if issuers and values.oidc.issuer:
        yield (
            "configure the OIDC issuer with either oidcIssuerURL or --oidc-issuer-url in additionalServiceProxyArgs, "
            "not both"
        )
    if (values.oidc.issuer == "") != (values.oidc.client == ""):
        yield "oidcIssuerURL and oidcClientID must be specified together"
    if values.oidc.issuer and values.oidc.required_claims:
        claims = _required_claims(values.oidc.required_claims)
        if claims is None:
            yield "oidcRequiredClaimsJSON must be a JSON object"
        elif not all(isinstance(value, str) for value in claims.values()):
            yield "oidcRequiredClaimsJSON values must be strings"
    if not (values.service_proxy_cert and values.service_proxy_key):
        yield "serviceProxySecretCert and serviceProxySecretKey must be set when enableServiceProxy is true"


def agent_deployment(values: ChartValues) -> Object:
    """Return metadata (but for name and namespace) and ``spec`` of the Deployment.

    *values* are those of which :func:`failures` has nothing to say.
    """
    annotations = dict(values.annotations)
    containers = [_proxy_agent(values), _addon_agent(values)]
    if values.service_proxy:
        containers.append(_service_proxy(values))
    pod: Object = {
        "serviceAccountName": SERVICE_ACCOUNT,
        # The proxy agent, which the hub talks to, has no use for the account; the others mount its token themselves.
        "automountServiceAccountToken": False,
        # Service proxies may need 30 s to end.
        "terminationGracePeriodSeconds": 40,
        "securityContext": {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": containers,
        "volumes": _volumes(values),
    }
    if values.service_proxy_host:
        # By this name the hub reaches the service proxy in the same pod.
        pod["hostAliases"] = [{"ip": "127.0.0.1", "hostnames": [values.service_proxy_host]}]
    if values.tolerations:
        pod["tolerations"] = [dict(toleration) for toleration in values.tolerations]
    if values.node_selector:
        pod["nodeSelector"] = dict(values.node_selector)
    if values.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in values.pull_secrets]
    return {
        "metadata": {"annotations": annotations} if annotations else {},
        "spec": {
            "replicas": values.replicas,
            "selector": {"matchLabels": dict(SELECTOR)},
            "template": {
                "metadata": {
                    "annotations": {
                        **annotations,
                        "target.workload.openshift.io/management": '{"effect": "PreferredDuringScheduling"}',
                    },
                    "labels": dict(SELECTOR),
                },
                "spec": pod,
            },
        },
    }


def _proxy_agent(values: ChartValues) -> Object:
    proxies = (
        ("HTTP_PROXY", values.http_proxy),
        ("HTTPS_PROXY", values.https_proxy),
        ("NO_PROXY", values.no_proxy),
    )
    return {
        **_container(values, "proxy-agent", values.proxy_agent_image or _image(values)),
        "command": ["/proxy-agent"],
        "args": [
            f"--proxy-server-host={values.entry_point}",
            f"--proxy-server-port={values.entry_point_port}",
            f"--agent-identifiers={values.identifiers}",
            "--ca-cert=/etc/ca/ca.crt",
            "--agent-cert=/etc/tls/tls.crt",
            "--agent-key=/etc/tls/tls.key",
            *values.proxy_agent_args,
        ],
        # The addon agent answers for both: it fails once when the certificate has changed.
        "livenessProbe": {
            "httpGet": {"path": "/healthz", "scheme": "HTTP", "port": 8888},
            "initialDelaySeconds": 10,
            "failureThreshold": 1,
            "periodSeconds": 10,
        },
        "env": [
            *({"name": name, "value": value} for name, value in proxies if value),
            {"name": "ROOT_CA_CERT", "value": "/etc/ca/ca.crt"},
        ],
        "volumeMounts": [_mount("ca", "/etc/ca"), _mount("hub", "/etc/tls")],
    }


def _addon_agent(values: ChartValues) -> Object:
    return {
        **_container(values, "addon-agent", _image(values)),
        "command": ["/agent"],
        "args": ["--v=2", *values.addon_agent_args],
        "env": [_pod_namespace()],
        "volumeMounts": [
            _mount("hub-kubeconfig", "/etc/kubeconfig/"),
            _mount("hub", "/etc/tls"),
            _mount(_OWN_TOKEN, _OWN_TOKEN_PATH),
        ],
    }


def _service_proxy(values: ChartValues) -> Object:
    additional_ca = bool(values.service_ca_config_map)
    return {
        **_container(values, "service-proxy", _image(values)),
        "command": ["/cluster-proxy"],
        "args": [
            "service-proxy",
            *(
                ["--additional-service-ca=/additional-service-ca/service-ca.crt"]
                if additional_ca
                else ()
            ),
            f"{_IMPERSONATION_FLAG}={values.impersonation}",
            "--cert=/server-cert/tls.crt",
            "--key=/server-cert/tls.key",
            "--hub-kubeconfig=/etc/kubeconfig/kubeconfig",
            *(_oidc_args(values.oidc) if values.oidc.issuer else ()),
            *values.service_proxy_args,
        ],
        "livenessProbe": {
            "httpGet": {"path": "/healthz", "port": 8000},
            "initialDelaySeconds": 2,
            "periodSeconds": 10,
        },
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": 8000}, "periodSeconds": 2},
        "env": [_pod_namespace()],
        "volumeMounts": [
            _mount("hub-kubeconfig", "/etc/kubeconfig/"),
            _mount("hub", "/etc/tls"),
            *([_mount("additional-service-ca", "/additional-service-ca")] if additional_ca else ()),
            _mount("service-proxy-server-cert", "/server-cert"),
            _mount(_OWN_TOKEN, _OWN_TOKEN_PATH),
        ],
    }


def _container(values: ChartValues, name: str, image: str) -> Object:
    """Return what all containers have."""
    container: Object = {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "privileged": False,
            "runAsNonRoot": True,
            "readOnlyRootFilesystem": True,
        },
    }
    for pattern, resources in reversed(values.resources):
        if pattern.search(f"{_CONTAINER_ID}{name}"):
            container["resources"] = dict(resources)
            break
    return container


def _image(values: ChartValues) -> str:
    registry = f"{values.registry}/" if values.registry else ""
    if values.digest:
        tag = f":{values.tag}" if values.tag else ""
        return f"{registry}{values.image}{tag}@{values.digest}"
    return f"{registry}{values.image}:{values.tag or f'v{CHART_VERSION}'}"


def _oidc_args(oidc: Oidc) -> Iterator[str]:
    yield f"{_ISSUER_FLAG}={oidc.issuer}"
    yield f"--oidc-client-id={oidc.client}"
    for flag, value in (
        ("username-claim", oidc.username_claim),
        ("username-prefix", oidc.username_prefix),
        ("groups-claim", oidc.groups_claim),
        ("groups-prefix", oidc.groups_prefix),
    ):
        if value:
            yield f"--oidc-{flag}={value}"
    # Without it the service proxy would have a default of its own.
    yield f"--oidc-reserved-name-prefixes={oidc.reserved_prefixes}"
    if oidc.signing_algorithms:
        yield f"--oidc-signing-algs={oidc.signing_algorithms}"
    claims = _required_claims(oidc.required_claims) or {}
    for claim in sorted(claims):
        yield f"--oidc-required-claim={claim}={claims[claim]}"
    if oidc.ca_config_map:
        yield f"--oidc-ca-configmap={oidc.ca_config_map}"


def _required_claims(text: str) -> dict[str, object] | None:
    """Read a JSON object as Go does; None if it is something else."""
    try:
        claims: object = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(claims, dict):
        return None
    found = cast("dict[str, object]", claims)
    return {
        _as_go(claim): _as_go(value) if isinstance(value, str) else value
        for claim, value in found.items()
    }


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON")


def _as_go(text: str) -> str:
    """Return a text of JSON with half of a surrogate pair replaced: no UTF-8 has it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_flag(arg: str, flag: str) -> bool:
    return arg == flag or arg.startswith(f"{flag}=")


def _pod_namespace() -> Object:
    return {
        "name": "POD_NAMESPACE",
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}},
    }


def _mount(name: str, path: str) -> Object:
    return {"name": name, "mountPath": path, "readOnly": True}


def _volumes(values: ChartValues) -> list[Object]:
    volumes: list[Object] = [
        {"name": "ca", "secret": {"secretName": CA_SECRET}},
        {"name": "hub", "secret": {"secretName": CERTIFICATE_SECRET}},
        {"name": "hub-kubeconfig", "secret": {"secretName": _HUB_KUBECONFIG_SECRET}},
    ]
    if values.service_proxy and values.service_ca_config_map:
        config_map = {"name": values.service_ca_config_map, "optional": True}
        volumes.append({"name": "additional-service-ca", "configMap": config_map})
    if values.service_proxy:
        secret = {"secretName": SERVICE_PROXY_SECRET}
        volumes.append({"name": "service-proxy-server-cert", "secret": secret})
    volumes.append(_own_token())
    return volumes


def _own_token() -> Object:
    """Return the volume that the apiserver would have put into every container."""
    namespace = {"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}
    sources: list[Object] = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": _OWN_TOKEN_S}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [namespace]}},
    ]
    return {"name": _OWN_TOKEN, "projected": {"sources": sources}}

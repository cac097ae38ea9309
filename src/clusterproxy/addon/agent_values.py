"""The values of the agent's chart for one managed cluster, from all that has a say in them. Pure.

What is lower is put over what is higher: the chart's defaults; what the hub knows of the add-on; the
ManagedProxyConfiguration; the ManagedCluster and the manager's flags; the AddOnDeploymentConfig; names that nobody may
change. Sources: upstream ``pkg/proxyagent/agent/agent.go`` ``GetClusterProxyValueFunc`` and ``additional_values.go``,
addon-framework ``pkg/addonfactory/helm_agentaddon.go``.
"""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Final, cast

import attrs

from clusterproxy.kube.resource import list_at, map_at, text_at
from clusterproxy.tunnel.agent_identity import service_proxy_host

from .agent_deployment import failures
from .agent_images import Image, Mirror, mirrored, parse_image, parse_mirrors
from .certificates import CertificateError, load_pair
from .chart_values import DEFAULTS, UnrenderableError, merge, parse_values
from .configuration import (
    MAIN_CONFIGURATION,
    SERVICE_PROXY_SECRET,
    EntrypointType,
    ProxyConfiguration,
)
from .deployment_config import DeploymentConfig, called, parse_deployment_config
from .fields import Fields, shown
from .hub_objects import GENERATION
from .leaves import encoded, secret_data
from .registration import ADDON_NAME

if TYPE_CHECKING:
    from clusterproxy.kube.resource import Object

    from .config import ManagerConfig
    from .fields import Problem

#: What is wrong if there is no ManagedProxyConfiguration, in the apiserver's words.
MISSING_CONFIGURATION: Final = (
    f'managedproxyconfigurations.proxy.open-cluster-management.io "{MAIN_CONFIGURATION}" not found'
)

IMAGE_REGISTRIES: Final = "open-cluster-management.io/image-registries"
#: Not a slip: it has no ``.io``.
NODE_SELECTOR: Final = "open-cluster-management/nodeSelector"
_LOCAL_CLUSTER: Final = "local-cluster"

# What the add-on agent listens on, and forwards to, by default.
_AGENTS_PORT: Final = 8091


@attrs.frozen(kw_only=True)
class AgentSources:
    """What was read on the hub for one cluster; what has not been found is None."""

    cluster: Object
    """The ManagedCluster."""
    configuration: ProxyConfiguration | None
    ca_bundle: bytes
    """What the proxy servers' certificates are checked with, as PEM."""
    load_balancer: Object | None = None
    """The Service that agents dial, if the configuration has one."""
    service_proxy_secret: Object | None = None
    """The secret with the service proxies' certificate."""
    deployment_config: Object | None = None
    """The AddOnDeploymentConfig, if the add-on refers to one."""


def install_namespace(config: ManagerConfig, deployment_config: Object | None) -> str:
    """Return where the agent is installed.

    Raises:
      UnrenderableError: the AddOnDeploymentConfig is wrong.
    """
    problems: list[str] = []
    deployment = _deployment_config(deployment_config, problems)
    if problems:
        raise UnrenderableError(problems)
    return deployment.install_namespace or config.agent_install_namespace


def agent_values(config: ManagerConfig, sources: AgentSources) -> Object:
    """Return all values of the agent's chart, ``addonInstallNamespace`` among them.

    Raises:
      UnrenderableError: something is wrong or missing; it has all that is.
    """
    problems: list[str] = []
    deployment = _deployment_config(sources.deployment_config, problems)
    namespace = deployment.install_namespace or config.agent_install_namespace
    values = merge(DEFAULTS, _of_addon())
    configuration = sources.configuration
    if configuration is None:
        problems.append(MISSING_CONFIGURATION)
    else:
        values = merge(
            values, _of_configuration(config, configuration, sources, namespace, problems)
        )
        values = merge(values, _images(config, configuration, sources, deployment, problems))
    values = merge(values, _of_cluster(sources.cluster, problems))
    values = merge(values, _of_flags(config, sources, problems))
    if problems:
        raise UnrenderableError(problems)
    builtin = {
        "clusterName": text_at(sources.cluster, "metadata", "name"),
        "addonInstallNamespace": namespace,
        "installMode": "Default",
    }
    if sources.deployment_config is None:
        return merge(values, builtin)
    above = deployment.values(sources.ca_bundle)
    if deployment.node_placement is not None:
        # It replaces the selector that the cluster has.
        values["nodeSelector"] = {}
    values = merge(merge(values, above), builtin)
    _check(values, above, called(sources.deployment_config))
    return values


def _of_addon() -> Object:
    return {
        "hubKubeConfigSecret": f"{ADDON_NAME}-hub-kubeconfig",
        "managedKubeConfigSecret": f"{ADDON_NAME}-managed-kubeconfig",
    }


def _of_configuration(
    config: ManagerConfig,
    configuration: ProxyConfiguration,
    sources: AgentSources,
    namespace: str,
    problems: list[str],
) -> Object:
    cluster = text_at(sources.cluster, "metadata", "name")
    server, agent = configuration.proxy_server, configuration.proxy_agent
    host = service_proxy_host(cluster)
    hosts = [host]
    if config.enable_kube_api_proxy:
        hosts += [cluster, f"{cluster}.{namespace}"]
    args = [
        "--hub-kubeconfig=/etc/kubeconfig/kubeconfig",
        f"--cluster-name={cluster}",
        f"--proxy-server-namespace={server.namespace}",
    ]
    if server.entrypoint.type is EntrypointType.PORT_FORWARD:
        args.append("--enable-port-forward-proxy=true")
        # The original has no such flags, and no way to and from other ports either.
        if server.entrypoint.port != _AGENTS_PORT:
            args.append(f"--port-forward-port={server.entrypoint.port}")
        if configuration.ports.agent_server != _AGENTS_PORT:
            args.append(f"--proxy-server-port={configuration.ports.agent_server}")
    return {
        "agentDeploymentName": "cluster-proxy-proxy-agent",
        "agentDeploymentAnnotations": {GENERATION: str(configuration.generation)},
        "includeNamespaceCreation": True,
        "spokeAddonNamespace": namespace,
        "serviceDomain": "svc.cluster.local",
        "replicas": agent.replicas,
        "proxyAgentImagePullSecrets": list(agent.image_pull_secrets),
        "additionalProxyAgentArgs": list(agent.additional_args),
        "additionalServiceProxyArgs": list(agent.additional_service_proxy_args),
        "additionalServiceCAConfigMap": agent.additional_service_ca_config_map,
        "addonAgentArgs": args,
        "base64EncodedCAData": base64.b64encode(sources.ca_bundle).decode(),
        "serviceEntryPoint": _entry_point(configuration, sources.load_balancer, problems),
        "serviceEntryPointPort": server.entrypoint.port,
        "agentIdentifiers": "&".join(f"host={name}" for name in hosts),
        "serviceProxyHost": host,
        "servicesToExpose": [],
        "enableKubeApiProxy": config.enable_kube_api_proxy,
    }


def _entry_point(
    configuration: ProxyConfiguration, load_balancer: Object | None, problems: list[str]
) -> str:
    entrypoint = configuration.proxy_server.entrypoint
    if entrypoint.type is EntrypointType.HOSTNAME:
        return entrypoint.hostname
    if entrypoint.type is EntrypointType.PORT_FORWARD:
        return "127.0.0.1"
    if load_balancer is None:
        problems.append(
            f'failed getting proxy loadbalancer: services "{entrypoint.load_balancer_name}" not found'
        )
        return ""
    for ingress in list_at(load_balancer, "status", "loadBalancer", "ingress"):
        if isinstance(ingress, dict):
            found = cast("Object", ingress)
            if address := text_at(found, "ip") or text_at(found, "hostname"):
                return address
    problems.append(
        "the load-balancer service for proxy-server ingress is not yet provisioned: Service "
        f"{configuration.proxy_server.namespace}/{entrypoint.load_balancer_name} has no address"
    )
    return ""


def _images(
    config: ManagerConfig,
    configuration: ProxyConfiguration,
    sources: AgentSources,
    deployment: DeploymentConfig,
    problems: list[str],
) -> Object:
    mirrors = [(_mirrors_of_cluster(sources.cluster, problems), _cluster_mirrors(sources.cluster))]
    if sources.deployment_config is not None:
        # Who names mirrors for the add-on alone means them.
        whose = f"{called(sources.deployment_config)}: spec.registries"
        mirrors.insert(0, (deployment.mirrors, whose))

    def read(image: str, where: str) -> tuple[str, Image]:
        try:
            parse_image(image)
            for each, whose in mirrors:
                found = mirrored(image, each)
                if found != image:
                    image, where = found, whose
                    break
            return image, parse_image(image)
        except ValueError as error:
            raise UnrenderableError([f"{where}: {error}"]) from error

    try:
        proxy_agent, agent = read(
            configuration.proxy_agent.image,
            f"ManagedProxyConfiguration {configuration.name}: spec.proxyAgent.image",
        )
        if config.agent_image_name:
            _, agent = read(config.agent_image_name, "--agent-image-name")
    except UnrenderableError as error:
        problems += error.problems
        return {}
    return {
        "registry": agent.registry,
        "image": agent.name,
        "tag": agent.tag,
        "digest": agent.digest,
        "proxyAgentImage": proxy_agent,
    }


def _mirrors_of_cluster(cluster: Object, problems: list[str]) -> tuple[Mirror, ...]:
    given = _annotation(cluster, IMAGE_REGISTRIES, problems)
    if given is None:
        return ()
    noted: list[Problem] = []
    found = parse_mirrors(Fields(given, "", noted))
    problems += [f"{_cluster_mirrors(cluster)}: {problem}" for problem in noted]
    return found


def _cluster_mirrors(cluster: Object) -> str:
    return _annotated(cluster, IMAGE_REGISTRIES)


def _of_cluster(cluster: Object, problems: list[str]) -> Object:
    """Return where the agent of the hub's own cluster may run."""
    label = map_at(cluster, "metadata", "labels").get(_LOCAL_CLUSTER)
    if str(label).lower() != "true":
        return {}
    given = _annotation(cluster, NODE_SELECTOR, problems)
    if given is None:
        return {}
    noted: list[Problem] = []
    selector = Fields({"nodeSelector": given}, "", noted).mapping("nodeSelector")
    problems += [f"{_annotated(cluster, NODE_SELECTOR)}: {problem}" for problem in noted]
    return {"nodeSelector": selector}


def _annotation(cluster: Object, name: str, problems: list[str]) -> object:
    """Return what an annotation says in JSON, None if there is none, or if it cannot be read."""
    annotations = map_at(cluster, "metadata", "annotations")
    if name not in annotations:
        return None
    try:
        found: object = json.loads(annotations[name])
    except (ValueError, TypeError, RecursionError) as error:
        problems.append(
            f"{_annotated(cluster, name)}: must be JSON, not {shown(annotations[name])}: {error}"
        )
        return None
    return found


def _annotated(cluster: Object, name: str) -> str:
    return f"ManagedCluster {text_at(cluster, 'metadata', 'name')}: metadata.annotations[{name}]"


def _of_flags(config: ManagerConfig, sources: AgentSources, problems: list[str]) -> Object:
    values: Object = {"networkPolicies": {"enabled": config.enable_network_policies}}
    if config.enable_service_proxy:
        pair = encoded(_service_proxy_pair(config, sources.service_proxy_secret, problems))
        values |= {
            "enableServiceProxy": True,
            "serviceProxySecretCert": pair.get("tls.crt", ""),
            "serviceProxySecretKey": pair.get("tls.key", ""),
        }
    return values


def _service_proxy_pair(
    config: ManagerConfig, secret: Object | None, problems: list[str]
) -> dict[str, bytes]:
    """Return what the service proxies' secret has, a certificate and its key if there are no problems."""
    namespace = config.signer_secret_namespace
    if secret is None:
        problems.append(
            f"failed to get secret {SERVICE_PROXY_SECRET} in the namespace {namespace}: "
            f'secrets "{SERVICE_PROXY_SECRET}" not found'
        )
        return {}
    data = secret_data(secret)
    missing = [key for key in ("tls.crt", "tls.key") if not data.get(key)]
    problems += [
        f"secret {SERVICE_PROXY_SECRET} does not contain {key} (in the namespace {namespace})"
        for key in missing
    ]
    if not missing:
        try:
            load_pair(data)
        except CertificateError as error:
            problems.append(
                f"secret {SERVICE_PROXY_SECRET} (in the namespace {namespace}): {error}. Put a certificate and "
                "its key there, or delete the secret: the controllers issue both"
            )
    return data


def _deployment_config(obj: Object | None, problems: list[str]) -> DeploymentConfig:
    if obj is None:
        return DeploymentConfig()
    noted: list[Problem] = []
    found = parse_deployment_config(obj, noted)
    problems += [f"{called(obj)}: {problem}" for problem in noted]
    return found


def _check(values: Object, above: Object, whose: str) -> None:
    """Say of values that are wrong whose they are."""
    try:
        parsed = parse_values(values)
    except UnrenderableError as error:
        names = [re.split(r"\W", problem, maxsplit=1)[0] for problem in error.problems]
        raise UnrenderableError(
            [
                f"{whose}: {problem}" if name in above else problem
                for name, problem in zip(names, error.problems, strict=True)
            ]
        ) from error
    # Of several that do not go together one may be from elsewhere.
    if problems := list(failures(parsed)):
        raise UnrenderableError(
            [
                problem
                if above.keys().isdisjoint(re.findall(r"\w+", problem))
                else f"{whose}: {problem}"
                for problem in problems
            ]
        )

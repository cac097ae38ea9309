"""What a ManagedProxyConfiguration asks for, checked and with its defaults. Pure.

The CRD's defaults apply only where the parent object is given, so they are applied here again. Source: upstream
``pkg/apis/proxy/v1alpha1/managedproxyconfiguration_types.go``.
"""

from __future__ import annotations

import ipaddress
import re
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import attrs

from clusterproxy.errors import ClusterProxyError

from .fields import NAMESPACE, SERVICE, SUBDOMAIN, Fields, Problem, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clusterproxy.kube.resource import Object

#: The configuration that agents go by, and that owns the CA.
MAIN_CONFIGURATION: Final = "cluster-proxy"
DEFAULT_NAMESPACE: Final = "open-cluster-management-cluster-proxy"
PROXY_SERVER_CA_SECRET: Final = "proxy-server-ca"
USER_SERVER_SECRET: Final = "cluster-proxy-user-serving-cert"
SERVICE_PROXY_SECRET: Final = "cluster-proxy-service-proxy-server-cert"
_SIGNER_SECRET: Final = "cluster-proxy-signer"

# What the Helm chart calls its Deployments and a Service.
_CHARTS: Final = ("cluster-proxy-addon-manager", "cluster-proxy-addon-user")
# The longest name of an object, without what is put behind it.
_LONGEST_NAME: Final = 253 - len("-proxy-server")

# The ports that the proxy server accepts: those below need rights, those above are handed out to clients.
_FIRST_PORT: Final = 1024
_LAST_PORT: Final = 49151
_HOST_LABEL: Final = re.compile("[A-Za-z0-9_]([-A-Za-z0-9_]*[A-Za-z0-9_])?")
_PRINTABLE: Final = re.compile("[!-~]+")


class InvalidConfiguration(ClusterProxyError):
    """A ManagedProxyConfiguration that cannot be acted on.

    Attributes:
      problems: all that is wrong with it, at least one.
    """

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


class SignerType(StrEnum):
    """Where certificates come from."""

    SELF_SIGNED = "SelfSigned"
    PROVIDED = "Provided"
    CERT_MANAGER = "CertManager"


class EntrypointType(StrEnum):
    """How agents reach the proxy servers."""

    HOSTNAME = "Hostname"
    LOAD_BALANCER = "LoadBalancerService"
    PORT_FORWARD = "PortForward"


@attrs.frozen(kw_only=True)
class SecretNames:
    """The secrets that hold certificates."""

    proxy_server: str = "proxy-server"
    """For the port of clients."""
    proxy_client: str = "proxy-client"
    """For the clients themselves."""
    agent_server: str = "agent-server"
    """For the port of agents."""


@attrs.frozen(kw_only=True)
class Ports:
    """Where a proxy server listens."""

    proxy_server: int = 8090
    agent_server: int = 8091
    health_server: int = 8092
    admin_server: int = 8095


@attrs.frozen(kw_only=True)
class Entrypoint:
    """How agents reach the proxy servers."""

    type: EntrypointType = EntrypointType.PORT_FORWARD
    hostname: str = ""
    """A host name or an address; set if the type is Hostname."""
    load_balancer_name: str = "proxy-agent-entrypoint"
    load_balancer_annotations: tuple[tuple[str, str], ...] = ()
    """As they are written: a key may be one that no object can have."""
    port: int = 8091
    """The one that agents dial."""


@attrs.frozen(kw_only=True)
class ProxyServer:
    """The proxy servers' deployment."""

    image: str
    replicas: int = 3
    service_name: str = "proxy-entrypoint"
    namespace: str = DEFAULT_NAMESPACE
    entrypoint: Entrypoint = Entrypoint()
    additional_args: tuple[str, ...] = ()
    node_selector: dict[str, str] = attrs.field(factory=dict[str, str])
    tolerations: tuple[Object, ...] = ()


@attrs.frozen(kw_only=True)
class ProxyAgent:
    """The agents' deployment on the managed clusters."""

    image: str
    replicas: int = 3
    additional_args: tuple[str, ...] = ()
    image_pull_secrets: tuple[str, ...] = ()
    additional_service_proxy_args: tuple[str, ...] = ()
    additional_service_ca_config_map: str = ""


@attrs.frozen(kw_only=True)
class ProxyConfiguration:
    """A ManagedProxyConfiguration."""

    name: str
    uid: str
    generation: int
    proxy_server: ProxyServer
    proxy_agent: ProxyAgent
    signer_type: SignerType = SignerType.SELF_SIGNED
    additional_sans: tuple[str, ...] = ()
    secrets: SecretNames = SecretNames()
    ports: Ports = Ports()
    user_server_sans: tuple[str, ...] | None = None
    """The user server's additional host names; None if no user server is asked for."""


def parse_configuration(obj: Object, *, signer_secret: str = _SIGNER_SECRET) -> ProxyConfiguration:
    """Read a ManagedProxyConfiguration.

    Args:
      obj: the object, of any shape.
      signer_secret: the name of the CA's secret, which nothing else may have.

    Raises:
      InvalidConfiguration: with all that is wrong.
    """
    problems: list[Problem] = []
    root = Fields(obj, "", problems)
    metadata = root.part("metadata")
    spec = root.part("spec")
    authentication = spec.part("authentication")
    signer = authentication.part("signer")
    sans = _sans(signer.part("selfSigned"))
    ports = _ports(spec.part("deploy").part("ports"))
    server = _proxy_server(spec.part("proxyServer"), ports)
    name = metadata.text("name", required=True)
    if name in _CHARTS:
        metadata.problem(
            "name", f"{name!r} is the name of another Deployment of the add-on: choose another name"
        )
    if len(name) > _LONGEST_NAME:
        metadata.problem(
            "name", f"must have at most {_LONGEST_NAME} letters: names of objects are made of it"
        )
    secrets = _secrets(authentication.part("dump").part("secrets"), signer_secret)
    user_server = spec.part("userServer")
    configuration = ProxyConfiguration(
        name=name,
        uid=metadata.text("uid"),
        generation=metadata.integer("generation", 0, 0, 2**63 - 1),
        proxy_server=server,
        proxy_agent=_proxy_agent(spec.part("proxyAgent")),
        signer_type=signer.choice("type", SignerType.SELF_SIGNED),
        additional_sans=sans,
        secrets=secrets,
        ports=ports,
        user_server_sans=_sans(user_server) if user_server.given else None,
    )
    if problems:
        raise InvalidConfiguration(tuple(problems))
    return configuration


def _sans(fields: Fields) -> tuple[str, ...]:
    """Return host names that a certificate can hold; what is none is noted."""
    found: list[str] = []
    for called, element in fields.items("additionalSANs"):
        if not isinstance(element, str):
            fields.problem(called, f"must be a string, not {shown(element)}")
        elif not _PRINTABLE.fullmatch(element):
            fields.problem(
                called,
                f"{shown(element)} cannot be a name in a certificate: write a DNS name in ASCII (an international "
                "one as xn--...), perhaps with '*.' in front, or an IP address",
            )
        else:
            found.append(element)
    return tuple(found)


def _ports(fields: Fields) -> Ports:
    default = Ports()
    named = {
        "proxyServer": default.proxy_server,
        "agentServer": default.agent_server,
        "healthServer": default.health_server,
        "adminServer": default.admin_server,
    }
    first_of: dict[int, str] = {}
    for name in named:
        port = named[name] = fields.integer(name, named[name], _FIRST_PORT, _LAST_PORT)
        first = first_of.setdefault(port, name)
        if first != name:
            fields.problem(name, f"is {port}, as is {first}: the ports must be different")
    return Ports(
        proxy_server=named["proxyServer"],
        agent_server=named["agentServer"],
        health_server=named["healthServer"],
        admin_server=named["adminServer"],
    )


def _secrets(fields: Fields, signer_secret: str) -> SecretNames:
    default = SecretNames()
    named = {
        "signingProxyServerSecretName": default.proxy_server,
        "signingProxyClientSecretName": default.proxy_client,
        "signingAgentServerSecretName": default.agent_server,
    }
    taken = {
        PROXY_SERVER_CA_SECRET: "is where the CA's certificate is kept",
        signer_secret: "is where the CA's key is kept",
        USER_SERVER_SECRET: "is where the user server's certificate is kept",
        SERVICE_PROXY_SECRET: "is where the service proxies' certificate is kept",
    }
    for field in named:
        name = named[field] = fields.name(field, named[field], SUBDOMAIN, 253)
        if name in taken:
            fields.problem(field, f"{shown(name)} {taken[name]}: choose another name")
        taken.setdefault(name, f"is the name in {field} already")
    return SecretNames(
        proxy_server=named["signingProxyServerSecretName"],
        proxy_client=named["signingProxyClientSecretName"],
        agent_server=named["signingAgentServerSecretName"],
    )


def _proxy_server(fields: Fields, ports: Ports) -> ProxyServer:
    default = ProxyServer(image="")
    service_name = fields.name("inClusterServiceName", default.service_name, SERVICE, 63)
    entrypoint = _entrypoint(fields.part("entrypoint"))
    if entrypoint.type is EntrypointType.LOAD_BALANCER:
        if entrypoint.load_balancer_name == service_name:
            fields.problem(
                "entrypoint.loadBalancerService.name",
                f"{shown(service_name)} is the name in inClusterServiceName already: choose another name",
            )
        if entrypoint.port == ports.proxy_server:
            fields.problem(
                "entrypoint.port",
                f"{entrypoint.port} is the port of clients at the load balancer: choose another port",
            )
    placement = fields.part("nodePlacement")
    return ProxyServer(
        image=fields.text("image", required=True),
        replicas=fields.integer("replicas", default.replicas, 0),
        service_name=service_name,
        namespace=fields.name("namespace", default.namespace, NAMESPACE, 63),
        entrypoint=entrypoint,
        additional_args=fields.texts("additionalArgs"),
        node_selector=placement.mapping("nodeSelector"),
        tolerations=tuple(_tolerations(placement)),
    )


def _entrypoint(fields: Fields) -> Entrypoint:
    default = Entrypoint()
    kind = fields.choice("type", default.type)
    balancer = fields.part("loadBalancerService")
    annotations: list[tuple[str, str]] = []
    for called, element in balancer.items("annotations"):
        annotation = balancer.element(called, element)
        key, value = annotation.text("key", required=True), annotation.text("value")
        annotations.append((key, value))
    named = fields.part("hostname")
    hostname = named.text("value", required=kind is EntrypointType.HOSTNAME)
    if kind is EntrypointType.HOSTNAME and hostname and not is_host(hostname):
        named.problem(
            "value",
            f"{shown(hostname)} is neither a host name nor an IP address: write it without scheme, port, path "
            "and brackets",
        )
    return Entrypoint(
        type=kind,
        hostname=hostname,
        load_balancer_name=balancer.name("name", default.load_balancer_name, SERVICE, 63),
        load_balancer_annotations=tuple(annotations),
        # 0 is what an old object without the field has.
        port=fields.integer("port", default.port, 0, 65535) or default.port,
    )


def _tolerations(placement: Fields) -> Iterator[Object]:
    for called, element in placement.items("tolerations"):
        fields = placement.element(called, element)
        toleration: Object = {}
        for name in ("key", "operator", "value", "effect"):
            if text := fields.text(name):
                toleration[name] = text
        # As much as an int64 holds; what is below 1 evicts at once.
        if fields.has("tolerationSeconds"):
            toleration["tolerationSeconds"] = fields.integer(
                "tolerationSeconds", 0, -(2**63), 2**63 - 1
            )
        yield toleration


def _proxy_agent(fields: Fields) -> ProxyAgent:
    default = ProxyAgent(image="")
    return ProxyAgent(
        image=fields.text("image", required=True),
        replicas=fields.integer("replicas", default.replicas, 0),
        additional_args=fields.texts("additionalArgs"),
        image_pull_secrets=fields.texts("imagePullSecrets"),
        additional_service_proxy_args=fields.texts("additionalServiceProxyArgs"),
        additional_service_ca_config_map=fields.name(
            "additionalServiceCAConfigMap", "", SUBDOMAIN, 253
        ),
    )


def is_host(text: str) -> bool:
    """Whether *text* is a host name, or an IP address without brackets and zone."""
    try:
        return not getattr(ipaddress.ip_address(text), "scope_id", None)
    except ValueError:
        labels = text.split(".")
        # No top-level domain is a number: 10.0.0 and 10.0.0.256 are addresses gone wrong.
        return (
            len(text) <= 253
            and not labels[-1].isdecimal()
            and all(len(label) <= 63 and _HOST_LABEL.fullmatch(label) for label in labels)
        )

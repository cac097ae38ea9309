"""The values of the agent's chart: what they are by default, how they are merged, and what they must be. Pure.

``deploy/charts/cluster-proxy-agent`` has the same in ``values.yaml`` and ``values.schema.json``. Source: upstream
``pkg/proxyagent/agent/manifests/charts/addon-agent/values.yaml`` and ``values.schema.json``.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any, Final, cast

import attrs

from clusterproxy.errors import ClusterProxyError

from .fields import Fields, Problem, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clusterproxy.kube.resource import Object

CHART_VERSION: Final = "0.4.0"

#: What strconv.ParseBool of Go takes, which reads the flags of the original's programs.
TRUE: Final = ("1", "t", "T", "TRUE", "true", "True")
FALSE: Final = ("0", "f", "F", "FALSE", "false", "False")

DEFAULTS: Final[Object] = {
    "clusterName": "loopback",
    "agentDeploymentName": "cluster-proxy-proxy-agent",
    "includeNamespaceCreation": False,
    "registry": "quay.io/open-cluster-management",
    "image": "cluster-proxy",
    "tag": "",
    "digest": "",
    "proxyAgentImage": "",
    "proxyAgentImagePullSecrets": [],
    "replicas": 1,
    "spokeAddonNamespace": "open-cluster-management-cluster-proxy",
    "agentDeploymentAnnotations": {},
    "addonAgentArgs": [],
    "additionalProxyAgentArgs": [],
    "additionalServiceProxyArgs": [],
    "additionalServiceCAConfigMap": "",
    "serviceEntryPoint": "",
    "serviceEntryPointPort": 8091,
    "agentIdentifiers": "",
    "base64EncodedCAData": "Zm9vCg==",
    "enableKubeApiProxy": False,
    "serviceDomain": "svc.cluster.local",
    "servicesToExpose": [],
    "enableServiceProxy": False,
    "serviceProxyHost": "",
    "serviceProxySecretCert": "",
    "serviceProxySecretKey": "",
    "includeStaticProxyAgentSecret": False,
    "staticProxyAgentSecretCert": "",
    "staticProxyAgentSecretKey": "",
    "nodeSelector": {},
    "tolerations": [
        {"key": "dedicated", "operator": "Equal", "value": "infra", "effect": "NoSchedule"},
        {
            "key": "node-role.kubernetes.io/infra",
            "operator": "Exists",
            "effect": "NoSchedule",
        },
    ],
    "proxyConfig": {"HTTP_PROXY": "", "HTTPS_PROXY": "", "NO_PROXY": ""},
    "networkPolicies": {"enabled": False},
    "enableImpersonation": "true",
    "oidcIssuerURL": "",
    "oidcClientID": "",
    "oidcUsernameClaim": "",
    "oidcUsernamePrefix": "",
    "oidcGroupsClaim": "",
    "oidcGroupsPrefix": "",
    "oidcReservedNamePrefixes": ["system:"],
    "oidcCAConfigMap": "",
    "oidcSigningAlgs": [],
    "oidcRequiredClaimsJSON": "",
    "global": {"resourceRequirements": []},
}

_TOLERATION: Final = ("key", "operator", "value", "effect")
_MOST_REPLICAS: Final = 999_999_999
_LAST_PORT: Final = 65_535
_NUMBER: Final = re.compile("0|[1-9][0-9]{0,8}")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/=\r\n]*")
_PREFIXES: Final = re.compile("(|[^,]+(,[^,]+)*)")


class UnrenderableError(ClusterProxyError):
    """There can be no manifests of the agent as things are.

    Attributes:
      problems: all that is wrong, at least one; each says where.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@attrs.frozen(kw_only=True)
class Oidc:
    """How the service proxy is told of an issuer of tokens; empty texts are left to it."""

    issuer: str
    client: str
    username_claim: str
    username_prefix: str
    groups_claim: str
    groups_prefix: str
    reserved_prefixes: str
    """Separated by commas."""
    ca_config_map: str
    signing_algorithms: str
    """Separated by commas."""
    required_claims: str
    """A JSON object."""


@attrs.frozen(kw_only=True)
class ChartValues:
    """Values of the agent's chart that have the right types."""

    cluster: str
    deployment: str
    creates_namespace: bool
    registry: str
    image: str
    tag: str
    digest: str
    proxy_agent_image: str
    pull_secrets: tuple[str, ...]
    replicas: int
    annotations: dict[str, str]
    addon_agent_args: tuple[str, ...]
    proxy_agent_args: tuple[str, ...]
    service_proxy_args: tuple[str, ...]
    service_ca_config_map: str
    entry_point: str
    entry_point_port: int
    identifiers: str
    ca_data: str
    kube_api_proxy: bool
    service_domain: str
    exposed: tuple[tuple[str, str], ...]
    """Names of Services, and what they lead to within the service domain."""
    service_proxy: bool
    service_proxy_host: str
    service_proxy_cert: str
    service_proxy_key: str
    static_secret: bool
    static_cert: str
    static_key: str
    node_selector: dict[str, str]
    tolerations: tuple[Object, ...]
    http_proxy: str
    https_proxy: str
    no_proxy: str
    network_policies: bool
    impersonation: str
    oidc: Oidc
    resources: tuple[tuple[re.Pattern[str], Object], ...]
    """What containers are called, and what those get; the last that matches holds."""


def merge(low: Object, high: Object) -> Object:
    """Return *low* with *high* put over it: objects are merged, anything else is replaced, as by Helm.

    A None of *high* takes away what *low* has.
    """
    merged = dict(low)
    for key, value in high.items():
        there = low.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            merged[key] = merge(cast("Object", there), cast("Object", value))
        elif value is None and key in low:
            del merged[key]
        else:
            merged[key] = value
    return merged


def parse_values(values: Object) -> ChartValues:
    """Read values, those that are the chart's defaults among them.

    Raises:
      UnrenderableError: with all that is wrong.
    """
    problems: list[Problem] = []
    fields = _Values(values, "", problems)
    proxy = fields.part("proxyConfig")
    parsed = ChartValues(
        cluster=fields.text("clusterName"),
        deployment=fields.text("agentDeploymentName", required=True),
        creates_namespace=fields.truth("includeNamespaceCreation"),
        registry=fields.text("registry"),
        image=fields.text("image"),
        tag=fields.text("tag"),
        digest=fields.text("digest"),
        proxy_agent_image=fields.text("proxyAgentImage"),
        pull_secrets=fields.texts("proxyAgentImagePullSecrets"),
        replicas=fields.number("replicas", 0, _MOST_REPLICAS),
        annotations=fields.mapping("agentDeploymentAnnotations"),
        addon_agent_args=fields.texts("addonAgentArgs"),
        proxy_agent_args=fields.texts("additionalProxyAgentArgs"),
        service_proxy_args=fields.texts("additionalServiceProxyArgs"),
        service_ca_config_map=fields.text("additionalServiceCAConfigMap"),
        entry_point=fields.text("serviceEntryPoint"),
        entry_point_port=fields.number("serviceEntryPointPort", 1, _LAST_PORT),
        identifiers=fields.text("agentIdentifiers"),
        ca_data=fields.base64("base64EncodedCAData"),
        kube_api_proxy=fields.switch("enableKubeApiProxy"),
        service_domain=fields.text("serviceDomain"),
        exposed=_exposed(fields),
        service_proxy=fields.switch("enableServiceProxy"),
        service_proxy_host=fields.text("serviceProxyHost"),
        service_proxy_cert=fields.base64("serviceProxySecretCert"),
        service_proxy_key=fields.base64("serviceProxySecretKey"),
        static_secret=fields.switch("includeStaticProxyAgentSecret"),
        static_cert=fields.base64("staticProxyAgentSecretCert"),
        static_key=fields.base64("staticProxyAgentSecretKey"),
        node_selector=fields.mapping("nodeSelector"),
        tolerations=_tolerations(fields),
        http_proxy=proxy.text("HTTP_PROXY"),
        https_proxy=proxy.text("HTTPS_PROXY"),
        no_proxy=proxy.text("NO_PROXY"),
        network_policies=fields.inner("networkPolicies").truth("enabled"),
        impersonation=fields.text("enableImpersonation"),
        oidc=_oidc(fields),
        resources=_resources(fields),
    )
    fields.text("spokeAddonNamespace")
    if problems:
        raise UnrenderableError([str(problem) for problem in problems])
    return parsed


class _Values(Fields):
    """Values of the chart, some of which may be texts instead: so customized variables are."""

    def __init__(self, value: object, path: str, problems: list[Problem]) -> None:
        super().__init__(value, path, problems)
        self._raw: Any = value if isinstance(value, dict) else {}
        self._noted = problems

    def inner(self, name: str) -> _Values:
        return _Values(self._raw.get(name), name, self._noted)

    def truth(self, name: str) -> bool:
        value = self._raw.get(name)
        if not isinstance(value, bool | None):
            self.problem(name, f"must be true or false, not {shown(value)}")
        return value is True

    def switch(self, name: str) -> bool:
        """Return a truth that may be a text as well. The original took any text but the empty one for true."""
        value = self._raw.get(name)
        if not isinstance(value, str):
            return self.truth(name)
        if value not in (*TRUE, *FALSE, ""):
            self.problem(name, f"must be true or false, not {shown(value)}")
        return value in TRUE

    def number(self, name: str, lowest: int, highest: int) -> int:
        value = self._raw.get(name)
        if value is None:
            self.problem(name, "is required")
        if not isinstance(value, str):
            return self.integer(name, lowest, lowest, highest)
        if not _NUMBER.fullmatch(value) or not lowest <= int(value) <= highest:
            self.problem(
                name,
                f"must be a whole number between {lowest} and {highest}, not {shown(value)}",
            )
            return lowest
        return int(value)

    def base64(self, name: str) -> str:
        text = self.text(name)
        if not _BASE64.fullmatch(text):
            self.problem(name, f"must be base64, not {shown(text)}")
        return text

    def joined(self, name: str) -> str:
        """Return a list of texts as one, or what is one already."""
        value = self._raw.get(name)
        return value if isinstance(value, str) else ",".join(self.texts(name))

    def prefixes(self, name: str) -> str:
        """Return what :meth:`joined` does. It has to be given, and no prefix may be empty: all names begin with it."""
        if not self.has(name):
            self.problem(name, "is required; an empty text reserves none")
        value = self._raw.get(name)
        if isinstance(value, str):
            if not _PREFIXES.fullmatch(value):
                self.problem(name, f"must not have an empty prefix between commas: {shown(value)}")
        else:
            for called, element in self.items(name):
                if element == "":
                    self.problem(called, "must not be empty")
        return self.joined(name) if self.has(name) else ""


def _oidc(fields: _Values) -> Oidc:
    return Oidc(
        issuer=fields.text("oidcIssuerURL"),
        client=fields.text("oidcClientID"),
        username_claim=fields.text("oidcUsernameClaim"),
        username_prefix=fields.text("oidcUsernamePrefix"),
        groups_claim=fields.text("oidcGroupsClaim"),
        groups_prefix=fields.text("oidcGroupsPrefix"),
        reserved_prefixes=fields.prefixes("oidcReservedNamePrefixes"),
        ca_config_map=fields.text("oidcCAConfigMap"),
        signing_algorithms=fields.joined("oidcSigningAlgs"),
        required_claims=fields.text("oidcRequiredClaimsJSON"),
    )


def _exposed(fields: Fields) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    for called, element in fields.items("servicesToExpose"):
        service = fields.element(called, element)
        names = service.text("Host", required=True), service.text("ExternalName", required=True)
        found.append(names)
    return tuple(found)


def _tolerations(fields: Fields) -> tuple[Object, ...]:
    found: list[Object] = []
    for called, element in fields.items("tolerations"):
        given = fields.element(called, element)
        if not given.given:
            fields.problem(called, "must be an object, not None")
        texts = {name: given.text(name) for name in _TOLERATION}
        toleration: Object = {name: text for name, text in texts.items() if text}
        if given.has("tolerationSeconds"):
            seconds = given.integer("tolerationSeconds", 0, -(2**63), 2**63 - 1)
            toleration["tolerationSeconds"] = seconds
        found.append(toleration)
    return tuple(found)


def _resources(fields: Fields) -> tuple[tuple[re.Pattern[str], Object], ...]:
    found: list[tuple[re.Pattern[str], Object]] = []
    group = fields.part("global")
    for called, element in group.items("resourceRequirements"):
        requirement = group.element(called, element)
        pattern = requirement.text("containerIDRegex", required=True)
        resources = dict(requirement.entries("resources"))
        try:
            with warnings.catch_warnings():
                # Of what may mean something else in a Python to come.
                warnings.simplefilter("ignore", FutureWarning)
                found.append((re.compile(pattern), resources))
        except (re.error, OverflowError, RecursionError) as error:
            requirement.problem(
                "containerIDRegex", f"{shown(pattern)} is no regular expression: {error}"
            )
    return tuple(found)

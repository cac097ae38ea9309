"""What an AddOnDeploymentConfig asks of the agent. Pure.

v1alpha1 and v1beta1 have the same fields. Sources: upstream ``pkg/proxyagent/agent/agent.go``
``toAgentAddOnChartValues``, addon-framework ``pkg/addonfactory/addondeploymentconfig.go``.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING, Final

import attrs
from cryptography.hazmat.primitives.serialization import Encoding

from clusterproxy.kube.resource import text_at

from .agent_images import Mirror, parse_mirrors
from .certificates import CertificateError, load_certificates
from .fields import NAMESPACE, Fields, shown

if TYPE_CHECKING:
    from clusterproxy.kube.resource import Object

    from .fields import Problem

GROUP: Final = "addon.open-cluster-management.io"
RESOURCE: Final = "addondeploymentconfigs"

# Source: k8s.io/apimachinery pkg/api/resource, type Quantity.
_QUANTITY: Final = re.compile(
    r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?"
)


@attrs.frozen(kw_only=True)
class NodePlacement:
    """Where the agent's pods may run. It replaces what the chart says, even if it is empty."""

    node_selector: dict[str, str]
    tolerations: list[object]


@attrs.frozen(kw_only=True)
class DeploymentConfig:
    """An AddOnDeploymentConfig."""

    install_namespace: str = ""
    """Empty if it names none."""
    variables: dict[str, str] = attrs.field(factory=dict[str, str])
    """Values of the agent's chart, all of them texts."""
    node_placement: NodePlacement | None = None
    http_proxy: str = ""
    https_proxy: str = ""
    no_proxy: str = ""
    proxy_ca: bytes = b""
    """What the HTTPS proxy's certificate is checked with, as PEM."""
    resources: tuple[tuple[str, Object], ...] | None = None
    """Regular expressions for containers, and what those get; the last that matches holds. None leaves the chart's."""
    mirrors: tuple[Mirror, ...] = ()

    def values(self, ca_bundle: bytes) -> Object:
        """Return the values of the agent's chart that it stands for.

        Args:
          ca_bundle: what the proxy servers' certificates are checked with, as PEM.
        """
        values: Object = dict(self.variables)
        if "digest" not in values and ("image" in values or "tag" in values):
            # The digest of another image would decide.
            values["digest"] = ""
        if self.node_placement is not None:
            values["nodeSelector"] = dict(self.node_placement.node_selector)
            values["tolerations"] = list(self.node_placement.tolerations)
        values["proxyConfig"] = {
            "HTTP_PROXY": self.http_proxy,
            "HTTPS_PROXY": self.https_proxy,
            "NO_PROXY": self.no_proxy,
        }
        if self.proxy_ca and self.https_proxy.lower().startswith("https"):
            merged = merge_certificates(self.proxy_ca, ca_bundle)
            values["base64EncodedCAData"] = base64.b64encode(merged).decode()
        if self.resources is not None:
            values["global"] = {
                "resourceRequirements": [
                    {"containerIDRegex": pattern, "resources": resources}
                    for pattern, resources in self.resources
                ]
            }
        return values


def called(obj: Object) -> str:
    """Return what an AddOnDeploymentConfig is called in messages."""
    return f"AddOnDeploymentConfig {text_at(obj, 'metadata', 'namespace')}/{text_at(obj, 'metadata', 'name')}"


def parse_deployment_config(obj: Object, problems: list[Problem]) -> DeploymentConfig:
    """Read an AddOnDeploymentConfig of any shape; what is wrong is added to *problems*."""
    spec = Fields(obj.get("spec"), "spec", problems)
    placement = spec.part("nodePlacement")
    proxy = spec.part("proxyConfig")
    return DeploymentConfig(
        install_namespace=spec.name("agentInstallNamespace", "", NAMESPACE, 63),
        variables=_variables(spec),
        node_placement=NodePlacement(
            node_selector=placement.mapping("nodeSelector"),
            # What is in them is checked as the value of the chart.
            tolerations=[element for _, element in placement.items("tolerations")],
        )
        if placement.given
        else None,
        http_proxy=proxy.text("httpProxy"),
        https_proxy=proxy.text("httpsProxy"),
        no_proxy=proxy.text("noProxy"),
        proxy_ca=_proxy_ca(proxy),
        resources=_resources(spec) if spec.has("resourceRequirements") else None,
        mirrors=parse_mirrors(spec),
    )


def merge_certificates(*bundles: bytes) -> bytes:
    """Return the certificates of all *bundles*, each of which has at least one, without duplicates, in their order."""
    certificates = [each for bundle in bundles for each in load_certificates(bundle, "certificate")]
    return b"".join(each.public_bytes(Encoding.PEM) for each in dict.fromkeys(certificates))


def _variables(spec: Fields) -> dict[str, str]:
    found: dict[str, str] = {}
    for place, element in spec.items("customizedVariables"):
        variable = spec.element(place, element)
        if name := variable.text("name", required=True):
            found[name] = variable.text("value")
    return found


def _proxy_ca(proxy: Fields) -> bytes:
    text = proxy.text("caBundle")
    if not text:
        return b""
    try:
        bundle = base64.b64decode(text, validate=True)
        load_certificates(bundle, "it")
    except (binascii.Error, ValueError):
        proxy.problem("caBundle", "must be base64 of certificates in PEM")
        return b""
    except CertificateError as error:
        proxy.problem("caBundle", f"must hold certificates in PEM: {error}")
        return b""
    return bundle


def _resources(spec: Fields) -> tuple[tuple[str, Object], ...]:
    found: list[tuple[str, Object]] = []
    for place, element in spec.items("resourceRequirements"):
        requirement = spec.element(place, element)
        container = requirement.text("containerID", required=True)
        parts = container.split(":")
        if container and (len(parts) != 3 or not all(parts)):
            requirement.problem(
                "containerID",
                f"{shown(container)} is no container: write deployments:cluster-proxy-proxy-agent:proxy-agent, "
                "with * for any of the parts",
            )
        given = requirement.part("resources")
        lists = {name: _quantities(given, name) for name in ("requests", "limits")}
        resources: Object = {name: quantities for name, quantities in lists.items() if quantities}
        found.append((f"^{':'.join(map(_pattern, parts))}$", resources))
    return tuple(found)


def _pattern(part: str) -> str:
    # Of several stars in a row each would be tried with each: that takes for ever.
    part = re.sub(r"\*+", "*", part)
    if part == "*":
        return ".+"
    return ".*".join(re.escape(piece) for piece in part.split("*"))


def _quantities(resources: Fields, name: str) -> dict[str, str]:
    """Return a list of resources; a quantity may be a number as well."""
    found: dict[str, str] = {}
    for key, value in resources.entries(name):
        text = str(value) if isinstance(value, (str, int, float)) else ""
        if isinstance(value, bool) or not _QUANTITY.fullmatch(text):
            resources.problem(
                f"{name}[{key}]", f"must be a quantity such as 100m or 64Mi, not {shown(value)}"
            )
        else:
            found[key] = text
    return found

"""What of the hub's side of the tunnel the agents depend on, as it is at some time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from clusterproxy.kube.resource import SECRETS, SERVICES, map_at

from .ca_rotation import Phase
from .certificates import CertificateError, load_certificates
from .configuration import (
    MAIN_CONFIGURATION,
    PROXY_SERVER_CA_SECRET,
    EntrypointType,
    InvalidConfiguration,
    ProxyConfiguration,
    SignerType,
    parse_configuration,
)
from .leaves import secret_data
from .objects import find
from .signer import SignerInvalid

if TYPE_CHECKING:
    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Object

    from .certificates import Authority
    from .signer import Signer


@attrs.frozen(kw_only=True)
class HubSight:
    """The hub's side, equal to another one if agents need not be made anew.

    Attributes:
      configuration: None if there is none that can be used.
      problem: why there is none, empty if it is only that there is none.
      authority: what signs agents' certificates, None if there is none that can be used.
      retiring: whether it has replaced another one that is trusted yet.
      authority_problem: why there is none and will be none by itself, empty otherwise.
      ca_bundle: what proxy servers' certificates are verified with, as PEM; empty if there is none.
      bundle_problem: why there is none.
      load_balancer: the Service that agents dial, None without one.
    """

    configuration: ProxyConfiguration | None = None
    problem: str = ""
    authority: Authority | None = None
    retiring: bool = False
    authority_problem: str = ""
    ca_bundle: bytes = b""
    bundle_problem: str = ""
    load_balancer: Object | None = None


async def look(api: KubeApi, signer: Signer, live: Object | None) -> HubSight:
    """Return what there is.

    Args:
      live: the ManagedProxyConfiguration that agents go by, None if there is none.

    Raises:
      KubeError: what the apiserver says.
    """
    authority, retiring, trouble = await _authority(signer)
    if live is None:
        return HubSight(authority=authority, retiring=retiring, authority_problem=trouble)
    try:
        configuration = parse_configuration(live, signer_secret=signer.name)
    except InvalidConfiguration as error:
        return HubSight(
            problem=f"ManagedProxyConfiguration {MAIN_CONFIGURATION}: {error}",
            authority=authority,
            retiring=retiring,
            authority_problem=trouble,
        )
    if authority is None and configuration.signer_type is SignerType.PROVIDED and not trouble:
        trouble = (
            f"Secret {signer.namespace}/{signer.name} is not there: with signer Provided, put the authority that signs "
            "agents' certificates there (ca.crt and ca.key)"
        )
    bundle, missing = await _bundle(api, configuration.proxy_server.namespace)
    return HubSight(
        configuration=configuration,
        authority=authority,
        retiring=retiring,
        authority_problem=trouble,
        ca_bundle=bundle,
        bundle_problem=missing,
        load_balancer=await _load_balancer(api, configuration),
    )


async def _authority(signer: Signer) -> tuple[Authority | None, bool, str]:
    try:
        sight = await signer.look()
    except SignerInvalid as error:
        return None, False, str(error)
    if sight is None:
        return None, False, ""
    return sight.state.authority, sight.state.phase is Phase.RETIRE, ""


async def _bundle(api: KubeApi, namespace: str) -> tuple[bytes, str]:
    secret = await find(api, SECRETS, PROXY_SERVER_CA_SECRET, namespace)
    bundle = secret_data(secret or {}).get("ca.crt", b"")
    try:
        load_certificates(bundle, "ca.crt")
    except CertificateError as error:
        reason = "it is not there" if secret is None else str(error)
        return b"", (
            f"Secret {namespace}/{PROXY_SERVER_CA_SECRET}: {reason}; the conditions of ManagedProxyConfiguration "
            f"{MAIN_CONFIGURATION} say more"
        )
    return bundle, ""


async def _load_balancer(api: KubeApi, configuration: ProxyConfiguration) -> Object | None:
    server = configuration.proxy_server
    if server.entrypoint.type is not EntrypointType.LOAD_BALANCER:
        return None
    service = await find(api, SERVICES, server.entrypoint.load_balancer_name, server.namespace)
    if service is None:
        return None
    # Of all else in it nothing is an agent's.
    return {"status": {"loadBalancer": map_at(service, "status", "loadBalancer")}}

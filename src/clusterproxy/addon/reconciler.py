"""Keeps the hub's side of the tunnel as one ManagedProxyConfiguration says.

Every reconcile reads what there is and changes what differs, so it can begin anew at any time: after a crash, after
another manager, after somebody's hand. In steady state it writes nothing. Source: upstream ``pkg/proxyserver/controllers/
manageproxyconfig_controller.go``; what differs from it is in docs/compatibility.md.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final

from clusterproxy.errors import AlreadyExists, KubeError
from clusterproxy.kube.resource import (
    DEPLOYMENTS,
    MANAGED_PROXY_CONFIGURATIONS,
    NAMESPACES,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    list_at,
    map_at,
    text_at,
    value_at,
)

from .ca_progress import CAProgress
from .conditions import merge_conditions
from .configuration import (
    DEFAULT_NAMESPACE,
    MAIN_CONFIGURATION,
    PROXY_SERVER_CA_SECRET,
    EntrypointType,
    InvalidConfiguration,
    SignerType,
    parse_configuration,
)
from .contention import ConflictingWriter, Contention
from .findings import (
    CA_ROTATION,
    DEPLOYED,
    ENTRYPOINT,
    RECONCILED,
    USER_SIGNED,
    VALID,
    Blocked,
    Findings,
)
from .hub_certificates import HubCertificates
from .hub_objects import hub_objects, load_balancer, owner_reference, wanted_leaves
from .objects import PASSING, NameTaken, ensure, find, patiently
from .proxy_deployment import SELECTOR, SERVICE_ACCOUNT, replicas_for_now, tls_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.events import EventRecorder
    from clusterproxy.kube.resource import Object, Resource
    from clusterproxy.kube.tls_profile import TlsProfile
    from clusterproxy.telemetry.controller_metrics import ControllerMetrics

    from .ca_rotation import State
    from .configuration import ProxyConfiguration
    from .owned import OwnedObjects
    from .signer import Signer

_log = logging.getLogger("clusterproxy.addon")

#: Even if nothing is told to have changed, each configuration is looked at so often: certificates age.
RESYNC_S: Final = 600.0
# Until proxy servers are replaced, so that there can be more of them.
_SERVERS_REPLACED_S: Final = 1.0

# What goes away by itself is told of when it has not after so many attempts, which is after some seconds.
_PATIENCE: Final = 5

_CONTENDED_S: Final = 1.0


class ConfigurationReconciler:
    """Looks after configurations, one at a time.

    Args:
      tls: returns the TLS profile that is in force, None if that is not known, and what is wrong with the one that is
        configured, if anything.
      agents: see :class:`~.ca_progress.CAProgress`.
      clock: returns the time.
    """

    def __init__(
        self,
        api: KubeApi,
        *,
        signer: Signer,
        owned: OwnedObjects,
        events: EventRecorder,
        metrics: ControllerMetrics,
        tls: Callable[[], tuple[TlsProfile | None, str]],
        agents: Callable[[State], Mapping[str, str] | None],
        image_pull_policy: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api = api
        self._signer = signer
        self._owned = owned
        self._events = events
        self._certificates = HubCertificates(api, signer, events, metrics)
        self._progress = CAProgress(api, signer, events, agents)
        self._tls = tls
        self._image_pull_policy = image_pull_policy
        self._clock = clock
        # By configuration: two that want different things of one object are a conflict, too.
        self._contentions: dict[str, Contention] = {}
        self._failures: Counter[str] = Counter()
        self._contended: set[str] = set()

    def pause(self, name: str) -> float:
        """Return in how many seconds a configuration is to be looked at when something that it owns has changed."""
        # Whoever changes things back all the time would have it looked at all the time.
        return _CONTENDED_S if name in self._contended else 0.0

    async def reconcile(self, name: str) -> float | None:
        """Make everything be as a configuration says; return seconds until it is to be looked at again.

        Raises:
          KubeError: what the apiserver says; it stands in the configuration's conditions, too, if that can be written.
        """
        live = await self._find(MANAGED_PROXY_CONFIGURATIONS, name)
        if live is None:
            self._owned.forget(name)
            self._contentions.pop(name, None)
            self._contended.discard(name)
            self._certificates.forget(name)
            del self._failures[name]
            return None
        if value_at(live, "metadata", "deletionTimestamp"):
            # What it owns is collected with it.
            return None
        findings = Findings()
        try:
            again = await self._converge(live, findings)
        except NameTaken as error:
            findings.note(RECONCILED, False, "NameTaken", str(error))
            self._events.note(live, "Warning", "NameTaken", str(error))
            again = RESYNC_S
        except Blocked as blocked:
            findings.note(blocked.kind, False, blocked.reason, str(blocked))
            findings.note(RECONCILED, False, blocked.reason, str(blocked))
            self._events.note(live, "Warning", blocked.reason, str(blocked))
            again = RESYNC_S
        except KubeError as error:
            self._failures[name] += 1
            if not isinstance(error, PASSING) or self._failures[name] >= _PATIENCE:
                reason = error.reason or "ApiserverError"
                findings.note(RECONCILED, False, reason, error.message)
                self._events.note(live, "Warning", reason, error.message)
                with contextlib.suppress(KubeError):
                    await self._report(live, findings)
            raise
        else:
            if findings.contended:
                message = "; ".join(map(str, findings.contended))
                findings.note(RECONCILED, False, "ConflictingWriter", message)
                self._events.note(live, "Warning", "ConflictingWriter", message)
                again = min(again, *(each.seconds for each in findings.contended))
                self._contended.add(name)
            else:
                self._contended.discard(name)
                findings.note(RECONCILED, True, "Reconciled", "all is as configured")
        await self._report(live, findings)
        del self._failures[name]
        return again

    async def _converge(self, live: Object, findings: Findings) -> float:
        configuration = self._read(live, findings)
        server = configuration.proxy_server
        namespace = server.namespace
        await self._check_alone(configuration, live)
        self._owned.look_after(
            configuration.name,
            namespace,
            [
                (SERVICES, namespace, server.entrypoint.load_balancer_name),
                (SECRETS, self._signer.namespace, self._signer.name),
                (SECRETS, namespace, PROXY_SERVER_CA_SECRET),
                *((SECRETS, namespace, name) for name in wanted_leaves(configuration, "")),
            ],
        )
        await self._ensure_namespace(namespace)
        address = await self._entrypoint(configuration, live, findings)
        now = self._clock()
        rotates = (
            configuration.signer_type is SignerType.SELF_SIGNED
            and configuration.name == MAIN_CONFIGURATION
        )
        seen = await self._progress.look(now) if rotates else None
        bundle = await self._certificates.certify(
            live,
            configuration,
            address,
            await self._main_owner(configuration),
            now,
            self._contention(configuration),
            findings,
        )
        again = await self._deploy(configuration, bundle, findings)
        if seen is None:
            findings.withdrawn.add(CA_ROTATION)
            return again
        return min(again, await self._progress.go_on(live, seen, now, findings))

    def _read(self, live: Object, findings: Findings) -> ProxyConfiguration:
        try:
            configuration = parse_configuration(live, signer_secret=self._signer.name)
        except InvalidConfiguration as error:
            raise Blocked(VALID, "InvalidConfiguration", str(error)) from error
        if configuration.signer_type is SignerType.CERT_MANAGER:
            raise Blocked(
                VALID,
                "SignerNotSupported",
                "spec.authentication.signer.type: CertManager is not supported yet: use SelfSigned, or "
                "Provided with secrets that cert-manager fills",
            )
        _, problem = self._tls()
        if problem:
            # The servers go on with the profile that was good.
            findings.note(VALID, False, "InvalidTLSProfile", problem)
        else:
            findings.note(VALID, True, "Valid", "")
        return configuration

    async def _check_alone(self, configuration: ProxyConfiguration, live: Object) -> None:
        """Most names are the same for all configurations: of several in a namespace the oldest has it.

        Raises:
          Blocked: another one has it.
        """
        step = partial(self._api.list, MANAGED_PROXY_CONFIGURATIONS)
        for other in (await patiently(step)).items:
            namespace = text_at(other, "spec", "proxyServer", "namespace") or DEFAULT_NAMESPACE
            if namespace == configuration.proxy_server.namespace and _age(other) < _age(live):
                raise Blocked(
                    VALID,
                    "NamespaceTaken",
                    f"spec.proxyServer.namespace: {namespace} is that of ManagedProxyConfiguration "
                    f"{text_at(other, 'metadata', 'name')} already: choose another one",
                )

    async def _ensure_namespace(self, namespace: str) -> None:
        if await self._find(NAMESPACES, namespace) is None:
            try:
                await self._api.create(
                    NAMESPACES,
                    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
                )
            except AlreadyExists:
                return
            _log.info("created namespace %s", namespace)

    async def _entrypoint(
        self, configuration: ProxyConfiguration, live: Object, findings: Findings
    ) -> str:
        """Return the load balancer's address, or nothing where there is no load balancer."""
        entrypoint = configuration.proxy_server.entrypoint
        if entrypoint.type is not EntrypointType.LOAD_BALANCER:
            findings.note(ENTRYPOINT, True, "NotNeeded", f"the entrypoint is {entrypoint.type}")
            return ""
        namespace, name = configuration.proxy_server.namespace, entrypoint.load_balancer_name
        service = await self._find(SERVICES, name, namespace)
        if service is None:
            wanted, problems = load_balancer(configuration)
            for problem in problems:
                self._events.note(live, "Warning", "InvalidAnnotation", str(problem))
            service = await self._api.create(SERVICES, wanted)
            _log.info("created load balancer service %s/%s", namespace, name)
        if (
            text_at(service, "spec", "type") != "LoadBalancer"
            or map_at(service, "spec", "selector") != SELECTOR
        ):
            raise Blocked(
                ENTRYPOINT,
                "NameTaken",
                f"Service {namespace}/{name} is there already and is not a load balancer of the proxy servers: delete it, or "
                "name another one in spec.proxyServer.entrypoint.loadBalancerService.name",
            )
        for ingress in list_at(service, "status", "loadBalancer", "ingress"):
            address = text_at(ingress, "ip") or text_at(ingress, "hostname")
            if address:
                findings.note(ENTRYPOINT, True, "Provisioned", address)
                return address
        raise Blocked(
            ENTRYPOINT,
            "AwaitingAddress",
            f"the external ip of load balancer service {namespace}/{name} is not yet provisioned",
        )

    async def _main_owner(self, configuration: ProxyConfiguration) -> Object | None:
        """Return the owner of CA and certificates: the configuration ``cluster-proxy``, whoever they are for."""
        if configuration.name == MAIN_CONFIGURATION:
            return owner_reference(configuration)
        main = await self._find(MANAGED_PROXY_CONFIGURATIONS, MAIN_CONFIGURATION)
        if main is None:
            return None
        return {
            **owner_reference(configuration),
            "name": MAIN_CONFIGURATION,
            "uid": main["metadata"]["uid"],
        }

    # -- objects -----------------------------------------------------------------------------------

    async def _deploy(
        self, configuration: ProxyConfiguration, bundle: bytes, findings: Findings
    ) -> float:
        """See to all other objects; return in how many seconds to look again."""
        server, again = configuration.proxy_server, RESYNC_S
        servers = await self._find(DEPLOYMENTS, configuration.name, server.namespace) or {}
        if not servers:
            # That is what is told if it cannot be made.
            findings.note(
                DEPLOYED,
                False,
                "NotYetDeployed",
                f"there is no Deployment {server.namespace}/{configuration.name} yet",
            )
        profile, _ = self._tls()
        if profile is None:
            # Not known, after a restart: what the servers have was good once.
            profile = tls_of(servers)
        account = await self._find(
            SERVICE_ACCOUNTS, SERVICE_ACCOUNT, configuration.proxy_server.namespace
        )
        for resource, rendered in hub_objects(
            configuration,
            bundle,
            pull_secrets=list_at(account or {}, "imagePullSecrets"),
            tls_min_version=profile.min_version,
            cipher_suites=profile.cipher_suites,
            image_pull_policy=self._image_pull_policy,
        ):
            if resource is SECRETS and configuration.signer_type is SignerType.PROVIDED:
                continue
            if resource is DEPLOYMENTS:
                for_now = replicas_for_now(servers, server.replicas)
                if for_now != server.replicas:
                    rendered["spec"]["replicas"], again = for_now, _SERVERS_REPLACED_S
            step = partial(ensure, self._api, resource, rendered, self._contention(configuration))
            try:
                present = await patiently(step)
            except ConflictingWriter as error:
                findings.contended.append(error)
                if resource is DEPLOYMENTS:
                    findings.note(DEPLOYED, False, "ConflictingWriter", str(error))
                continue
            except NameTaken as error:
                if resource is DEPLOYMENTS:
                    findings.note(DEPLOYED, False, "NameTaken", str(error))
                raise
            if resource is DEPLOYMENTS:
                replicas = value_at(present, "status", "replicas") or 0
                findings.note(DEPLOYED, True, "SuccessfullyDeployed", f"Replicas: {replicas}")
        return again

    async def _find(
        self, resource: Resource, name: str, namespace: str | None = None
    ) -> Object | None:
        return await patiently(partial(find, self._api, resource, name, namespace))

    def _contention(self, configuration: ProxyConfiguration) -> Contention:
        return self._contentions.setdefault(configuration.name, Contention())

    async def _report(self, live: Object, findings: Findings) -> None:
        """Write status if there is something new to tell."""
        generation = value_at(live, "metadata", "generation") or 0
        status = dict(map_at(live, "status"))
        merged = merge_conditions(
            status.get("conditions"),
            findings.conditions,
            now=self._clock(),
            generation=generation,
            # Of what is not asked for any more nothing is to be told.
            withdrawn=findings.withdrawn
            | (set() if value_at(live, "spec", "userServer") is not None else {USER_SIGNED}),
        )
        if (
            merged == status.get("conditions")
            and status.get("lastObservedGeneration") == generation
        ):
            return
        status["conditions"] = merged
        status["lastObservedGeneration"] = generation
        await self._api.replace(
            MANAGED_PROXY_CONFIGURATIONS, {**live, "status": status}, subresource="status"
        )


def _age(configuration: Object) -> tuple[str, str]:
    return text_at(configuration, "metadata", "creationTimestamp"), text_at(
        configuration, "metadata", "name"
    )

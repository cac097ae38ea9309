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
    SERVICES,
    list_at,
    map_at,
    text_at,
    value_at,
)

from .certificates import CertificateError, go_time, load_certificates, not_after
from .conditions import merge_conditions
from .configuration import (
    PROXY_SERVER_CA_SECRET,
    USER_SERVER_SECRET,
    EntrypointType,
    InvalidConfiguration,
    SignerType,
    parse_configuration,
)
from .contention import ConflictingWriter, Contention
from .hub_objects import hub_objects, load_balancer, owner_reference, wanted_leaves
from .leaves import ensure_leaf, secret_data
from .objects import PASSING, ensure, find, patiently
from .provided import why_unusable
from .signer import SignerInvalid

if TYPE_CHECKING:
    from collections.abc import Callable

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.events import EventRecorder
    from clusterproxy.kube.resource import Object, Resource
    from clusterproxy.telemetry.controller_metrics import ControllerMetrics

    from .certificates import Leaf
    from .configuration import ProxyConfiguration
    from .owned import OwnedObjects
    from .signer import Signer
    from .tls_profile import TlsProfile

_log = logging.getLogger("clusterproxy.addon")

#: Even if nothing is told to have changed, each configuration is looked at so often: certificates age.
RESYNC_S: Final = 600.0

# What goes away by itself is told of when it has not after so many attempts, which is after some seconds.
_PATIENCE: Final = 5

_CONTENDED_S: Final = 1.0

# The configuration that owns the CA's secret, and by which its rotation goes.
_MAIN: Final = "cluster-proxy"

VALID: Final = "ConfigurationValid"
ENTRYPOINT: Final = "EntrypointProvisioned"
DEPLOYED: Final = "ProxyServerDeployed"
RECONCILED: Final = "Reconciled"
_SERVER_SIGNED: Final = "ProxyServerSecretSigned"
_USER_SIGNED: Final = "UserServerSecretSigned"


class Blocked(Exception):
    """The rest has to wait for something; the condition says for what."""

    def __init__(self, kind: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.reason = reason


class Conditions:
    """What is found out about a configuration while it is looked at."""

    def __init__(self) -> None:
        self.found: list[Object] = []
        self.contended: list[ConflictingWriter] = []

    def note(self, kind: str, status: bool, reason: str, message: str = "") -> None:
        self.found = [each for each in self.found if each["type"] != kind]
        self.found.append(
            {
                "type": kind,
                "status": "True" if status else "False",
                "reason": reason,
                "message": message,
            }
        )


class ConfigurationReconciler:
    """Looks after configurations, one at a time.

    Args:
      tls: returns the TLS profile that is in force, and what is wrong with the one that is configured, if anything.
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
        tls: Callable[[], tuple[TlsProfile, str]],
        image_pull_policy: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api = api
        self._signer = signer
        self._owned = owned
        self._events = events
        self._metrics = metrics
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
            del self._failures[name]
            return None
        if value_at(live, "metadata", "deletionTimestamp"):
            # What it owns is collected with it.
            return None
        conditions = Conditions()
        try:
            again = await self._converge(live, conditions)
        except Blocked as blocked:
            conditions.note(blocked.kind, False, blocked.reason, str(blocked))
            conditions.note(RECONCILED, False, blocked.reason, str(blocked))
            self._events.note(live, "Warning", blocked.reason, str(blocked))
            again = RESYNC_S
        except KubeError as error:
            self._failures[name] += 1
            if not isinstance(error, PASSING) or self._failures[name] >= _PATIENCE:
                reason = error.reason or "ApiserverError"
                conditions.note(RECONCILED, False, reason, error.message)
                self._events.note(live, "Warning", reason, error.message)
                with contextlib.suppress(KubeError):
                    await self._report(live, conditions)
            raise
        else:
            if conditions.contended:
                message = "; ".join(map(str, conditions.contended))
                conditions.note(RECONCILED, False, "ConflictingWriter", message)
                self._events.note(live, "Warning", "ConflictingWriter", message)
                again = min(again, *(each.seconds for each in conditions.contended))
                self._contended.add(name)
            else:
                self._contended.discard(name)
                conditions.note(RECONCILED, True, "Reconciled", "all is as configured")
        await self._report(live, conditions)
        del self._failures[name]
        return again

    async def _converge(self, live: Object, conditions: Conditions) -> float:
        configuration = self._read(live, conditions)
        server = configuration.proxy_server
        namespace = server.namespace
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
        address = await self._entrypoint(configuration, live, conditions)
        owner = await self._main_owner(configuration)
        now = self._clock()
        leaves = wanted_leaves(configuration, address)
        if configuration.signer_type is SignerType.SELF_SIGNED:
            bundle = await self._sign(configuration, live, leaves, owner, now, conditions)
        else:
            bundle = await self._provided(configuration, leaves, now, conditions)
        await self._deploy(configuration, live, bundle, conditions)
        if configuration.signer_type is SignerType.SELF_SIGNED and configuration.name == _MAIN:
            return await self._rotate(live, now)
        return RESYNC_S

    def _read(self, live: Object, conditions: Conditions) -> ProxyConfiguration:
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
            conditions.note(VALID, False, "InvalidTLSProfile", problem)
        else:
            conditions.note(VALID, True, "Valid", "")
        return configuration

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
        self, configuration: ProxyConfiguration, live: Object, conditions: Conditions
    ) -> str:
        """Return the load balancer's address, or nothing where there is no load balancer."""
        entrypoint = configuration.proxy_server.entrypoint
        if entrypoint.type is not EntrypointType.LOAD_BALANCER:
            conditions.note(ENTRYPOINT, True, "NotNeeded", f"the entrypoint is {entrypoint.type}")
            return ""
        namespace, name = configuration.proxy_server.namespace, entrypoint.load_balancer_name
        service = await self._find(SERVICES, name, namespace)
        if service is None:
            wanted, problems = load_balancer(configuration)
            for problem in problems:
                self._events.note(live, "Warning", "InvalidAnnotation", str(problem))
            service = await self._api.create(SERVICES, wanted)
            _log.info("created load balancer service %s/%s", namespace, name)
        for ingress in list_at(service, "status", "loadBalancer", "ingress"):
            address = text_at(ingress, "ip") or text_at(ingress, "hostname")
            if address:
                conditions.note(ENTRYPOINT, True, "Provisioned", address)
                return address
        raise Blocked(
            ENTRYPOINT,
            "AwaitingAddress",
            f"the external ip of load balancer service {namespace}/{name} is not yet provisioned",
        )

    async def _main_owner(self, configuration: ProxyConfiguration) -> Object | None:
        """Return the owner of CA and certificates: the configuration ``cluster-proxy``, whoever they are for."""
        if configuration.name == _MAIN:
            return owner_reference(configuration)
        main = await self._find(MANAGED_PROXY_CONFIGURATIONS, _MAIN)
        if main is None:
            return None
        return {
            **owner_reference(configuration),
            "name": _MAIN,
            "uid": main["metadata"]["uid"],
        }

    # -- certificates ------------------------------------------------------------------------------

    async def _sign(
        self,
        configuration: ProxyConfiguration,
        live: Object,
        leaves: dict[str, Leaf],
        owner: Object | None,
        now: datetime,
        conditions: Conditions,
    ) -> bytes:
        try:
            state = await patiently(partial(self._signer.state, owner, now))
        except SignerInvalid as error:
            raise Blocked(_SERVER_SIGNED, "SignerInvalid", str(error)) from error
        if state.authority.expired(now):
            # The rotation replaces it at once.
            expired = go_time(state.authority.certificate.not_valid_after_utc)
            await self._signer.advance(now, bundle_delivered=True, previous_unused=True)
            self._events.note(
                live,
                "Warning",
                "CAExpired",
                f"the certificate authority in Secret {self._signer.namespace}/{self._signer.name} expired at {expired} and "
                "was replaced: whoever has an older ca.crt needs the new one",
            )
            state = await self._signer.state(owner, now)
        namespace = configuration.proxy_server.namespace
        contention = self._contention(configuration)
        for name, leaf in leaves.items():
            try:
                end, issued = await patiently(
                    partial(
                        ensure_leaf,
                        self._api,
                        namespace,
                        name,
                        leaf,
                        state.authority,
                        owner=owner,
                        now=now,
                        contention=contention,
                    )
                )
            except ConflictingWriter as error:
                kind = _condition_of(configuration, name)
                conditions.note(kind, False, "ConflictingWriter", str(error))
                conditions.contended.append(error)
                continue
            except CertificateError as error:
                raise Blocked(
                    _condition_of(configuration, name), "NotYetSigned", str(error)
                ) from error
            self._note_certificate(configuration, name, end, conditions)
            if issued is not None:
                self._metrics.certificates_issued_total.labels(name).inc()
        return state.bundle()

    async def _provided(
        self,
        configuration: ProxyConfiguration,
        leaves: dict[str, Leaf],
        now: datetime,
        conditions: Conditions,
    ) -> bytes:
        namespace = configuration.proxy_server.namespace
        secret = await self._find(SECRETS, PROXY_SERVER_CA_SECRET, namespace)
        bundle = secret_data(secret or {}).get("ca.crt", b"")
        try:
            trusted = load_certificates(bundle, "ca.crt")
        except CertificateError as error:
            raise Blocked(
                _SERVER_SIGNED,
                "NotYetProvided",
                f"Secret {namespace}/{PROXY_SERVER_CA_SECRET}: {error}; provide the CAs to be trusted there",
            ) from error
        problems: list[str] = []
        for name, leaf in leaves.items():
            secret = await self._find(SECRETS, name, namespace)
            data = secret_data(secret or {})
            problem = "is not there" if secret is None else why_unusable(data, leaf, trusted, now)
            if problem is None:
                self._note_certificate(configuration, name, not_after(data["tls.crt"]), conditions)
                continue
            problems.append(f"Secret {namespace}/{name}: {problem}")
            kind = _condition_of(configuration, name)
            conditions.note(kind, False, "NotYetProvided", problems[-1])
        if problems:
            raise Blocked(VALID, "NotYetProvided", "; ".join(problems))
        return bundle

    def _note_certificate(
        self,
        configuration: ProxyConfiguration,
        name: str,
        end: datetime,
        conditions: Conditions,
    ) -> None:
        namespace = configuration.proxy_server.namespace
        self._metrics.certificate_expiry_seconds.labels(namespace, name).set(end.timestamp())
        kind = _condition_of(configuration, name)
        conditions.note(kind, True, "SuccessfullySigned", f"Expiry:{go_time(end)}")

    # -- objects -----------------------------------------------------------------------------------

    async def _deploy(
        self, configuration: ProxyConfiguration, live: Object, bundle: bytes, conditions: Conditions
    ) -> None:
        profile, _ = self._tls()
        contention = self._contention(configuration)
        for resource, rendered in hub_objects(
            configuration,
            bundle,
            tls_min_version=profile.min_version,
            cipher_suites=profile.cipher_suites,
            image_pull_policy=self._image_pull_policy,
        ):
            provided = configuration.signer_type is SignerType.PROVIDED
            if provided and rendered["metadata"]["name"] == PROXY_SERVER_CA_SECRET:
                continue
            try:
                present = await patiently(
                    partial(ensure, self._api, resource, rendered, contention)
                )
            except ConflictingWriter as error:
                conditions.contended.append(error)
                if resource is DEPLOYMENTS:
                    conditions.note(DEPLOYED, False, "ConflictingWriter", str(error))
                continue
            if resource is DEPLOYMENTS:
                replicas = value_at(present, "status", "replicas") or 0
                conditions.note(DEPLOYED, True, "SuccessfullyDeployed", f"Replicas: {replicas}")

    async def _find(
        self, resource: Resource, name: str, namespace: str | None = None
    ) -> Object | None:
        return await patiently(partial(find, self._api, resource, name, namespace))

    def _contention(self, configuration: ProxyConfiguration) -> Contention:
        return self._contentions.setdefault(configuration.name, Contention())

    async def _rotate(self, live: Object, now: datetime) -> float:
        """Take the next step of the CA's rotation if it is due; return seconds until there may be another."""
        # The secret that servers and clients trust by was written just before. How long it takes to get to
        # them, and to the agents, is what the overlap is for.
        done, seconds = await self._signer.advance(
            now, bundle_delivered=True, previous_unused=False
        )
        if done is not None:
            self._events.note(
                live, "Normal", "CARotation", f"rotation of the certificate authority: {done}"
            )
        return min(seconds, RESYNC_S)

    async def _report(self, live: Object, conditions: Conditions) -> None:
        """Write status if there is something new to tell."""
        generation = value_at(live, "metadata", "generation") or 0
        status = dict(map_at(live, "status"))
        merged = merge_conditions(
            status.get("conditions"),
            conditions.found,
            now=self._clock(),
            generation=generation,
            # Of what is not asked for any more nothing is to be told.
            withdrawn=() if value_at(live, "spec", "userServer") is not None else (_USER_SIGNED,),
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


def _condition_of(configuration: ProxyConfiguration, secret: str) -> str:
    names = configuration.secrets
    return {
        names.proxy_server: _SERVER_SIGNED,
        names.agent_server: "AgentServerSecretSigned",
        names.proxy_client: "ProxyClientSecretSigned",
        USER_SERVER_SECRET: _USER_SIGNED,
    }[secret]

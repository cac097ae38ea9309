"""The certificates of the hub's side: issued by our own authority, or provided by the administrator."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from clusterproxy.errors import KubeError
from clusterproxy.kube.resource import SECRETS

from .ca_rotation import REQUEST
from .certificates import (
    RENEWAL,
    CertificateError,
    aged,
    go_time,
    load_certificates,
    not_after,
)
from .configuration import (
    MAIN_CONFIGURATION,
    PROXY_SERVER_CA_SECRET,
    USER_SERVER_SECRET,
    SignerType,
)
from .contention import ConflictingWriter
from .findings import (
    AGENT_SIGNED,
    CLIENT_SIGNED,
    SERVER_SIGNED,
    USER_SIGNED,
    VALID,
    Blocked,
    Findings,
    told,
)
from .hub_objects import wanted_leaves
from .leaves import ensure_leaf, secret_data
from .objects import NameTaken, find, patiently
from .provided import why_unusable
from .signer import SignerInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from cryptography import x509

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.events import EventRecorder
    from clusterproxy.kube.resource import Object
    from clusterproxy.telemetry.controller_metrics import ControllerMetrics

    from .ca_rotation import State
    from .certificates import Leaf
    from .configuration import ProxyConfiguration
    from .contention import Contention
    from .signer import Signer


class HubCertificates:
    """Sees to it that there are certificates, in the secrets that a configuration names."""

    def __init__(
        self, api: KubeApi, signer: Signer, events: EventRecorder, metrics: ControllerMetrics
    ) -> None:
        self._api = api
        self._signer = signer
        self._events = events
        self._metrics = metrics
        # By configuration: namespace and name of the secrets of which there are metrics.
        self._measured: dict[str, set[tuple[str, str]]] = {}

    def forget(self, configuration: str) -> None:
        """Have no metrics any more of what a configuration wanted that is gone."""
        self._measure_only(configuration, set())
        del self._measured[configuration]

    def _measure_only(self, configuration: str, wanted: set[tuple[str, str]]) -> None:
        before = self._measured.get(configuration, set())
        self._measured[configuration] = wanted
        for labels in before.difference(*self._measured.values()):
            self._metrics.certificate_expiry_seconds.remove(*labels)

    def _measure(self, namespace: str, name: str, end: datetime) -> None:
        self._metrics.certificate_expiry_seconds.labels(namespace, name).set(end.timestamp())

    async def certify(
        self,
        live: Object,
        configuration: ProxyConfiguration,
        address: str,
        owner: Object | None,
        now: datetime,
        contention: Contention,
        findings: Findings,
    ) -> bytes:
        """Return the authorities to be trusted, as PEM, once there are certificates of them.

        Args:
          live: the object that *configuration* was read from, for events.
          address: of the load balancer, empty without one.
          owner: of what is made.

        Raises:
          Blocked: the authority cannot be used, or something is not provided.
          KubeError: what the apiserver says.
        """
        namespace = configuration.proxy_server.namespace
        leaves = wanted_leaves(configuration, address)
        self._measure_only(configuration.name, {(namespace, name) for name in leaves})
        if configuration.signer_type is SignerType.PROVIDED:
            return await self._check(live, configuration, leaves, now, findings)
        try:
            return await self._issue(live, configuration, leaves, owner, now, contention, findings)
        except KubeError as error:
            await self._tell_missing(configuration, leaves, error, findings)
            raise

    async def _issue(
        self,
        live: Object,
        configuration: ProxyConfiguration,
        leaves: dict[str, Leaf],
        owner: Object | None,
        now: datetime,
        contention: Contention,
        findings: Findings,
    ) -> bytes:
        state = await self._authority(live, owner, now)
        for name, leaf in leaves.items():
            kind = _condition_of(configuration, name)
            step = partial(
                ensure_leaf,
                self._api,
                configuration.proxy_server.namespace,
                name,
                leaf,
                state.authority,
                owner=owner,
                now=now,
                contention=contention,
            )
            try:
                end, reason = await patiently(step)
            except ConflictingWriter as error:
                findings.note(kind, False, "ConflictingWriter", str(error))
                findings.contended.append(error)
            except CertificateError as error:
                raise Blocked(kind, "NotYetSigned", str(error)) from error
            except NameTaken as error:
                findings.note(kind, False, "NameTaken", str(error))
                raise
            else:
                self._measure(configuration.proxy_server.namespace, name, end)
                findings.note(kind, True, "SuccessfullySigned", f"Expiry:{go_time(end)}")
                if reason is not None:
                    self._metrics.certificates_issued_total.labels(name).inc()
        return state.bundle()

    async def _tell_missing(
        self,
        configuration: ProxyConfiguration,
        leaves: Iterable[str],
        error: KubeError,
        findings: Findings,
    ) -> None:
        """Say of which certificates there is none, as far as that can be found out."""
        namespace = configuration.proxy_server.namespace
        with contextlib.suppress(KubeError):
            for name in leaves:
                if await find(self._api, SECRETS, name, namespace) is None:
                    kind = _condition_of(configuration, name)
                    message = f"there is no Secret {namespace}/{name}: {error.message}"
                    findings.note(kind, False, "NotYetSigned", message)

    async def _authority(self, live: Object, owner: Object | None, now: datetime) -> State:
        try:
            state = await patiently(partial(self._signer.state, owner, now))
        except SignerInvalid as error:
            raise Blocked(SERVER_SIGNED, "SignerInvalid", str(error)) from error
        if not state.authority.expired(now):
            return state
        # Nobody trusts it any more: the rotation replaces it at once, if it is not somebody's own.
        end = go_time(state.authority.certificate.not_valid_after_utc)
        sight = await self._signer.look()
        if sight is None or not await self._signer.advance(
            sight, now, delivered=False, agents=False
        ):
            raise Blocked(
                SERVER_SIGNED,
                "SignerInvalid",
                f"Secret {self._signer.namespace}/{self._signer.name}: ca.crt expired at {end}, and is not of the manager's "
                f"making: put another one there, or have one made by a new value of the annotation {REQUEST}",
            )
        self._events.note(
            live,
            "Warning",
            "CAExpired",
            f"the certificate authority in Secret {self._signer.namespace}/{self._signer.name} expired at {end} and "
            "was replaced: whoever has an older ca.crt needs the new one",
        )
        return await self._signer.state(owner, now)

    async def _check(
        self,
        live: Object,
        configuration: ProxyConfiguration,
        leaves: dict[str, Leaf],
        now: datetime,
        findings: Findings,
    ) -> bytes:
        namespace = configuration.proxy_server.namespace
        bundle = (await self._data(PROXY_SERVER_CA_SECRET, namespace) or {}).get("ca.crt", b"")
        try:
            trusted = load_certificates(bundle, "ca.crt")
        except CertificateError as error:
            raise Blocked(
                SERVER_SIGNED,
                "NotYetProvided",
                f"Secret {namespace}/{PROXY_SERVER_CA_SECRET}: {error}; provide the CAs to be trusted there",
            ) from error
        problems: list[str] = []
        absent = False
        for name, leaf in leaves.items():
            called, kind = f"Secret {namespace}/{name}", _condition_of(configuration, name)
            data = await self._data(name, namespace)
            if data is None:
                absent = True
                problem: str | None = "is not there"
            else:
                problem = why_unusable(data, leaf, trusted, now)
                with contextlib.suppress(CertificateError):
                    self._measure(namespace, name, not_after(data.get("tls.crt", b"")))
            if data is None or problem is not None:
                problems.append(f"{called}: {problem}")
                findings.note(kind, False, "NotYetProvided", problems[-1])
            else:
                self._tell_end(live, called, kind, data["tls.crt"], now, findings)
        if configuration.name == MAIN_CONFIGURATION and not await self._is_trusted(trusted):
            problems.append(
                f"Secret {namespace}/{PROXY_SERVER_CA_SECRET}: ca.crt does not hold the authority that signs the agents' "
                f"certificates (ca.crt of Secret {self._signer.namespace}/{self._signer.name}), so that no agent can connect: "
                "add it"
            )
        if problems:
            message = "; ".join(problems)
            if absent:
                # Pods cannot be started without it.
                raise Blocked(VALID, "NotYetProvided", message)
            if message != told(live, VALID):
                self._events.note(live, "Warning", "NotYetProvided", message)
            findings.note(VALID, False, "NotYetProvided", message)
        return bundle

    async def _is_trusted(self, trusted: Sequence[x509.Certificate]) -> bool:
        """Whether what is signed for agents is good for who trusts these; if nothing can be signed others tell of that."""
        try:
            sight = await patiently(self._signer.look)
        except SignerInvalid:
            return True
        if sight is None:
            return True
        # Of an agent's certificate there is no chain.
        signing = sight.state.authority.certificate
        return any(
            (each.subject, each.public_key()) == (signing.subject, signing.public_key())
            for each in trusted
        )

    def _tell_end(
        self,
        live: Object,
        called: str,
        kind: str,
        tls_crt: bytes,
        now: datetime,
        findings: Findings,
    ) -> None:
        certificate = load_certificates(tls_crt, "tls.crt")[0]
        message = f"Expiry:{go_time(certificate.not_valid_after_utc)}"
        if aged(certificate, now):
            message += f"; {RENEWAL:.0%} of its life is over: provide another one"
            if message != told(live, kind):
                self._events.note(live, "Warning", "CertificateExpiring", f"{called}: {message}")
        findings.note(kind, True, "SuccessfullySigned", message)

    async def _data(self, name: str, namespace: str) -> dict[str, bytes] | None:
        secret = await patiently(partial(find, self._api, SECRETS, name, namespace))
        return None if secret is None else secret_data(secret)


def _condition_of(configuration: ProxyConfiguration, secret: str) -> str:
    names = configuration.secrets
    return {
        names.proxy_server: SERVER_SIGNED,
        names.agent_server: AGENT_SIGNED,
        names.proxy_client: CLIENT_SIGNED,
        USER_SERVER_SECRET: USER_SIGNED,
    }[secret]

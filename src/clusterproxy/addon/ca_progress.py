"""Takes the CA's rotation from step to step, and tells where it is and what it waits for."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import attrs

from clusterproxy.errors import Conflict, Forbidden
from clusterproxy.kube.resource import MANAGED_PROXY_CONFIGURATIONS, SECRETS, text_at, value_at

from .ca_rotation import (
    DELIVERED,
    LONGEST_RETIREMENT,
    REQUEST,
    RETIRED,
    Phase,
    fingerprint,
    previous_fingerprint,
    stamp,
)
from .certificates import CertificateError, aged, issued_only_by, load_certificates
from .configuration import DEFAULT_NAMESPACE, PROXY_SERVER_CA_SECRET, SignerType
from .findings import CA_ROTATION, told
from .leaves import secret_data
from .objects import patiently
from .signer import SignerInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.events import EventRecorder
    from clusterproxy.kube.resource import Object

    from .ca_rotation import State
    from .findings import Findings
    from .signer import Sight, Signer

# Nobody tells of what others' configurations have.
_LAGGING_S: Final = 10.0
# When nobody is waited for any more this comes at once; only the names that are shown may be others.
_NAMES_S: Final = 60.0
_SHOWN: Final = 5


@attrs.frozen
class Seen:
    """Where a rotation was, and who did not have yet what its phase gives them.

    Attributes:
      sight: the authority's secret.
      lagging: what on the hub.
      agents: the clusters of those agents, and why if that is known; None if the clusters are not known.
    """

    sight: Sight
    lagging: tuple[str, ...]
    agents: Mapping[str, str] | None


class CAProgress:
    """The rotation of one authority.

    Args:
      agents: returns which clusters' agents have not what the phase of a state gives them; see :class:`Seen`.
    """

    def __init__(
        self,
        api: KubeApi,
        signer: Signer,
        events: EventRecorder,
        agents: Callable[[State], Mapping[str, str] | None],
    ) -> None:
        self._api = api
        self._agents = agents
        self._signer = signer
        self._events = events

    async def look(self, now: datetime) -> Seen | None:
        """Return what there is, before anything is put right: what has to be is not delivered yet.

        None without an authority that can be used: others tell of that.

        Raises:
          KubeError: what the apiserver says.
        """
        try:
            sight = await patiently(self._signer.look)
        except SignerInvalid:
            return None
        if sight is None:
            return None
        # That ends what was waited for, too.
        agents = self._agents(sight.state)
        steady = sight.state.phase is Phase.STEADY
        return Seen(sight, () if steady else await self._lagging(sight.state, now), agents)

    async def go_on(self, live: Object, seen: Seen, now: datetime, findings: Findings) -> float:
        """Take the next step if it is due, or tell what is waited for; return seconds until there may be another.

        Args:
          live: the configuration that it is told about.

        Raises:
          KubeError: what the apiserver says.
        """
        state = seen.sight.state
        agents = seen.agents is not None and not seen.agents
        try:
            if await self._signer.advance(
                seen.sight, now, delivered=not seen.lagging, agents=agents
            ):
                return 0.0
        except Conflict:
            return 0.0
        self._tell(live, seen, now, findings)
        pauses = [state.seconds_left(now)]
        pauses += [_LAGGING_S] if seen.lagging else []
        pauses += [_NAMES_S] if seen.agents else []
        return min(pauses)

    def _tell(self, live: Object, seen: Seen, now: datetime, findings: Findings) -> None:
        secret = f"{self._signer.namespace}/{self._signer.name}"
        before = told(live, CA_ROTATION)
        waiting = waits_for(seen.sight.state, seen.lagging, seen.agents, now, secret)
        if waiting is None:
            findings.withdrawn.add(CA_ROTATION)
            if before:
                message = (
                    f"there is nothing to be done any more with the authority in Secret {secret}"
                )
                self._events.note(live, "Normal", CA_ROTATION, message)
            return
        findings.note(CA_ROTATION, waiting.by_itself, waiting.reason, waiting.message)
        if waiting.message != before:
            self._events.note(
                live, "Normal" if waiting.by_itself else "Warning", CA_ROTATION, waiting.message
            )

    async def _lagging(self, state: State, now: datetime) -> tuple[str, ...]:
        """Return what of all configurations is not yet as the phase wants it."""
        configurations = await patiently(partial(self._api.list, MANAGED_PROXY_CONFIGURATIONS))
        namespaces = {
            text_at(each, "spec", "proxyServer", "namespace") or DEFAULT_NAMESPACE
            for each in configurations.items
            if not value_at(each, "metadata", "deletionTimestamp")
            and text_at(each, "spec", "authentication", "signer", "type") != SignerType.PROVIDED
        }
        found: list[str] = []
        for namespace in sorted(namespaces):
            try:
                secrets = await patiently(partial(self._api.list, SECRETS, namespace))
            except Forbidden as error:
                found.append(f"secrets of namespace {namespace} ({error.message})")
                continue
            found += (f"Secret {namespace}/{name}" for name in _late(secrets.items, state, now))
        return tuple(found)


def _late(secrets: Sequence[Object], state: State, now: datetime) -> list[str]:
    """Return the names of a namespace's secrets that are not as the phase of *state* wants them."""
    contents = {text_at(secret, "metadata", "name"): secret_data(secret) for secret in secrets}
    late: list[str] = []
    if contents.pop(PROXY_SERVER_CA_SECRET, {}).get("ca.crt") != state.bundle():
        late.append(PROXY_SERVER_CA_SECRET)
    if state.phase is Phase.RETIRE:
        # Whoever looks after them.
        late += (
            name
            for name, data in sorted(contents.items())
            if _is_of_previous(data.get("tls.crt", b""), state, now)
        )
    return late


def _is_of_previous(tls_crt: bytes, state: State, now: datetime) -> bool:
    try:
        certificate = load_certificates(tls_crt, "tls.crt")[0]
    except CertificateError:
        return False
    return now < certificate.not_valid_after_utc and issued_only_by(
        certificate, state.previous, state.authority.certificate
    )


@attrs.frozen
class Waiting:
    """What a rotation waits for.

    Attributes:
      by_itself: whether that comes by itself.
      reason: a word for it.
      message: the same as long as nothing happens.
    """

    by_itself: bool
    reason: str
    message: str


def waits_for(
    state: State,
    lagging: Sequence[str],
    agents: Mapping[str, str] | None,
    now: datetime,
    secret: str,
) -> Waiting | None:
    """Return what a rotation waits for, None if there is none and none is wanted.

    Args:
      state: where it is.
      lagging, agents: who has not what the phase gives them, see :class:`Seen`.
      now: the time.
      secret: namespace and name of the authority's.
    """
    waiting = _waiting(state, lagging, agents, now, secret)
    problems = (*state.problems, *_end(state, now, secret))
    if not problems:
        return waiting
    reason = "InvalidAnnotation" if state.problems else "CAExpiring"
    texts = (*problems, *(() if waiting is None else (waiting.message,)))
    return Waiting(False, reason, "; ".join(texts))


def _end(state: State, now: datetime, secret: str) -> Iterator[str]:
    """Tell of the end of an authority that has no successor."""
    # One of our own is replaced by now.
    if state.following is None and aged(state.authority.certificate, now):
        end = stamp(state.authority.certificate.not_valid_after_utc)
        yield (
            f"the authority in Secret {secret} expires at {end}, and is not replaced by itself, for it is not of the "
            "manager's making: put its successor there as next-ca.crt and next-ca.key, or have one made: "
            + _annotate(secret, REQUEST, '"$(date +%s)"')
        )


def _waiting(
    state: State,
    lagging: Sequence[str],
    agents: Mapping[str, str] | None,
    now: datetime,
    secret: str,
) -> Waiting | None:
    if state.phase is Phase.STEADY:
        return None
    phase = f"{state.phase} since {stamp(state.began or now)}"
    if lagging:
        what = (
            "have all authorities"
            if state.phase is Phase.PREPARE
            else "are issued anew by the new authority, or deleted if nobody uses them"
        )
        message = f"{phase}: waiting until these {what}: {_listed(lagging)}"
        return Waiting(True, "AwaitingHub", message)
    if state.phase is Phase.PREPARE:
        return _prepare(state, agents, phase, now, secret)
    return _retire(state, agents, phase, now, secret)


def _prepare(
    state: State, agents: Mapping[str, str] | None, phase: str, now: datetime, secret: str
) -> Waiting:
    if state.said_delivered or (agents is not None and not agents):
        end = stamp((state.since or now) + state.overlap)
        message = f"{phase}: all have both authorities; the new one signs from {end} on"
        return Waiting(True, "Delivered", message)
    go_on = _annotate(secret, DELIVERED, fingerprint(state.bundle()))
    if agents is None:
        message = (
            f"{phase}: the new authority signs nothing before all agents have ca.crt of Secret proxy-server-ca. Give it "
            f"to them and to whoever else verifies, then say so: {go_on}"
        )
        return Waiting(False, "AwaitingDelivery", message)
    message = (
        f"{phase}: the new authority signs nothing before the agents of these clusters have it: {_clusters(agents)}. To "
        f"wait for none of them, which are cut off then until they have it: {go_on}"
    )
    stuck = any(agents.values())
    return Waiting(not stuck, "AwaitingDelivery" if stuck else "AwaitingAgents", message)


def _retire(
    state: State, agents: Mapping[str, str] | None, phase: str, now: datetime, secret: str
) -> Waiting:
    if agents is not None and not agents:
        end = stamp((state.since or now) + state.overlap)
        message = f"{phase}: nobody has a certificate of what was replaced any more; it is trusted until {end}"
        return Waiting(True, "Retiring", message)
    end = stamp((state.began or now) + LONGEST_RETIREMENT)
    who = (
        "agents may have certificates of it"
        if agents is None
        else f"the agents of these clusters have not said that they have others: {_clusters(agents)}"
    )
    message = (
        f"{phase}: what was replaced is trusted until {end}, for {who}. To end that at once, which cuts off those that "
        f"have: {_annotate(secret, RETIRED, previous_fingerprint(state))}"
    )
    return Waiting(True, "Retiring", message)


def _clusters(agents: Mapping[str, str]) -> str:
    return _listed([f"{name} ({why})" if why else name for name, why in agents.items()])


def _listed(names: Sequence[str]) -> str:
    more = "" if len(names) <= _SHOWN else f" and {len(names) - _SHOWN} more"
    return f"{', '.join(names[:_SHOWN])}{more}"


def _annotate(secret: str, key: str, value: str) -> str:
    namespace, _, name = secret.partition("/")
    return f"kubectl -n {namespace} annotate secret {name} --overwrite {key}={value}"

"""Replaces the certificate authority by a new one without anybody noticing. Pure; the time comes in as a parameter.

Whoever verifies has a *bundle* of the authorities that it trusts. Bundles and certificates reach their holders late,
so a rotation goes through phases, and in each of them every certificate in use comes from an authority that is in every
bundle in use, even one of the phase before:

=======  =================  =======  ====================  =================================================
phase    signs              bundle   in the secret         ends
=======  =================  =======  ====================  =================================================
steady   the authority      it       ``ca``                when it is asked for, or the authority has aged
prepare  the authority      it, new  ``ca``, ``next-ca``   the overlap after all have been found to have the
                                                           bundle
retire   the new one        it, old  ``ca``, ``previous``  the overlap after all certificates have been found
                                                           to be the new one's, or when the last one of the
                                                           old one's has expired
=======  =================  =======  ====================  =================================================

It can be asked for in every phase: then a fresh authority is prepared, and all that may have issued something stay
trusted. An authority that somebody has brought along is replaced when that is asked for, and never otherwise.

All state is in the authority's secret, which is replaced as a whole, so a step is done or not, and any manager goes on
where another has stopped. The original, which knows ``ca.crt`` and ``ca.key`` only, could take over at any moment: they
are what signs. It would trust fewer authorities, so a rotation should end before.
"""

from __future__ import annotations

import hashlib
import math
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import attrs
from cryptography.hazmat.primitives.serialization import Encoding

from clusterproxy.gotext import parse_duration, quote

from .certificates import (
    LEAF_VALIDITY,
    Authority,
    aged,
    load_authority,
    load_certificates,
    new_authority,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cryptography import x509

_PREFIX: Final = "proxy.open-cluster-management.io/"

#: What an administrator writes, any new value, to have the authority replaced.
REQUEST: Final = f"{_PREFIX}rotate-ca"
#: The value that was acted on last.
ACTED_ON: Final = f"{_PREFIX}rotated-ca"
#: When the phase began.
BEGAN: Final = f"{_PREFIX}ca-phase-began"
#: Since when all have what the phase gives them, found at every look.
SINCE: Final = f"{_PREFIX}ca-delivered-since"
#: By which an administrator says that no agent is to be waited for that has not a bundle: its :func:`fingerprint`.
DELIVERED: Final = f"{_PREFIX}ca-delivered"
#: By which an administrator ends the trust in the previous authorities: the fingerprint of ``previous-ca.crt``.
RETIRED: Final = f"{_PREFIX}ca-retire"
#: How long a phase lasts at least, as a Go duration. An administrator writes it.
OVERLAP: Final = f"{_PREFIX}ca-overlap"

DEFAULT_OVERLAP: Final = timedelta(minutes=10)

#: So long after it has signed for the last time nothing that an authority has issued is valid.
LONGEST_RETIREMENT: Final = LEAF_VALIDITY + timedelta(days=1)
# A time that is so long after now was written by a clock that was wrong.
_SKEW: Final = timedelta(minutes=5)


class Phase(StrEnum):
    """Where a rotation is."""

    STEADY = "steady"
    PREPARE = "prepare"
    RETIRE = "retire"


@attrs.frozen(kw_only=True)
class State:
    """The authorities, and where their rotation is.

    Attributes:
      authority: the one that signs.
      following: the one that is trusted and does not sign yet, in the phase *prepare*.
      previous: the certificates of those that were replaced and are trusted yet, the last one's first.
      began: when the phase began; None if that is unknown.
      since: since when all have what the phase gives them, see :data:`SINCE`; None if not all have.
      requested: what was asked for, see :data:`REQUEST`.
      acted_on: the last request that was acted on.
      delivered: which bundle all agents are said to have that matter, see :data:`DELIVERED`.
      retired: whom not to trust any more, see :data:`RETIRED`.
      overlap: how long a phase lasts at least.
      problems: what of the annotations was ignored, and why.
    """

    authority: Authority
    following: Authority | None = None
    previous: tuple[x509.Certificate, ...] = ()
    began: datetime | None = None
    since: datetime | None = None
    requested: str = ""
    acted_on: str = ""
    delivered: str = ""
    retired: str = ""
    overlap: timedelta = DEFAULT_OVERLAP
    problems: tuple[str, ...] = ()

    @property
    def phase(self) -> Phase:
        """Where the rotation is."""
        if self.following is not None:
            return Phase.PREPARE
        return Phase.RETIRE if self.previous else Phase.STEADY

    @property
    def trusted(self) -> tuple[x509.Certificate, ...]:
        """The certificates that are to be trusted, that of the signing authority first, each of them once."""
        following = () if self.following is None else self.following.certificates
        return tuple(dict.fromkeys((*self.authority.certificates, *following, *self.previous)))

    def bundle(self) -> bytes:
        """Return what is to be trusted as PEM."""
        return _pem(self.trusted)

    @property
    def said_delivered(self) -> bool:
        """Whether an administrator has said that agents are not to be waited for: of this very bundle."""
        return self.phase is Phase.PREPARE and self.delivered == fingerprint(self.bundle())

    def seconds_left(self, now: datetime) -> float:
        """Return how long the overlap lasts yet; infinity if it has not begun, or is over."""
        left = 0.0 if self.since is None else (self.since + self.overlap - now).total_seconds()
        return left if left > 0 else math.inf

    def write(self) -> tuple[dict[str, bytes], dict[str, str]]:
        """Return what is to stand in the secret under :attr:`Rotation.KEYS` and :attr:`Rotation.ANNOTATIONS`.

        Of those, what is not returned must go. Everything else in the secret is left as it is.
        """
        data = {"ca.crt": self.authority.crt, "ca.key": self.authority.key}
        if self.following is not None:
            data["next-ca.crt"] = self.following.crt
            data["next-ca.key"] = self.following.key
        if self.previous:
            data["previous-ca.crt"] = _pem(self.previous)
        annotations: dict[str, str] = {}
        if self.acted_on:
            annotations[ACTED_ON] = self.acted_on
        if self.began is not None:
            annotations[BEGAN] = stamp(self.began)
        if self.since is not None:
            annotations[SINCE] = stamp(self.since)
        return data, annotations


class Rotation:
    """How the state lies in the secret."""

    KEYS: Final = frozenset({"ca.crt", "ca.key", "next-ca.crt", "next-ca.key", "previous-ca.crt"})
    """The keys of its data that are the rotation's."""

    ANNOTATIONS: Final = frozenset({ACTED_ON, BEGAN, SINCE})
    """The annotations that are the rotation's. The administrator's are not."""

    @staticmethod
    def begin(now: datetime) -> State:
        """Return the state with a first authority."""
        return State(authority=new_authority(now))

    @staticmethod
    def read(data: Mapping[str, bytes], annotations: Mapping[str, object]) -> State:
        """Return the state that a secret holds. An authority that has expired is no error.

        Raises:
          CertificateError: one of the keys cannot be used; it says which, and why.
        """
        following = None
        if "next-ca.crt" in data or "next-ca.key" in data:
            following = load_authority(
                data.get("next-ca.crt", b""),
                data.get("next-ca.key", b""),
                crt_name="next-ca.crt",
                key_name="next-ca.key",
            )
        previous = data.get("previous-ca.crt")
        problems: list[str] = []
        return State(
            authority=load_authority(data.get("ca.crt", b""), data.get("ca.key", b"")),
            following=following,
            previous=() if previous is None else load_certificates(previous, "previous-ca.crt"),
            began=_time(_text(annotations, BEGAN)),
            since=_time(_text(annotations, SINCE)),
            requested=_text(annotations, REQUEST),
            acted_on=_text(annotations, ACTED_ON),
            delivered=_text(annotations, DELIVERED),
            retired=_text(annotations, RETIRED),
            overlap=_overlap(_text(annotations, OVERLAP), problems),
            problems=tuple(problems),
        )


def step(
    state: State,
    now: datetime,
    *,
    delivered: bool,
    agents: bool,
    generate: Callable[[datetime], Authority] | None = None,
) -> State | None:
    """Return the state that is to follow at once, or None if nothing is due.

    Args:
      state: the present one.
      now: the time.
      delivered: whether all on the hub were found to have what the phase gives them: whoever verifies certificates
        :meth:`State.bundle` of *state*, and in the phase *retire* whoever has a certificate one of the authority's.
      agents: whether all agents were found to have it: in the phase *prepare* the bundle, in the phase *retire*
        certificates of the authority's. False if that is not known. From when all have it the overlap counts, so
        what has only just been written is not delivered yet.
      generate: makes a new authority.
    """
    generate = generate or _generate
    if state.authority.expired(now):
        usable = state.following if _usable(state.following, now) else None
        if usable is None and not state.authority.self_made and not _asked(state):
            return None
        # Nobody trusts it any more, so there is nothing to be careful with.
        return attrs.evolve(
            state,
            authority=usable or generate(now),
            following=None,
            previous=(),
            began=None,
            since=None,
            acted_on=state.requested or state.acted_on,
        )
    if _asked(state) or _due(state, now):
        return attrs.evolve(
            state,
            following=generate(now),
            began=now,
            since=None,
            acted_on=state.requested or state.acted_on,
        )
    if state.phase is Phase.STEADY:
        return None
    if state.previous and state.retired == previous_fingerprint(state):
        began = None if state.following is None else state.began
        return attrs.evolve(state, previous=(), began=began, since=None)
    if state.began is None or state.began > now + _SKEW:
        return attrs.evolve(state, began=now)
    if delivered and state.following is None and _over(state, state.began, now):
        return attrs.evolve(state, previous=(), began=None, since=None)
    if not delivered or not (agents or state.said_delivered):
        return None if state.since is None else attrs.evolve(state, since=None)
    if state.since is None or state.since > now + _SKEW:
        return attrs.evolve(state, since=now)
    if now - state.since < state.overlap:
        return None
    if state.following is not None:
        return attrs.evolve(
            state,
            authority=state.following,
            following=None,
            previous=(*state.authority.certificates, *state.previous),
            began=now,
            since=None,
        )
    return attrs.evolve(state, previous=(), began=None, since=None)


def fingerprint(pem: bytes) -> str:
    """Return a short name of certificates: what ``sha256sum | cut -c1-16`` says of them."""
    return hashlib.sha256(pem).hexdigest()[:16]


def previous_fingerprint(state: State) -> str:
    """Return the fingerprint of the authorities that were replaced."""
    return fingerprint(_pem(state.previous))


def stamp(moment: datetime) -> str:
    """Write a time as the annotations have it: ``2026-11-26T00:00:00Z``."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _generate(now: datetime) -> Authority:
    return new_authority(now, distinct=True)


def _asked(state: State) -> bool:
    return bool(state.requested) and state.requested != state.acted_on


def _due(state: State, now: datetime) -> bool:
    """Whether a new authority is needed without anybody asking for it."""
    if state.following is not None:
        return not _usable(state.following, now)
    return state.authority.self_made and aged(state.authority.certificate, now)


def _over(state: State, began: datetime, now: datetime) -> bool:
    """Whether nothing is valid that the previous authorities have issued: they sign nothing since the phase began."""
    return now - began >= LONGEST_RETIREMENT or all(
        now >= each.not_valid_after_utc for each in state.previous
    )


def _usable(authority: Authority | None, now: datetime) -> bool:
    return authority is not None and not authority.expired(now)


def _pem(certificates: tuple[x509.Certificate, ...]) -> bytes:
    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates)


def _text(annotations: Mapping[str, object], key: str) -> str:
    value = annotations.get(key)
    return value if isinstance(value, str) else ""


def _time(text: str) -> datetime | None:
    try:
        # Without a zone it is taken as UTC.
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _overlap(text: str, problems: list[str]) -> timedelta:
    if not text:
        return DEFAULT_OVERLAP
    try:
        nanoseconds = parse_duration(text)
    except ValueError as error:
        problem = str(error)
    else:
        if nanoseconds >= 0:
            return timedelta(microseconds=nanoseconds // 1000)
        problem = f"{quote(text)} is negative"
    problems.append(
        f"annotation {OVERLAP}: {problem}; write a duration such as 10m. Meanwhile it is 10m"
    )
    return DEFAULT_OVERLAP

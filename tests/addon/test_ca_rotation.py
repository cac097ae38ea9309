from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import count, cycle
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import attrs
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from examples import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from clusterproxy.addon import certificates
from clusterproxy.addon.ca_rotation import (
    ACTED_ON,
    BEGAN,
    DEFAULT_OVERLAP,
    OVERLAP,
    REQUEST,
    Phase,
    Rotation,
    State,
    step,
)
from clusterproxy.addon.certificates import (
    LEAF_VALIDITY,
    Authority,
    CertificateError,
    load_certificates,
    new_authority,
    new_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cryptography import x509

NOW = datetime(2026, 11, 26, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def generate() -> Callable[[datetime], Authority]:
    """Make authorities from a few keys that are made once."""
    keys = cycle([new_key() for _ in range(5)])
    return lambda now: new_authority(now, private_key=next(keys), distinct=True)


@pytest.fixture(autouse=True, scope="module")
def _keys_are_read_once() -> Iterator[None]:
    # Each time costs as much as everything else in hundreds of steps.
    with patch.object(certificates, "load_pem_private_key", cache(load_pem_private_key)):
        yield


def go(state: State, now: datetime, generate: Any, **known: bool) -> State | None:
    known = {"bundle_delivered": True, "previous_unused": True, **known}
    return step(state, now, generate=generate, **known)


def reread(state: State, **annotations: str) -> State:
    """Return the state as another manager finds it."""
    data, written = state.write()
    assert data.keys() <= Rotation.KEYS
    assert written.keys() <= Rotation.ANNOTATIONS
    return Rotation.read(data, {**written, **annotations})


def test_a_whole_rotation(generate: Any) -> None:
    state = reread(State(authority=generate(NOW)))
    old = state.authority
    assert (state.phase, state.bundle()) == (Phase.STEADY, old.crt)
    assert go(state, NOW + DAY, generate) is None

    asked = reread(state, **{REQUEST: "2026-11"})
    prepared = go(asked, NOW, generate)
    assert prepared is not None
    prepared = reread(prepared, **{REQUEST: "2026-11"})
    assert prepared.phase is Phase.PREPARE
    assert prepared.authority == old
    assert prepared.following is not None
    new = prepared.following
    assert prepared.bundle() == old.crt + new.crt
    assert go(prepared, NOW + DEFAULT_OVERLAP - MINUTE, generate) is None
    assert go(prepared, NOW + DAY, generate, bundle_delivered=False) is None

    switched = go(prepared, NOW + DEFAULT_OVERLAP, generate)
    assert switched is not None
    switched = reread(switched, **{REQUEST: "2026-11"})
    assert switched.phase is Phase.RETIRE
    assert switched.authority == new
    assert switched.bundle() == new.crt + old.crt
    began = NOW + DEFAULT_OVERLAP
    assert go(switched, began + DEFAULT_OVERLAP - MINUTE, generate) is None
    assert go(switched, began + DAY, generate, previous_unused=False) is None
    late = began + LEAF_VALIDITY + DAY
    assert go(switched, late - MINUTE, generate, previous_unused=False) is None
    assert go(switched, late, generate, previous_unused=False) is not None

    retired = go(switched, began + DEFAULT_OVERLAP, generate)
    assert retired is not None
    retired = reread(retired, **{REQUEST: "2026-11"})
    assert (retired.phase, retired.bundle()) == (Phase.STEADY, new.crt)
    # The request was acted on.
    assert go(retired, began + DAY, generate) is None
    again = reread(retired, **{REQUEST: "2026-12"})
    following = go(again, began + DAY, generate)
    assert following is not None
    assert following.phase is Phase.PREPARE


def test_the_secret_is_one_that_the_original_reads(generate: Any) -> None:
    """It knows ca.crt and ca.key, which are what signs in every phase."""
    state = State(authority=generate(NOW), requested="x")
    data, annotations = state.write()
    for now in (NOW, NOW + DAY, NOW + 2 * DAY):
        following = go(state, now, generate)
        assert following is not None
        state = following
        data, annotations = state.write()
        assert data["ca.crt"] == state.authority.crt
        assert data["ca.key"] == state.authority.key
        assert annotations[ACTED_ON] == "x"
    assert set(data) == {"ca.crt", "ca.key"}
    assert set(annotations) == {ACTED_ON}


def test_the_first_authority_is_the_originals() -> None:
    state = Rotation.begin(NOW)
    assert state.authority.certificate.subject.rfc4514_string() == (
        "CN=open-cluster-management:cluster-proxy"
    )
    assert state.write() == ({"ca.crt": state.authority.crt, "ca.key": state.authority.key}, {})


def test_it_begins_by_itself_in_time(generate: Any) -> None:
    state = State(authority=generate(NOW))
    assert go(state, NOW + 0.8 * 3650 * DAY, generate) is None
    prepared = go(state, NOW + 0.8 * 3650 * DAY + MINUTE, generate)
    assert prepared is not None
    assert prepared.phase is Phase.PREPARE


def test_an_authority_that_has_expired_is_replaced_at_once(generate: Any) -> None:
    state = reread(State(authority=generate(NOW), requested="x"))
    replaced = go(state, NOW + 3650 * DAY, generate, bundle_delivered=False, previous_unused=False)
    assert replaced is not None
    assert replaced.phase is Phase.STEADY
    assert replaced.authority != state.authority
    assert replaced.trusted == replaced.authority.certificates
    assert go(replaced, NOW + 3650 * DAY, generate) is None


def test_one_that_expires_while_its_successor_is_being_spread_is_replaced_by_that(
    generate: Any,
) -> None:
    end = NOW + 3650 * DAY
    prepared = go(State(authority=generate(NOW)), end - DAY, generate)
    assert prepared is not None
    assert go(prepared, end - MINUTE, generate, bundle_delivered=False) is None
    replaced = go(prepared, end, generate, bundle_delivered=False)
    assert replaced is not None
    assert replaced.authority == prepared.following
    assert replaced.phase is Phase.STEADY


def test_a_previous_authority_that_has_expired_is_not_waited_for(generate: Any) -> None:
    end = NOW + 3650 * DAY
    state = State(
        authority=generate(end - DAY), previous=generate(NOW).certificates, began=end - DAY
    )
    assert go(state, end - MINUTE, generate, previous_unused=False) is None
    retired = go(state, end, generate, previous_unused=False)
    assert retired is not None
    assert retired.phase is Phase.STEADY


@pytest.mark.parametrize("began", ["", "yesterday", "2036-11-26T00:00:00Z", "5"])
def test_a_beginning_that_makes_no_sense_is_now(began: str, generate: Any) -> None:
    prepared = attrs.evolve(State(authority=generate(NOW)), following=generate(NOW), began=NOW)
    data, annotations = prepared.write()
    state = Rotation.read(data, {**annotations, BEGAN: began})
    mended = go(state, NOW + DAY, generate)
    assert mended is not None
    assert mended == attrs.evolve(state, began=NOW + DAY)
    assert go(mended, NOW + DAY, generate) is None


def test_the_overlap_is_a_duration(generate: Any) -> None:
    state = State(authority=generate(NOW))
    assert reread(state, **{OVERLAP: "36h"}).overlap == timedelta(hours=36)
    assert reread(state, **{OVERLAP: "0"}).overlap == timedelta(0)
    assert reread(state).problems == ()
    for text in ("10", "-5m", "soon"):
        ignored = reread(state, **{OVERLAP: text})
        assert ignored.overlap == DEFAULT_OVERLAP
        assert text in ignored.problems[0]
        assert ignored.problems[0].startswith(f"annotation {OVERLAP}: ")


def test_what_is_in_the_secret_is_told_by_its_key(generate: Any) -> None:
    state = attrs.evolve(
        State(authority=generate(NOW)),
        following=generate(NOW),
        previous=generate(NOW).certificates,
    )
    data, _ = state.write()
    for key in sorted(Rotation.KEYS):
        with pytest.raises(CertificateError) as caught:
            Rotation.read({**data, key: b"x"}, {})
        assert caught.value.key == key
    for key in ("ca.crt", "ca.key", "next-ca.crt", "next-ca.key"):
        with pytest.raises(CertificateError, match="is missing"):
            Rotation.read({name: value for name, value in data.items() if name != key}, {})
    with pytest.raises(CertificateError, match=r"ca\.crt is missing"):
        Rotation.read({}, {})
    # Annotations may hold what no annotation can.
    assert Rotation.read(data, dict.fromkeys((REQUEST, ACTED_ON, BEGAN, OVERLAP), 5)).began is None


@attrs.define
class Certificate:
    """A certificate in use somewhere: who issued it, and until when it may be used."""

    issuer: x509.Certificate
    end: datetime


class Overlap(RuleBasedStateMachine):
    """Bundles and certificates reach their holders at any time, in any order, after any step of any manager."""

    generate: Any

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.tokens = count()
        self.state = State(authority=self.generate(NOW))
        self.held = [self.state.bundle()] * 2
        self.certificates = [self._issue(), self._issue()]

    def _issue(self) -> Certificate:
        return Certificate(self.state.authority.certificate, self.now + LEAF_VALIDITY)

    @rule(minutes=st.integers(0, 30) | st.integers(0, 200 * 24 * 60))
    def time_passes(self, minutes: int) -> None:
        self.wait(minutes)

    def wait(self, minutes: int) -> None:
        # With an authority that has expired nothing works anyway.
        end = self.state.authority.certificate.not_valid_after_utc
        self.now = min(self.now + minutes * MINUTE, end - DAY)
        for place, certificate in enumerate(self.certificates):
            # One that has ended is used by nobody, and replaced.
            if certificate.end <= self.now:
                self.certificates[place] = self._issue()

    @rule()
    def ask(self) -> None:
        self.state = attrs.evolve(self.state, requested=str(next(self.tokens)))

    @rule(place=st.integers(0, 1))
    def deliver(self, place: int) -> None:
        self.held[place] = self.state.bundle()

    @rule(place=st.integers(0, 1))
    def reissue(self, place: int) -> None:
        self.certificates[place] = self._issue()

    @rule(minutes=st.sampled_from([0, 11]), known=st.sampled_from([True, True, False]))
    def reconcile(self, minutes: int, known: bool) -> None:
        self.wait(minutes)
        issuers = {certificate.issuer for certificate in self.certificates}
        following = step(
            self.state,
            self.now,
            # A caller who does not know says no.
            bundle_delivered=known and self.held == [self.state.bundle()] * 2,
            previous_unused=known and not issuers & set(self.state.previous),
            generate=self.generate,
        )
        if following is not None:
            self.state = reread(following, **{REQUEST: self.state.requested})
            assert self.state.phase is following.phase

    @invariant()
    def every_certificate_is_trusted_by_everybody(self) -> None:
        for bundle in self.held:
            trusted = load_certificates(bundle, "bundle")
            for certificate in self.certificates:
                assert certificate.issuer in trusted

    @invariant()
    def what_signs_is_trusted(self) -> None:
        assert self.state.trusted[0] == self.state.authority.certificate
        assert len(self.state.trusted) <= 2


def test_every_certificate_in_use_is_trusted_by_every_bundle_in_use(generate: Any) -> None:
    machine = type("Overlap", (Overlap,), {"generate": staticmethod(generate)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            derandomize=True, max_examples=examples(80), stateful_step_count=30, deadline=None
        ),
    )

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import count, cycle
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from unittest.mock import patch

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from examples import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from clusterproxy.addon import certificates
from clusterproxy.addon.ca_progress import waits_for
from clusterproxy.addon.ca_rotation import (
    ACTED_ON,
    BEGAN,
    DEFAULT_OVERLAP,
    DELIVERED,
    OVERLAP,
    REQUEST,
    RETIRED,
    SINCE,
    Phase,
    Rotation,
    State,
    fingerprint,
    step,
)
from clusterproxy.addon.certificates import (
    LEAF_VALIDITY,
    Authority,
    CertificateError,
    load_authority,
    load_certificates,
    new_authority,
    new_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

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
    known = {"delivered": True, "agents": True, **known}
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
    assert go(prepared, NOW + DAY, generate, delivered=False) is None
    assert go(prepared, NOW + DAY, generate, agents=False) is None

    # However long ago the phase began: the overlap counts from when all have the bundle.
    found = go(prepared, NOW + DAY, generate)
    assert found is not None
    assert (found.phase, found.since) == (Phase.PREPARE, NOW + DAY)
    found = reread(found, **{REQUEST: "2026-11"})
    assert go(found, NOW + DAY + DEFAULT_OVERLAP - MINUTE, generate) is None
    lost = go(found, NOW + 2 * DAY, generate, delivered=False)
    assert lost is not None
    assert lost == attrs.evolve(found, since=None)
    assert SINCE not in lost.write()[1]

    switched = go(found, NOW + DAY + DEFAULT_OVERLAP, generate)
    assert switched is not None
    switched = reread(switched, **{REQUEST: "2026-11"})
    assert switched.phase is Phase.RETIRE
    assert switched.authority == new
    assert switched.bundle() == new.crt + old.crt
    assert go(switched, NOW + 300 * DAY, generate, delivered=False) is None
    # What it has signed last has expired, whatever the agents say.
    assert switched.began is not None
    late = switched.began + LEAF_VALIDITY + DAY
    assert go(switched, late - MINUTE, generate, agents=False) is None
    over = go(switched, late, generate, agents=False)
    assert over is not None
    assert over.phase is Phase.STEADY

    began = NOW + 2 * DAY
    reissued = go(switched, began, generate)
    assert reissued is not None
    switched = reread(reissued, **{REQUEST: "2026-11"})
    assert switched.since == began
    assert go(switched, began + DEFAULT_OVERLAP - MINUTE, generate) is None
    # An agent's turns up after all: the overlap begins anew when it is gone.
    assert go(switched, began + DAY, generate, agents=False) == attrs.evolve(switched, since=None)

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
    for now in (NOW, NOW + DAY, NOW + 2 * DAY, NOW + 3 * DAY, NOW + 4 * DAY):
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
    replaced = go(state, NOW + 3650 * DAY, generate, delivered=False, agents=False)
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
    assert go(prepared, end - MINUTE, generate, delivered=False) is None
    replaced = go(prepared, end, generate, delivered=False)
    assert replaced is not None
    assert replaced.authority == prepared.following
    assert replaced.phase is Phase.STEADY


def test_a_previous_authority_that_has_expired_is_not_waited_for(generate: Any) -> None:
    end = NOW + 3650 * DAY
    state = State(
        authority=generate(end - DAY),
        previous=generate(NOW).certificates,
        began=end - DAY,
        since=end - DAY,
    )
    assert go(state, end - MINUTE, generate, agents=False) == attrs.evolve(state, since=None)
    assert go(state, end, generate, delivered=False) == attrs.evolve(state, since=None)
    retired = go(state, end, generate, agents=False)
    assert retired is not None
    assert retired.phase is Phase.STEADY


@pytest.mark.parametrize("time", ["", "yesterday", "2036-11-26T00:00:00Z", "5"])
@pytest.mark.parametrize(("key", "field"), [(BEGAN, "began"), (SINCE, "since")])
def test_a_time_that_makes_no_sense_is_now(key: str, field: str, time: str, generate: Any) -> None:
    prepared = State(authority=generate(NOW), following=generate(NOW), began=NOW, since=NOW)
    data, annotations = prepared.write()
    state = Rotation.read(data, {**annotations, key: time})
    mended = go(state, NOW + DAY, generate)
    assert mended is not None
    changed: dict[str, Any] = {field: NOW + DAY}
    assert mended == attrs.evolve(state, **changed)


def test_a_request_is_heard_in_every_phase(generate: Any) -> None:
    old, middle = generate(NOW), generate(NOW)
    retiring = State(authority=middle, previous=old.certificates, began=NOW, since=NOW)
    state = reread(retiring, **{REQUEST: "leaked"})
    asked = go(state, NOW + DAY, generate)
    assert asked is not None
    asked = reread(asked, **{REQUEST: "leaked"})
    assert asked.phase is Phase.PREPARE
    assert asked.following is not None
    # Whatever has issued something is trusted all the time.
    assert asked.bundle() == middle.crt + asked.following.crt + old.crt

    again = go(reread(asked, **{REQUEST: "leaked, too"}), NOW + DAY, generate)
    assert again is not None
    assert again.following not in (None, asked.following)
    assert (again.authority, again.previous, again.since) == (middle, old.certificates, None)

    switched = go(attrs.evolve(asked, since=NOW + DAY), NOW + 2 * DAY, generate)
    assert switched is not None
    switched = reread(switched, **{REQUEST: "leaked"})
    assert switched.authority == asked.following
    assert switched.previous == (*middle.certificates, *old.certificates)


def test_an_administrator_ends_the_trust_in_previous_ones(generate: Any) -> None:
    state = State(authority=generate(NOW), previous=generate(NOW).certificates, began=NOW)
    previous = state.write()[0]["previous-ca.crt"]
    for wrong in ("", "now", fingerprint(state.bundle())):
        kept = go(reread(state, **{RETIRED: wrong}), NOW, generate, delivered=False)
        assert kept is None
    retired = go(reread(state, **{RETIRED: fingerprint(previous)}), NOW, generate, delivered=False)
    assert retired is not None
    assert retired.trusted == state.authority.certificates
    assert retired.write()[1] == {}
    # While another one is being prepared, that goes on.
    preparing = attrs.evolve(state, following=generate(NOW), since=NOW)
    following = go(reread(preparing, **{RETIRED: fingerprint(previous)}), NOW + DAY, generate)
    assert following is not None
    assert (following.previous, following.following) == ((), preparing.following)
    # The bundle is another one: it has to be delivered.
    assert (following.began, following.since) == (NOW, None)


def test_an_administrator_ends_the_wait_for_agents(generate: Any) -> None:
    prepared = State(authority=generate(NOW), following=generate(NOW), began=NOW)
    right = {DELIVERED: fingerprint(prepared.bundle())}
    assert go(prepared, NOW, generate, agents=False) is None
    said = reread(prepared, **right)
    assert go(said, NOW, generate, agents=False) == attrs.evolve(said, since=NOW)
    # What is on the hub is waited for all the same.
    assert go(said, NOW, generate, delivered=False, agents=False) is None
    # What was said of another bundle means nothing.
    another = reread(attrs.evolve(prepared, following=generate(NOW)), **right)
    assert go(another, NOW, generate, agents=False) is None
    # Nor does it of certificates.
    retiring = State(authority=generate(NOW), previous=generate(NOW).certificates, began=NOW)
    said = reread(retiring, **{DELIVERED: fingerprint(retiring.bundle())})
    assert go(said, NOW, generate, agents=False) is None


def somebodys(begin: datetime, end: datetime) -> Authority:
    """Make an authority that neither we nor the original have made."""
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Example Corp, CA")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return load_authority(
        certificate.public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )


def test_somebodys_own_authority_is_replaced_on_request_only(generate: Any) -> None:
    end = NOW + 100 * DAY
    state = reread(State(authority=somebodys(NOW, end)))
    assert waits_for(state, (), {}, NOW + 79 * DAY, "ns/signer") is None
    for now in (NOW + 90 * DAY, end, end + DAY):
        assert go(state, now, generate) is None
        told = waits_for(state, (), {}, now, "ns/signer")
        assert told is not None
        assert (told.by_itself, told.reason) == (False, "CAExpiring")
        assert "2027-03-06T00:00:00Z" in told.message
        asked = go(reread(state, **{REQUEST: "please"}), now, generate)
        assert asked is not None
        assert asked.phase is (Phase.PREPARE if now < end else Phase.STEADY)
    # Its end comes nearer in a rotation, too, which may wait for half a year.
    retire = attrs.evolve(state, previous=generate(NOW).certificates, began=NOW)
    for agents in ({}, {"away": ""}):
        told = waits_for(retire, (), agents, NOW + 90 * DAY, "ns/signer")
        assert told is not None
        assert (told.by_itself, told.reason) == (False, "CAExpiring")
        assert "2027-03-06T00:00:00Z" in told.message
        assert "retire since" in told.message
    prepare = attrs.evolve(state, following=generate(NOW), began=NOW)
    told = waits_for(prepare, (), {}, NOW + 90 * DAY, "ns/signer")
    assert told is not None
    assert told.reason == "Delivered"
    # Its successor may be somebody's own, too.
    data, _ = state.write()
    own = somebodys(NOW, end + 100 * DAY)
    brought = Rotation.read({**data, "next-ca.crt": own.crt, "next-ca.key": own.key}, {})
    brought = attrs.evolve(brought, began=NOW, since=NOW)
    switched = go(brought, NOW + DAY, generate)
    assert switched is not None
    assert switched.authority == own


def test_what_is_waited_for_is_told(generate: Any) -> None:
    steady = State(authority=generate(NOW))
    assert waits_for(steady, (), {}, NOW, "ns/signer") is None
    bad = waits_for(reread(steady, **{OVERLAP: "soon"}), (), {}, NOW, "ns/signer")
    assert bad is not None
    assert (bad.by_itself, bad.reason) == (False, "InvalidAnnotation")
    assert bad.message.startswith(f"annotation {OVERLAP}: ")

    prepared = attrs.evolve(steady, following=generate(NOW), began=NOW)
    hub = waits_for(
        prepared, [f"Secret ns/{number}" for number in range(7)], None, NOW, "ns/signer"
    )
    assert hub is not None
    assert (hub.by_itself, hub.reason) == (True, "AwaitingHub")
    assert hub.message.startswith("prepare since 2026-11-26T00:00:00Z: ")
    assert "Secret ns/4 and 2 more" in hub.message
    agents = waits_for(prepared, (), None, NOW, "ns/signer")
    assert agents is not None
    assert (agents.by_itself, agents.reason) == (False, "AwaitingDelivery")
    said = f"{DELIVERED}={fingerprint(prepared.bundle())}"
    assert agents.message.endswith(f"kubectl -n ns annotate secret signer --overwrite {said}")
    both = waits_for(reread(prepared, **{OVERLAP: "soon"}), (), None, NOW, "ns/signer")
    assert both is not None
    assert both.message == f"{bad.message}; {agents.message}"

    delivered = attrs.evolve(reread(prepared, **dict([said.split("=")])), since=NOW + MINUTE)
    soon = waits_for(delivered, (), None, NOW + MINUTE, "ns/signer")
    assert soon is not None
    assert soon == waits_for(attrs.evolve(delivered, delivered=""), (), {}, NOW, "ns/signer")
    assert soon == waits_for(delivered, (), {"one": ""}, NOW, "ns/signer")
    assert (soon.by_itself, soon.reason) == (True, "Delivered")
    assert soon.message.endswith("from 2026-11-26T00:11:00Z on")

    retiring = go(delivered, NOW + DAY, generate)
    assert retiring is not None
    late = waits_for(retiring, ["Secret ns/proxy-server"], {}, NOW + DAY, "ns/signer")
    assert late is not None
    assert (late.by_itself, late.reason) == (True, "AwaitingHub")
    last = waits_for(retiring, (), None, NOW + DAY, "ns/signer")
    assert last is not None
    assert (last.by_itself, last.reason) == (True, "Retiring")
    assert "until 2027-05-27T00:00:00Z" in last.message
    command = f"{RETIRED}={fingerprint(retiring.write()[0]['previous-ca.crt'])}"
    assert last.message.endswith(command)
    over = waits_for(attrs.evolve(retiring, since=NOW + DAY), (), {}, NOW + 2 * DAY, "ns/signer")
    assert over is not None
    assert over == waits_for(retiring, (), {}, NOW + DAY, "ns/signer")
    assert (over.by_itself, over.reason) == (True, "Retiring")
    assert over.message.endswith("until 2026-11-27T00:10:00Z")


def test_the_clusters_that_are_waited_for_are_named(generate: Any) -> None:
    prepared = State(authority=generate(NOW), following=generate(NOW), began=NOW)
    names = {f"cluster{number}": "" for number in range(7)}
    waiting = waits_for(prepared, (), names, NOW, "ns/signer")
    assert waiting is not None
    assert (waiting.by_itself, waiting.reason) == (True, "AwaitingAgents")
    assert ": cluster0, cluster1, cluster2, cluster3, cluster4 and 2 more. " in waiting.message
    command = f"{DELIVERED}={fingerprint(prepared.bundle())}"
    assert waiting.message.endswith(f"annotate secret signer --overwrite {command}")
    # One that does not come by itself needs a decision, wherever it is in the list.
    stuck = waits_for(prepared, (), names | {"cluster6": "not available"}, NOW, "ns/signer")
    assert stuck is not None
    assert (stuck.by_itself, stuck.reason) == (False, "AwaitingDelivery")
    one = waits_for(prepared, (), {"far": "not available"}, NOW, "ns/signer")
    assert one is not None
    assert ": far (not available). " in one.message

    retiring = State(authority=generate(NOW), previous=generate(NOW).certificates, began=NOW)
    waiting = waits_for(retiring, (), {"a": "", "far": "not available"}, NOW, "ns/signer")
    assert waiting is not None
    assert (waiting.by_itself, waiting.reason) == (True, "Retiring")
    assert "until 2027-05-26T00:00:00Z" in waiting.message
    assert ": a, far (not available). " in waiting.message
    assert f" {RETIRED}=" in waiting.message


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
    numbers: dict[str, object] = dict.fromkeys(
        (REQUEST, ACTED_ON, BEGAN, SINCE, OVERLAP, DELIVERED, RETIRED), 5
    )
    assert Rotation.read(data, numbers).began is None


@attrs.frozen
class Certificate:
    """A certificate: who issued it, and until when it may be used."""

    issuer: x509.Certificate
    end: datetime


@attrs.define
class Holder(Generic[T]):
    """A secret, and what may be in use of what was in it: it takes up to the overlap until something new is."""

    stored: T
    before: list[tuple[T, datetime]] = attrs.field(factory=list[Any])

    def write(self, content: T, now: datetime) -> None:
        self.before.append((self.stored, now + DEFAULT_OVERLAP))
        self.stored = content

    def used(self, now: datetime) -> list[T]:
        self.before = [(content, until) for content, until in self.before if now < until]
        return [self.stored, *(content for content, _ in self.before)]


class Overlap(RuleBasedStateMachine):
    """Bundles and certificates reach secrets at any time, in any order, after any step of any manager, and their users later."""

    generate: Any

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.tokens = count()
        self.state = State(authority=self.generate(NOW))
        bundle = self.state.bundle()
        # The first two are the hub's, which a pass looks at; the last one's its cluster answers for.
        self.secrets = [Holder(bundle) for _ in range(3)]
        self.certificates = [Holder(self._issue()) for _ in range(3)]

    def _issue(self) -> Certificate:
        return Certificate(self.state.authority.certificate, self.now + LEAF_VALIDITY)

    @rule(minutes=st.integers(0, 12) | st.integers(0, 200 * 24 * 60))
    def time_passes(self, minutes: int) -> None:
        self.wait(minutes)

    def wait(self, minutes: int) -> None:
        # With an authority that has expired nothing works anyway.
        end = self.state.authority.certificate.not_valid_after_utc
        self.now = min(self.now + minutes * MINUTE, end - DAY)
        for certificate in self.certificates:
            if certificate.stored.end <= self.now:
                certificate.write(self._issue(), self.now)

    @initialize()
    def ask(self) -> None:
        self.state = attrs.evolve(self.state, requested=str(next(self.tokens)))

    @rule(again=st.sampled_from([True, False, False]), minutes=st.integers(0, 10))
    def ask_again(self, again: bool, minutes: int) -> None:
        if again or self.state.phase is not Phase.PREPARE:
            self.wait(minutes)
            self.ask()

    def deliver(self, place: int) -> None:
        if self.secrets[place].stored != self.state.bundle():
            self.secrets[place].write(self.state.bundle(), self.now)

    def reissue(self, place: int) -> None:
        if self.certificates[place].stored.issuer != self.state.authority.certificate:
            self.certificates[place].write(self._issue(), self.now)

    @rule(bundle=st.booleans(), certificate=st.booleans())
    def the_agent_gets(self, bundle: bool, certificate: bool) -> None:
        if bundle:
            self.deliver(2)
        if certificate:
            self.reissue(2)

    @precondition(lambda self: self.state.phase is Phase.PREPARE and not self.state.previous)
    @rule(place=st.integers(0, 1), minutes=st.integers(0, 10))
    def somebody_puts_back_the_old_bundle(self, place: int, minutes: int) -> None:
        self.wait(minutes)
        self.secrets[place].write(self.state.authority.crt, self.now)
        # What is changed is looked at, and put right.
        self.reconcile(known=True, writes=True)

    @rule(
        minutes=st.lists(st.sampled_from([0, 5, 11]), min_size=1, max_size=4),
        known=st.sampled_from([True, True, True, False]),
        writes=st.sampled_from([True, True, True, False]),
        agent=st.booleans(),
    )
    def the_manager_works(self, minutes: list[int], known: bool, writes: bool, agent: bool) -> None:
        for pause in minutes:
            self.wait(pause)
            self.reconcile(known=known, writes=writes)
            if agent:
                self.deliver(2)

    def reconcile(self, *, known: bool, writes: bool) -> None:
        state = self.state
        # A caller who does not know says no.
        delivered = all(each.stored == state.bundle() for each in self.secrets[:2])
        old = [each.stored.issuer in state.previous for each in self.certificates]
        if state.phase is Phase.RETIRE:
            delivered = delivered and not any(old[:2])
            agents = known and not old[2]
        else:
            agents = known and self.secrets[2].stored == state.bundle()
        if writes:
            for place in (0, 1):
                self.deliver(place)
                self.reissue(place)
        following = step(
            state, self.now, delivered=delivered, agents=agents, generate=self.generate
        )
        if following is not None:
            self.state = reread(following, **{REQUEST: self.state.requested})
            assert self.state.phase is following.phase

    @invariant()
    def every_certificate_is_trusted_by_everybody(self) -> None:
        bundles = {used for secret in self.secrets for used in secret.used(self.now)}
        issuers = {
            used.issuer
            for certificate in self.certificates
            for used in certificate.used(self.now)
            if self.now < used.end
        }
        for bundle in bundles:
            assert issuers <= set(load_certificates(bundle, "bundle"))

    @invariant()
    def what_signs_is_trusted(self) -> None:
        assert self.state.trusted[0] == self.state.authority.certificate


def test_every_certificate_in_use_is_trusted_by_every_bundle_in_use(generate: Any) -> None:
    machine = type("Overlap", (Overlap,), {"generate": staticmethod(generate)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            derandomize=True, max_examples=examples(200), stateful_step_count=40, deadline=None
        ),
    )

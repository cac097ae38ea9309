from __future__ import annotations

import base64
import copy
import ipaddress
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import pytest
from agents import Case, deployment_config, golden_case, golden_manifests
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from golden_objects import HOSTNAME, PORT_FORWARD, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterproxy.addon.certificate_request import TOO_LARGE, RequestRefused, load_request
from clusterproxy.addon.certificates import Authority, issued_by, new_authority
from clusterproxy.addon.csr import (
    Decision,
    Verdict,
    approval,
    approved,
    is_ours,
    needs_signature,
    requester,
    signed,
)
from clusterproxy.addon.registration import (
    AGENT_SIGNER,
    KUBE_CLIENT_SIGNER,
    Subject,
    agent_registrations,
)
from clusterproxy.tunnel.agent_identity import IdentityRefused, check_identity
from clusterproxy.tunnel.identifiers import Identifiers

NOW = datetime(2026, 11, 26, 6, 0, 0, 500_000, tzinfo=UTC)
BEGAN = datetime(2026, 11, 20, 6, 0, 0, tzinfo=UTC)
DAY = timedelta(days=1)

CLUSTER: dict[str, Any] = {"metadata": {"name": "cluster1"}, "spec": {"hubAcceptsClient": True}}
ADDON: dict[str, Any] = {"metadata": {"name": "cluster-proxy", "namespace": "cluster1"}}
HOST = "cluster-proxy.addon.open-cluster-management.io"
URI = "urn:open-cluster-management:cluster-proxy:cluster:cluster1"
KLUSTERLET = "system:open-cluster-management:cluster1:agent"

Object = dict[str, Any]
Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | dsa.DSAPrivateKey

EC_KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def authority() -> Authority:
    return new_authority(BEGAN)


def registered(crt: bytes, signer: str) -> Subject:
    (subject,) = (each.subject for each in agent_registrations(crt) if each.signer == signer)
    return subject


def pem(
    subject: Subject,
    *,
    names: list[x509.GeneralName] | None = None,
    more: list[x509.NameAttribute[Any]] | None = None,
    key: Key = EC_KEY,
    extensions: list[x509.ExtensionType] | None = None,
) -> bytes:
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, each) for each in subject.groups]
    attributes += [
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, each, _validate=False)
        for each in subject.organization_units
    ]
    if subject.user:
        attributes.append(x509.NameAttribute(NameOID.COMMON_NAME, subject.user))
    builder = x509.CertificateSigningRequestBuilder(x509.Name([*attributes, *(more or [])]))
    names = [x509.DNSName(HOST)] if names is None else names
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in extensions or []:
        builder = builder.add_extension(extension, critical=True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM)


def request(content: bytes, *, signer: str = AGENT_SIGNER, **spec: Any) -> Object:
    return {
        "metadata": {
            "name": "addon-cluster1-cluster-proxy-abcde",
            "labels": {
                "open-cluster-management.io/addon-name": "cluster-proxy",
                "open-cluster-management.io/cluster-name": "cluster1",
            },
        },
        "spec": {
            "request": base64.b64encode(content).decode(),
            "signerName": signer,
            "username": KLUSTERLET,
            "groups": [
                "system:open-cluster-management:cluster1",
                "system:open-cluster-management:managed-clusters",
                "system:authenticated",
            ],
            **spec,
        },
    }


def good(authority: Authority, signer: str = AGENT_SIGNER, **content: Any) -> Object:
    return request(pem(registered(authority.crt, signer), **content), signer=signer)


def decide(
    authority: Authority, obj: Object, cluster: Any = CLUSTER, addon: Any = ADDON
) -> Decision:
    before = copy.deepcopy(obj)
    decision = approval(obj, cluster, addon, authority.crt)
    assert obj == before
    return decision


def sign(authority: Authority, obj: Object, now: datetime = NOW) -> x509.Certificate:
    after = signed(obj, CLUSTER, ADDON, authority, now)
    assert {**after, "status": None} == {**obj, "status": None}
    encoded = base64.b64decode(after["status"]["certificate"])
    (certificate,) = x509.load_pem_x509_certificates(encoded)
    return certificate


@pytest.mark.parametrize("signer", [AGENT_SIGNER, KUBE_CLIENT_SIGNER])
def test_a_klusterlet_gets_what_is_registered(authority: Authority, signer: str) -> None:
    # C17
    obj = good(authority, signer)
    decision = decide(authority, obj)
    assert decision.verdict is Verdict.APPROVE
    after = approved({**obj, "status": {"conditions": [{"type": "Other"}]}}, decision)
    assert after["status"]["conditions"] == [
        {"type": "Other"},
        {
            "type": "Approved",
            "status": "True",
            "reason": "AutoApprovedByHubCSRApprovingController",
            "message": "Auto approving addon agent certificate.",
        },
    ]
    assert decide(authority, after).verdict is Verdict.IGNORE
    # The other is signed by kube-controller-manager.
    assert needs_signature(after) == (signer == AGENT_SIGNER)
    assert not needs_signature(obj)


@pytest.mark.parametrize(
    "groups", [(), ("system:authenticated",), ("open-cluster-management:cluster-proxy",)]
)
def test_the_group_of_all_may_be_added(authority: Authority, groups: tuple[str, ...]) -> None:
    subject = registered(authority.crt, AGENT_SIGNER)
    subject = attrs.evolve(subject, groups=(*subject.groups, *groups))
    assert decide(authority, request(pem(subject))).verdict is Verdict.APPROVE


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("name",), "csr-1"),
        (("name",), None),
        (("labels",), None),
        (("labels", "open-cluster-management.io/addon-name"), "other"),
        (("labels", "open-cluster-management.io/cluster-name"), ""),
        (("labels", "open-cluster-management.io/cluster-name"), ["cluster1"]),
    ],
)
def test_what_is_not_ours(authority: Authority, path: tuple[str, ...], value: Any) -> None:
    obj = good(authority)
    at = obj["metadata"]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert not is_ours(obj)
    assert decide(authority, obj).verdict is Verdict.IGNORE
    obj["status"] = {"conditions": [{"type": "Approved"}]}
    assert not needs_signature(obj)


@pytest.mark.parametrize("kind", ["Approved", "Denied", "Failed"])
def test_what_is_decided(authority: Authority, kind: str) -> None:
    obj = good(authority)
    obj["status"] = {"conditions": [None, {"type": kind}]}
    assert decide(authority, obj).verdict is Verdict.IGNORE
    assert needs_signature(obj) == (kind == "Approved")
    obj["status"]["conditions"].append({"type": "Denied"})
    assert not needs_signature(obj)
    obj["status"] = {"conditions": [{"type": "Approved"}], "certificate": "x"}
    assert not needs_signature(obj)


@pytest.mark.parametrize(
    ("cluster", "addon", "reason"),
    [
        (None, ADDON, "ClusterNotFound"),
        ({**CLUSTER, "metadata": {"name": "cluster2"}}, ADDON, "ClusterNotFound"),
        ({**CLUSTER, "metadata": {"name": "cluster1", "deletionTimestamp": "t"}}, ADDON, "ClusterNotFound"),
        ({**CLUSTER, "spec": {"hubAcceptsClient": False}}, ADDON, "ClusterNotAccepted"),
        ({**CLUSTER, "spec": {"hubAcceptsClient": "true"}}, ADDON, "ClusterNotAccepted"),
        ({**CLUSTER, "spec": None}, ADDON, "ClusterNotAccepted"),
        (CLUSTER, None, "AddonNotFound"),
        (CLUSTER, {"metadata": {"namespace": "cluster2"}}, "AddonNotFound"),
        (CLUSTER, {"metadata": {"namespace": "cluster1", "deletionTimestamp": "t"}}, "AddonNotFound"),
    ],
)  # fmt: skip
def test_a_cluster_that_may_not(
    authority: Authority, cluster: Any, addon: Any, reason: str
) -> None:
    # C17
    obj = good(authority)
    decision = decide(authority, obj, cluster, addon)
    assert (decision.verdict, decision.reason) == (Verdict.LEAVE_PENDING, reason)
    assert "cluster1" in decision.message
    with pytest.raises(RequestRefused) as refusal:
        signed(obj, cluster, addon, authority, NOW)
    assert refusal.value.reason == reason


GROUP = "system:open-cluster-management:cluster1"
GRPC = "system:serviceaccount:open-cluster-management-hub:grpc-server-sa"


@pytest.mark.parametrize(
    ("username", "groups", "annotation", "cluster"),
    [
        (KLUSTERLET, [GROUP], None, "cluster1"),
        ("system:serviceaccount:cluster1:agent", ["system:serviceaccounts:cluster1"], None, "cluster1"),
        (GRPC, ["system:serviceaccounts:open-cluster-management-hub"], KLUSTERLET, "cluster1"),
        ("cluster1", ["open-cluster-management:cluster1"], None, "cluster1"),
        # Of another cluster, if its name begins so.
        ("system:open-cluster-management:cluster10:agent", ["system:open-cluster-management:cluster10"], None, "cluster10"),
        # Says that it was another, and was not asked by the hub's gRPC server.
        ("system:open-cluster-management:cluster2:agent", ["system:open-cluster-management:cluster2"], KLUSTERLET, "cluster2"),
        (KLUSTERLET, [], None, ""),
        (KLUSTERLET, ["system:open-cluster-management:cluster2"], None, ""),
        (KLUSTERLET, "x", None, ""),
        (GROUP, [GROUP], None, ""),
        (f"{GROUP}:", [GROUP], None, ""),
        ("system:open-cluster-management::agent", ["system:open-cluster-management:"], None, ""),
        (f"{KLUSTERLET}:more", [GROUP], None, ""),
        # The agent of another add-on of the cluster.
        ("system:open-cluster-management:cluster:cluster1:addon:other:agent:other", ["system:open-cluster-management:cluster:cluster1:addon:other"], None, ""),
        ("open-cluster-management:cluster-proxy:addon-agent", ["open-cluster-management:cluster-proxy"], None, ""),
        ("system:serviceaccount:cluster1:agent", ["system:serviceaccounts:cluster2"], None, ""),
        (GRPC, ["system:serviceaccounts:open-cluster-management-hub"], None, ""),
        (GRPC, ["system:serviceaccounts:open-cluster-management-hub"], 5, ""),
        ("cluster1", ["open-cluster-management:cluster2"], None, ""),
        ("", ["open-cluster-management:"], None, ""),
        ("admin", ["system:masters"], None, ""),
        (None, None, None, ""),
        ([KLUSTERLET], [GROUP], None, ""),
    ],
)  # fmt: skip
def test_who_has_asked(
    authority: Authority, username: Any, groups: Any, annotation: Any, cluster: str
) -> None:
    obj = good(authority)
    obj["spec"] |= {"username": username, "groups": groups}
    if annotation is not None:
        obj["metadata"]["annotations"] = {"open-cluster-management.io/csr-user": annotation}
    assert requester(obj) == cluster
    decision = decide(authority, obj)
    if cluster == "cluster1":
        assert decision.verdict is Verdict.APPROVE
        return
    reason = "ForeignRequester" if cluster else "UnknownRequester"
    assert (decision.verdict, decision.reason) == (Verdict.LEAVE_PENDING, reason)
    # Even if somebody else has approved it.
    with pytest.raises(RequestRefused) as refusal:
        signed(obj, CLUSTER, ADDON, authority, NOW)
    assert refusal.value.reason == reason


def test_a_label_is_not_believed(authority: Authority) -> None:
    obj = good(authority)
    obj["metadata"]["labels"]["open-cluster-management.io/cluster-name"] = "cluster2"
    cluster = {**CLUSTER, "metadata": {"name": "cluster2"}}
    addon = {"metadata": {"name": "cluster-proxy", "namespace": "cluster2"}}
    decision = decide(authority, obj, cluster, addon)
    assert decision == Decision(
        Verdict.LEAVE_PENDING,
        "ForeignRequester",
        f"{KLUSTERLET!r} has asked for it, which is of cluster cluster1, and the label "
        "open-cluster-management.io/cluster-name says cluster2",
    )


@pytest.mark.parametrize("signer", ["", "kubernetes.io/kubelet-serving", "example.com/x", None, 5])
def test_a_signer_that_is_not_registered(authority: Authority, signer: Any) -> None:
    # C17
    obj = good(authority)
    obj["spec"]["signerName"] = signer
    assert decide(authority, obj).reason == "UnknownSigner"


def foreign(reason: str, authority: Authority, obj: Object) -> str:
    decision = decide(authority, obj)
    assert (decision.verdict, decision.reason) == (Verdict.LEAVE_PENDING, reason)
    assert decision.message.startswith("spec.request")
    with pytest.raises(RequestRefused) as refusal:
        signed(obj, CLUSTER, ADDON, authority, NOW)
    assert str(refusal.value) == decision.message
    return decision.message


@pytest.mark.parametrize("signer", [AGENT_SIGNER, KUBE_CLIENT_SIGNER])
@pytest.mark.parametrize(
    "change",
    [
        {"user": "system:admin"},
        {"user": ""},
        {"groups": ()},
        {"groups": ("system:masters",)},
        {"groups": ("open-cluster-management:cluster-proxy", "system:masters")},
        {"organization_units": ("signer-00",)},
    ],
)
def test_a_subject_that_is_not_registered(
    authority: Authority, signer: str, change: dict[str, Any]
) -> None:
    subject = attrs.evolve(registered(authority.crt, signer), **change)
    message = foreign("ForeignSubject", authority, request(pem(subject), signer=signer))
    assert "registered are CN open-cluster-management:cluster-proxy:" in message


@pytest.mark.parametrize(
    "more",
    [
        x509.NameAttribute(
            NameOID.COMMON_NAME, "open-cluster-management:cluster-proxy:proxy-agent"
        ),
        x509.NameAttribute(NameOID.COMMON_NAME, "admin"),
        x509.NameAttribute(NameOID.COUNTRY_NAME, "DE"),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "more"),
    ],
)
def test_a_subject_that_has_more(authority: Authority, more: x509.NameAttribute[Any]) -> None:
    foreign("ForeignSubject", authority, good(authority, more=[more]))


def test_the_unit_is_of_the_authority_that_signs(authority: Authority) -> None:
    obj = good(attrs.evolve(authority, crt=b"the last one"))
    foreign("ForeignSubject", authority, obj)


@pytest.mark.parametrize("signer", [AGENT_SIGNER, KUBE_CLIENT_SIGNER])
@pytest.mark.parametrize(
    "name",
    [
        x509.DNSName("proxy-entrypoint.open-cluster-management-addon"),
        x509.DNSName("*"),
        x509.DNSName(HOST.upper()),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.RFC822Name("a@example.com"),
        x509.RegisteredID(NameOID.COMMON_NAME),
    ],
)
def test_a_host_that_is_not_the_agents(
    authority: Authority, signer: str, name: x509.GeneralName
) -> None:
    foreign("ForeignName", authority, good(authority, signer, names=[x509.DNSName(HOST), name]))


@pytest.mark.parametrize(
    ("uri", "verdict"),
    [
        (URI, Verdict.APPROVE),
        (f"{URI}0", Verdict.LEAVE_PENDING),
        (URI.replace("cluster1", "cluster2"), Verdict.LEAVE_PENDING),
        ("spiffe://a/b", Verdict.LEAVE_PENDING),
    ],
)
def test_uris_are_not_taken_over(authority: Authority, uri: str, verdict: Verdict) -> None:
    obj = good(authority, names=[x509.UniformResourceIdentifier(uri)])
    assert decide(authority, obj).verdict is verdict
    # If it was approved by somebody else, it gets the cluster's own.
    names = sign(authority, obj).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert list(names.value) == [x509.UniformResourceIdentifier(URI)]


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP224R1()),
        ec.generate_private_key(ec.BrainpoolP256R1()),
        rsa.generate_private_key(65537, 1024),  # noqa: S505
    ],
    ids=["P-224", "Brainpool", "RSA-1024"],
)
def test_a_weak_key(authority: Authority, key: Key) -> None:
    foreign("WeakKey", authority, good(authority, key=key))


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1(), None])
def test_a_strong_key(authority: Authority, curve: ec.EllipticCurve | None) -> None:
    key: Key = (
        ed25519.Ed25519PrivateKey.generate() if curve is None else ec.generate_private_key(curve)
    )
    obj = good(authority, key=key)
    assert decide(authority, obj).verdict is Verdict.APPROVE
    assert sign(authority, obj).public_key() == key.public_key()


def test_an_rsa_key(authority: Authority) -> None:
    obj = good(authority, key=authority.private_key)
    assert decide(authority, obj).verdict is Verdict.APPROVE


def test_a_request_that_is_signed_by_another_key(authority: Authority) -> None:
    der = bytearray(
        x509.load_pem_x509_csr(pem(registered(authority.crt, AGENT_SIGNER))).public_bytes(
            Encoding.DER
        )
    )
    der[-1] ^= 1
    text = base64.encodebytes(bytes(der)).decode()
    content = f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n"
    message = foreign("Malformed", authority, request(content.encode()))
    assert message == "spec.request is not signed by the key that it is for"


@pytest.mark.parametrize("content", [None, "", "%", 5, base64.b64encode(b"x").decode(), base64.b64encode(b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n").decode()])  # fmt: skip
def test_a_request_that_is_none(authority: Authority, content: Any) -> None:
    obj = good(authority)
    obj["spec"]["request"] = content
    message = foreign("Malformed", authority, obj)
    assert message.startswith("spec.request is no certificate request in PEM: ")


def test_a_request_that_is_not_kept_is_refused(authority: Authority) -> None:
    obj = good(authority)
    obj["spec"]["request"] = TOO_LARGE
    foreign("TooLarge", authority, obj)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_a_request_that_was_damaged(place: int, damage: bytes) -> None:
    crt = b"any"
    content = pem(registered(crt, AGENT_SIGNER))
    der = x509.load_pem_x509_csr(content).public_bytes(Encoding.DER)
    place %= len(der)
    broken = der[:place] + damage + der[place + len(damage) :]
    text = base64.encodebytes(broken).decode()
    obj = request(
        f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n".encode()
    )
    decision = approval(obj, CLUSTER, ADDON, crt)
    assert (decision.verdict is Verdict.APPROVE) == (broken == der)


def test_what_is_signed(authority: Authority) -> None:
    # C17
    usage = x509.BasicConstraints(ca=True, path_length=None)
    obj = good(authority, extensions=[usage])
    certificate = sign(authority, obj)
    parsed = x509.load_pem_x509_csr(base64.b64decode(obj["spec"]["request"]))
    assert issued_by(certificate, authority.certificate)
    assert certificate.subject == parsed.subject
    assert certificate.public_key() == parsed.public_key()
    assert isinstance(certificate.signature_hash_algorithm, hashes.SHA256)
    assert certificate.not_valid_before_utc == NOW.replace(microsecond=0)
    assert certificate.not_valid_after_utc == NOW.replace(microsecond=0) + 180 * DAY
    found = {extension.oid: extension for extension in certificate.extensions}
    assert x509.BasicConstraints.oid not in found
    key_usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert key_usage.critical
    assert key_usage.value.digital_signature
    assert key_usage.value.key_encipherment
    assert not key_usage.value.key_cert_sign
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DNSName(HOST), x509.UniformResourceIdentifier(URI)]
    assert sign(authority, obj).serial_number != certificate.serial_number


def test_a_request_without_hosts(authority: Authority) -> None:
    obj = good(authority, names=[])
    assert decide(authority, obj).verdict is Verdict.APPROVE
    names = sign(authority, obj).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert list(names.value) == [x509.UniformResourceIdentifier(URI)]


def test_an_authority_that_does_not_name_its_key(authority: Authority) -> None:
    name = authority.certificate.subject
    plain = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(authority.private_key.public_key())
        .serial_number(1)
        .not_valid_before(BEGAN)
        .not_valid_after(BEGAN + 30 * DAY)
        .sign(authority.private_key, hashes.SHA256())
    )
    plain_authority = attrs.evolve(authority, certificates=(plain,))
    keys = [
        sign(each, good(each)).extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
        for each in (authority, plain_authority)
    ]
    assert keys[0] == keys[1]


def test_nothing_outlives_the_authority(authority: Authority) -> None:
    end = authority.certificate.not_valid_after_utc
    obj = good(authority)
    assert sign(authority, obj, end - DAY).not_valid_after_utc == end
    assert sign(authority, obj, BEGAN - DAY).not_valid_before_utc == BEGAN
    with pytest.raises(RequestRefused, match="the CA expired at 2036-11-17 06:00:00") as refusal:
        sign(authority, obj, end)
    assert refusal.value.reason == "AuthorityExpired"


def golden_requests(situation: str) -> list[Object]:
    return [
        obj for (kind, _), obj in golden(situation).items() if kind == "CertificateSigningRequest"
    ]


# In what a signed certificate differs from the original's: (extension, reason).
DIFFERENCES = {"subjectAltName": "the URI says of which cluster it is"}


@pytest.mark.parametrize("situation", ["02-hub-addon", "07-hub-addon"])
def test_golden_requests(authority: Authority, situation: str) -> None:
    for obj in golden_requests(situation):
        signer = obj["spec"]["signerName"]
        fresh = {**obj, "status": {}}
        assert not needs_signature(obj)
        # An administrator asked for those, which the original did not look at.
        assert decide(authority, fresh).reason == "UnknownRequester"
        fresh["spec"] = {
            **obj["spec"],
            **{key: good(authority)["spec"][key] for key in ("username", "groups")},
        }
        theirs = x509.load_pem_x509_certificate(base64.b64decode(obj["status"]["certificate"]))
        if signer == KUBE_CLIENT_SIGNER:
            decision = decide(authority, fresh)
            assert decision.verdict is Verdict.APPROVE
            (condition,) = obj["status"]["conditions"]
            (ours,) = approved(fresh, decision)["status"]["conditions"]
            assert ours == {key: condition[key] for key in ours}
            continue
        # Registered with another authority.
        assert decide(authority, fresh).reason == "ForeignSubject"
        units = theirs.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
        subject = attrs.evolve(
            registered(authority.crt, signer),
            organization_units=tuple(str(unit.value) for unit in units),
        )
        assert load_request(fresh, subject).subject == theirs.subject
        ours_signed = sign(authority, good(authority))
        assert described(ours_signed) == described(theirs)
        (names,) = (
            each.value for each in theirs.extensions if each.oid == x509.SubjectAlternativeName.oid
        )
        assert isinstance(names, x509.SubjectAlternativeName)
        assert list(names) == [x509.DNSName(HOST)]


def described(certificate: x509.Certificate) -> dict[str, Any]:
    return {
        "validity": certificate.not_valid_after_utc - certificate.not_valid_before_utc,
        "issuer": certificate.issuer.rfc4514_string(),
        "attributes": [each.oid for each in certificate.subject],
        "extensions": {
            each.oid._name: (each.critical, each.value)
            for each in certificate.extensions
            if each.oid._name not in {*DIFFERENCES, "authorityKeyIdentifier"}
        },
    }


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.recursive(
        st.none() | st.text(max_size=3) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["name", "labels", "username", "groups", "type"]), inner
            )
        ),
        max_leaves=6,
    )
)
def test_a_request_of_any_shape(value: Any) -> None:
    obj = request(b"x")
    for path in (("metadata", "labels"), ("metadata",), ("spec", "groups"), ("spec",), ("status",)):
        broken = copy.deepcopy(obj)
        at = broken
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        assert approval(broken, CLUSTER, ADDON, b"x").verdict is not Verdict.APPROVE
        assert approval(obj, value, value, b"x").verdict is not Verdict.APPROVE
        needs_signature(broken)


# -- what proxy servers make of it -----------------------------------------------------------------


def uris_of(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def claimed(manifests: list[Object]) -> Identifiers:
    """Return what the agent claims that is among *manifests*, by its arguments."""
    [text] = [
        argument.removeprefix("--agent-identifiers=")
        for obj in manifests
        if obj["kind"] == "Deployment"
        for container in obj["spec"]["template"]["spec"]["containers"]
        for argument in container["args"]
        if argument.startswith("--agent-identifiers=")
    ]
    return Identifiers.parse(text)


@pytest.mark.parametrize(
    ("case", "count"),
    [
        (Case(), 3),
        (Case().with_service_proxy(), 3),
        (Case().told(enable_kube_api_proxy=False), 1),
        (Case().told(enable_kube_api_proxy=False).with_service_proxy(), 1),
        (Case().told(agent_install_namespace="own-ns"), 3),
        (Case().given(deployment_config=deployment_config(agentInstallNamespace="there")), 3),
        (golden_case(HOSTNAME), 3),
        (golden_case(PORT_FORWARD), 3),
    ],
)
def test_a_server_accepts_every_agent_with_its_own_certificate(
    authority: Authority, case: Case, count: int
) -> None:
    identifiers = claimed(list(case.objects().values()))
    assert len(identifiers.hosts) == count
    uris = uris_of(sign(authority, good(authority)))
    assert check_identity(uris, identifiers, required=True) == "cluster1"
    # And with that of no other cluster.
    with pytest.raises(IdentityRefused):
        check_identity([f"{URI}0"], identifiers, required=False)


@pytest.mark.parametrize(
    "situation", ["02-hub-addon", "03-manifests", "07-custom-namespace", "07-hub-addon"]
)
def test_a_server_accepts_the_originals_agents(authority: Authority, situation: str) -> None:
    uris = uris_of(sign(authority, good(authority)))
    identifiers = claimed(golden_manifests(situation))
    assert check_identity(uris, identifiers, required=True) == "cluster1"

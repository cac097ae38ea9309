"""An installation as the original leaves it: its objects, with certificates as it makes them."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from golden_objects import golden, original_rights

from kube.installation import RBAC

if TYPE_CHECKING:
    from collections.abc import Collection

    from kube.control_plane import Object
    from kube.installation import Installation

_NAMESPACE: Final = "open-cluster-management-addon"
_HASH: Final = "proxy.open-cluster-management.io/rendered-hash"
_AUTHORITY: Final = "open-cluster-management:cluster-proxy"
_GIVEN: Final = ("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields")


# -- certificates ----------------------------------------------------------------------------------


@attrs.frozen
class GoAuthority:
    """A CA of the original's, which is 400 days old."""

    key: rsa.RSAPrivateKey
    certificate: x509.Certificate

    @staticmethod
    def make() -> GoAuthority:
        key = rsa.generate_private_key(65537, 2048)
        name = _name(_AUTHORITY)
        begin = datetime.now(UTC).replace(microsecond=0) - timedelta(days=400)
        certificate = (
            _builder(key, name, name, begin, begin + timedelta(days=3650))
            .add_extension(_usage(issues=True), critical=True)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier(_identifier(key)), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(_AUTHORITY)]), critical=False)
            .sign(key, hashes.SHA256())
        )
        return GoAuthority(key, certificate)

    @staticmethod
    def load(data: Object) -> GoAuthority:
        """Return the one in a secret's data."""
        crt, pem = (base64.b64decode(data[name]) for name in ("ca.crt", "ca.key"))
        key = load_pem_private_key(pem, None)
        assert isinstance(key, rsa.RSAPrivateKey)
        return GoAuthority(key, x509.load_pem_x509_certificate(crt))

    @property
    def crt(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def data(self) -> dict[str, bytes]:
        key = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return {"ca.crt": self.crt, "ca.key": key}

    def leaf(self, hosts: list[str], *, client: bool = False) -> dict[str, bytes]:
        """Return the data of a secret with a certificate that is a month old."""
        key = rsa.generate_private_key(65537, 2048)
        begin = datetime.now(UTC).replace(microsecond=0) - timedelta(days=30)
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        # Go writes names first, in order, then addresses; addresses are names, too.
        names = [x509.DNSName(host) for host in sorted(hosts)]
        addresses = [
            x509.IPAddress(ipaddress.ip_address(host))
            for host in sorted(hosts)
            if re.fullmatch("[0-9.]+", host)
        ]
        certificate = (
            _builder(
                key,
                _name(min(hosts)),
                self.certificate.subject,
                begin - timedelta(seconds=1),
                begin + timedelta(days=180),
            )
            .add_extension(_usage(issues=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier(_identifier(self.key), None, None), critical=False
            )
            .add_extension(x509.SubjectAlternativeName([*names, *addresses]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return {
            "tls.crt": certificate.public_bytes(Encoding.PEM) + self.crt,
            "tls.key": key.private_bytes(
                Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()
            ),
        }

    def sign(self, request: bytes) -> bytes:
        """Return the certificate that an agent's request gets: what stands in it, and nothing else."""
        asked = x509.load_pem_x509_csr(request)
        begin = datetime.now(UTC).replace(microsecond=0) - timedelta(days=30)
        names = asked.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
        return (
            x509.CertificateBuilder()
            .subject_name(asked.subject)
            .issuer_name(self.certificate.subject)
            .public_key(asked.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + timedelta(days=180))
            .add_extension(_usage(issues=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(names, critical=False)
            .sign(self.key, hashes.SHA256())
            .public_bytes(Encoding.PEM)
        )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    key: rsa.RSAPrivateKey,
    subject: x509.Name,
    issuer: x509.Name,
    begin: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def _usage(*, issues: bool) -> x509.KeyUsage:
    return x509.KeyUsage(True, False, True, False, False, issues, False, False, False)


def _identifier(key: rsa.RSAPrivateKey) -> bytes:
    """Return the identifier of a key as newer versions of Go make it."""
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.PKCS1)
    return hashlib.sha256(public).digest()[:20]


# -- objects ---------------------------------------------------------------------------------------


def install(manager: Installation, situation: str) -> dict[tuple[str, str], Object]:
    """Make what the original has made in a situation, and return it by kind and name."""
    wanted = json.loads(
        json.dumps(golden(situation)["ManagedProxyConfiguration", "cluster-proxy"]).replace(
            _NAMESPACE, manager.namespace
        )
    )
    configuration = manager.configure(**wanted["spec"])
    manager.plane.patch(configuration, {"status": wanted["status"]}, subresource="status")
    sent = objects(situation, configuration, manager.namespace, GoAuthority.make())
    return {
        key: manager.plane.call(
            "POST", manager.plane.path(obj["apiVersion"], obj["kind"], manager.namespace), obj
        )
        for key, obj in sent.items()
    }


def objects(
    situation: str, configuration: Object, namespace: str, authority: GoAuthority, *hosts: str
) -> dict[tuple[str, str], Object]:
    """Return what the original makes in a situation for a configuration, by kind and name.

    Certificates of servers are for these *hosts*, too.
    """
    theirs: dict[tuple[str, str], Any] = {
        key: json.loads(json.dumps(obj).replace(_NAMESPACE, namespace))
        for key, obj in golden(situation).items()
        if key[0] not in {"Namespace", "ManagedProxyConfiguration"}
    }
    secrets = _secrets(authority, namespace, hosts)
    for key, obj in theirs.items():
        for field in _GIVEN:
            obj["metadata"].pop(field, None)
        for owner in obj["metadata"]["ownerReferences"]:
            owner["uid"] = configuration["metadata"]["uid"]
        obj.pop("status", None)
        for field in ("clusterIP", "clusterIPs"):
            obj.get("spec", {}).pop(field, None)
        if obj["kind"] == "Secret":
            obj["data"] = {
                name: base64.b64encode(value).decode() for name, value in secrets[key[1]].items()
            }
        if key == ("Secret", "proxy-server-ca"):
            text = json.dumps({"data": obj["data"]}, separators=(",", ":"))
            obj["metadata"]["annotations"][_HASH] = hashlib.sha256(text.encode()).hexdigest()
    return theirs


def _secrets(
    authority: GoAuthority, namespace: str, more: Collection[str]
) -> dict[str, dict[str, bytes]]:
    local = ["127.0.0.1", "localhost"]
    service = f"proxy-entrypoint.{namespace}"
    hosts = [*local, service, f"{service}.svc", *more]
    user = "cluster-proxy-addon-user"
    names = [user, f"{user}.{namespace}", f"{user}.{namespace}.svc"]
    return {
        "cluster-proxy-signer": authority.data(),
        "proxy-server-ca": {"ca.crt": authority.crt},
        "proxy-server": authority.leaf(hosts),
        "agent-server": authority.leaf(hosts),
        "proxy-client": authority.leaf(hosts, client=True),
        "cluster-proxy-user-serving-cert": authority.leaf(
            [*local, *names, f"{names[-1]}.cluster.local"]
        ),
    }


def give_rights(manager: Installation) -> None:
    """Give the manager the rights that the original's chart gives, instead of those of our manifest."""
    name = "open-cluster-management:cluster-proxy:addon-manager"
    rules = original_rights()
    role = manager.get(RBAC, "Role", name)
    manager.plane.patch(role, {"rules": rules["Role"]})
    binding: Any = manager.plane.get(RBAC, "ClusterRoleBinding", f"{name}:{manager.namespace}")
    manager.plane.delete(binding)
    cluster_role = f"{name}-of-the-original"
    manager.plane.apply(
        {
            "apiVersion": RBAC,
            "kind": "ClusterRole",
            "metadata": {"name": cluster_role},
            "rules": rules["ClusterRole"],
        },
        {
            "apiVersion": RBAC,
            "kind": "ClusterRoleBinding",
            # The name by which it goes with the installation.
            "metadata": {"name": binding["metadata"]["name"]},
            "roleRef": {**binding["roleRef"], "name": cluster_role},
            "subjects": binding["subjects"],
        },
    )


def sent_deployment(manager: Installation, situation: str) -> Object:
    """Return the Deployment by which the original replaces whatever there is."""
    obj: Object = json.loads(
        json.dumps(golden(situation)["Deployment", "cluster-proxy"]).replace(
            _NAMESPACE, manager.namespace
        )
    )
    for field in _GIVEN:
        obj["metadata"].pop(field, None)
    obj["metadata"]["ownerReferences"][0]["uid"] = manager.configuration()["metadata"]["uid"]
    obj.pop("status", None)
    return obj

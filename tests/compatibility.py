"""How objects on the hub are compared with the original's, and what docs/compatibility.md says of the differences."""

from __future__ import annotations

import base64
import copy
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

if TYPE_CHECKING:
    from collections.abc import Collection

Object = dict[str, Any]

#: Kind, name, and path of a field; an empty path is the object itself.
Place = tuple[str, str, str]

_DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "compatibility.md"
_PREFIX: Final = "proxy.open-cluster-management.io/"

# Lists whose elements belong together by a field.
_NAMED: Final = {"conditions": "type"}

# What differs from one installation to the next.
_CHANCE: Final = (
    ("metadata", "uid"),
    ("metadata", "resourceVersion"),
    ("metadata", "creationTimestamp"),
    ("metadata", "managedFields"),
    ("metadata", "annotations", "deployment.kubernetes.io/revision"),
    ("spec", "clusterIP"),
    ("spec", "clusterIPs"),
)
_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9:]{8} \+0000 UTC")
_DESCRIBED: Final = re.compile(r"<[0-9]+ bytes: (?P<kinds>[A-Z0-9 ,]+)( \| (?P<certificates>.*))?>")
_PEM: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----")

_USAGES: Final = {
    "digital_signature": "Digital Signature",
    "content_commitment": "Non Repudiation",
    "key_encipherment": "Key Encipherment",
    "data_encipherment": "Data Encipherment",
    "key_agreement": "Key Agreement",
    "key_cert_sign": "Certificate Sign",
    "crl_sign": "CRL Sign",
}
_PURPOSES: Final = {
    ExtendedKeyUsageOID.SERVER_AUTH: "TLS Web Server Authentication",
    ExtendedKeyUsageOID.CLIENT_AUTH: "TLS Web Client Authentication",
}


# -- document --------------------------------------------------------------------------------------


def documented(document: Path = _DOCUMENT) -> set[Place]:
    """Return the differences that a document lists, each below the heading of its object."""
    found: set[Place] = set()
    kind = name = ""
    for line in document.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = re.fullmatch("### ([A-Za-z]+) `(.+)`", line)
            kind, name = heading.groups() if heading else ("", "")
        elif kind and line.startswith("|"):
            [_, cell, *rest] = line.split("|")
            paths = re.findall("`([^`]+)`", cell)
            if cell.strip() == "all of it":
                paths = [""]
            places = {(kind, name, path) for path in paths}
            assert not places & found, f"twice in {document.name}: {places & found}"
            assert not paths or all(part.strip() for part in rest[:3]), f"half a row: {line}"
            found |= places
    return found


# -- comparison ------------------------------------------------------------------------------------


def differences(
    theirs: Any, ours: Any, path: str = "", *, filled_in: Mapping[str, Collection[str]] = {}
) -> set[str]:
    """Return the paths at which two values differ, those of a map's absent keys included.

    What is empty is as good as absent. *filled_in* has, by path, what *ours* may leave to the apiserver; as a map, with
    what that fills in.
    """
    if theirs in (None, {}, []) and ours in (None, {}, []):
        return set()
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found: set[str] = set()
        for key in theirs.keys() | ours.keys():
            filled = filled_in.get(path, ())
            if (
                key in theirs
                and key not in ours
                and key in filled
                and (not isinstance(filled, Mapping) or filled[key] == theirs[key])
            ):
                continue
            # The prefix has dots of its own.
            there = f"{path}.{key.removeprefix(_PREFIX)}".lstrip(".")
            found |= differences(theirs.get(key), ours.get(key), there, filled_in=filled_in)
        return found
    if isinstance(theirs, list) and isinstance(ours, list):
        if field := _NAMED.get(path.rpartition(".")[2]):
            first, second = ({each[field]: each for each in side} for side in (theirs, ours))
            pairs = [
                (first.get(name), second.get(name), name) for name in first.keys() | second.keys()
            ]
        elif len(theirs) == len(ours):
            pairs = [(one, other, "") for one, other in zip(theirs, ours, strict=True)]
        else:
            return {path}
        return {
            each
            for one, other, name in pairs
            for each in differences(one, other, f"{path}[{name}]", filled_in=filled_in)
        }
    return set() if theirs == ours else {path}


def meaning(obj: Object, configuration: Object) -> Object:
    """Return what of an object is the same in all installations; *configuration* is its owner."""
    obj = copy.deepcopy(obj)
    for *parents, last in _CHANCE:
        part: Object = obj
        for key in parents:
            part = part.get(key) or {}
        part.pop(last, None)
    for owner in obj["metadata"].get("ownerReferences", ()):
        if owner["uid"] == configuration["metadata"]["uid"]:
            owner["uid"] = "the configuration's"
    if obj["kind"] == "Deployment":
        obj.pop("status", None)
    if obj["kind"] == "Secret":
        obj["data"] = {key: _described(value) for key, value in obj["data"].items()}
        # Of the CA's certificate.
        obj["metadata"].get("annotations", {}).pop(f"{_PREFIX}rendered-hash", None)
    for condition in obj.get("status", {}).get("conditions", ()):
        condition.pop("lastTransitionTime", None)
        condition["message"] = _TIME.sub("<time>", condition["message"])
    return obj


# -- what is in secrets ----------------------------------------------------------------------------


def _described(value: str) -> Object:
    """Return what a secret's value holds: it is either described already, or base64."""
    if match := _DESCRIBED.fullmatch(" ".join(value.split())):
        texts = (match["certificates"] or "").split(" | ") if match["certificates"] else []
        return {
            "kinds": match["kinds"].split(","),
            "certificates": [_certificate_from_text(text) for text in texts],
        }
    pem = base64.b64decode(value, validate=True)
    kinds = [kind.decode() for kind in _PEM.findall(pem)]
    certificates = x509.load_pem_x509_certificates(pem) if "CERTIFICATE" in kinds else []
    return {"kinds": kinds, "certificates": [_certificate(each) for each in certificates]}


def _certificate_from_text(text: str) -> Object:
    """Read what OpenSSL prints of a certificate."""
    subject, issuer, begin, end, *extensions = (part.strip() for part in text.split(";"))
    found: Object = {
        "subject": subject.removeprefix("subject=").replace(" = ", "="),
        "issuer": issuer.removeprefix("issuer=").replace(" = ", "="),
        "life": _life(_moment(begin), _moment(end)),
    }
    for title, value in zip(extensions[::2], extensions[1::2], strict=True):
        name, _, critical = title.removeprefix("X509v3 ").partition(":")
        found[name] = [critical.strip(), *sorted(part.strip() for part in value.split(","))]
    return found


def _certificate(certificate: x509.Certificate) -> Object:
    """Return the same of a certificate itself."""
    found: Object = {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "life": _life(certificate.not_valid_before_utc, certificate.not_valid_after_utc),
    }
    for extension in certificate.extensions:
        value = extension.value
        if isinstance(value, x509.KeyUsage):
            name, parts = "Key Usage", [_USAGES[use] for use in _USAGES if getattr(value, use)]
        elif isinstance(value, x509.ExtendedKeyUsage):
            name, parts = "Extended Key Usage", [_PURPOSES[use] for use in value]
        elif isinstance(value, x509.BasicConstraints):
            name, parts = "Basic Constraints", [f"CA:{str(value.ca).upper()}"]
        elif isinstance(value, x509.SubjectAlternativeName):
            name = "Subject Alternative Name"
            parts = [f"DNS:{each}" for each in value.get_values_for_type(x509.DNSName)]
            addresses = value.get_values_for_type(x509.IPAddress)
            parts += [f"IP Address:{each}" for each in addresses]
        else:
            # Identifiers of keys.
            continue
        found[name] = ["critical" if extension.critical else "", *sorted(parts)]
    return found


def _moment(text: str) -> datetime:
    _, _, moment = text.partition("=")
    return datetime.strptime(moment, "%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC)


def _life(begin: datetime, end: datetime) -> int:
    """Return seconds, but for one more or less: it depends on whether the CA was made in the same second."""
    return round(int((end - begin).total_seconds()), -1)

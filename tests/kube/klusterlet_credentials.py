"""What an add-on asks a klusterlet for, and whether what it has got is good for a while. Pure."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import attrs
from cryptography import x509
from cryptography.x509.oid import NameOID

from kube.ocm_resources import KUBE_CLIENT_SIGNER

if TYPE_CHECKING:
    from collections.abc import Callable

_RENEW_BELOW: Final = 0.2


@attrs.frozen(kw_only=True)
class Registration:
    """What an add-on shall have a secret for."""

    addon: str
    signer: str
    namespace: str
    user: str
    groups: tuple[str, ...]
    units: tuple[str, ...]

    @property
    def secret(self) -> str:
        """The name of the secret."""
        if self.signer == KUBE_CLIENT_SIGNER:
            return f"{self.addon}-hub-kubeconfig"
        return f"{self.addon}-{self.signer.replace('/', '-')}-client-cert"


def certificate_is_good(pem: bytes, registration: Registration, now: datetime) -> bool:
    """Tell whether a certificate is the registration's and has more than a fifth of its life before it."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError:
        return False
    subject: Callable[[x509.ObjectIdentifier], set[str | bytes]] = lambda oid: {  # noqa: E731
        each.value for each in certificate.subject.get_attributes_for_oid(oid)
    }
    if (
        subject(NameOID.COMMON_NAME) != {registration.user}
        or subject(NameOID.ORGANIZATION_NAME) != set(registration.groups)
        or subject(NameOID.ORGANIZATIONAL_UNIT_NAME) != set(registration.units)
    ):
        return False
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return certificate.not_valid_after_utc - now > life * _RENEW_BELOW


def token_is_good(token: bytes, uid: str, now: datetime) -> bool:
    """Tell whether a token is that account's and has more than a fifth of its life before it."""
    try:
        body = token.split(b".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + b"=" * (-len(body) % 4)))
    except (IndexError, ValueError):
        return False
    since, until = (datetime.fromtimestamp(claims[each], UTC) for each in ("iat", "exp"))
    account = claims["kubernetes.io"]["serviceaccount"]
    return account["uid"] == uid and until - now > (until - since) * _RENEW_BELOW

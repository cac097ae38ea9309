"""The TLS profile that administrators set for all of Open Cluster Management's components. Pure.

Source: ConfigMap ``ocm-tls-profile`` in a component's own namespace (open-cluster-management.io/sdk-go, pkg/tls).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from clusterproxy.errors import ConfigError
from clusterproxy.gotext import quote
from clusterproxy.transport.tls import GO_CIPHER_SUITES

from .resource import map_at, text_at

if TYPE_CHECKING:
    from .resource import Object

#: The name of the ConfigMap.
CONFIG_MAP: Final = "ocm-tls-profile"

_VERSIONS: Final = {
    **{f"VersionTLS1{minor}": f"VersionTLS1{minor}" for minor in range(4)},
    **{f"TLSv1.{minor}": f"VersionTLS1{minor}" for minor in range(4)},
    "": "VersionTLS12",
}

# Go's ``tls.InsecureCipherSuites``: known by name. Our servers refuse them, so they are left out.
_INSECURE: Final = frozenset(
    {
        "TLS_RSA_WITH_RC4_128_SHA",
        "TLS_RSA_WITH_3DES_EDE_CBC_SHA",
        "TLS_RSA_WITH_AES_128_CBC_SHA",
        "TLS_RSA_WITH_AES_256_CBC_SHA",
        "TLS_RSA_WITH_AES_128_CBC_SHA256",
        "TLS_RSA_WITH_AES_128_GCM_SHA256",
        "TLS_RSA_WITH_AES_256_GCM_SHA384",
        "TLS_ECDHE_ECDSA_WITH_RC4_128_SHA",
        "TLS_ECDHE_RSA_WITH_RC4_128_SHA",
        "TLS_ECDHE_RSA_WITH_3DES_EDE_CBC_SHA",
        "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256",
        "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256",
    }
)


@attrs.frozen
class TlsProfile:
    """What listeners are to demand, in Go's names.

    Attributes:
      cipher_suites: for TLS 1.2; empty means the implementation's own.
      warnings: what of the ConfigMap was left out, and why.
    """

    min_version: str = "VersionTLS12"
    cipher_suites: tuple[str, ...] = ()
    warnings: tuple[str, ...] = attrs.field(default=(), eq=False)


def parse_tls_profile(config_map: Object | None) -> TlsProfile:
    """Return what the ConfigMap says; without one, TLS 1.2 and the implementation's suites.

    Raises:
      ConfigError: it names an unknown version, or suites of which none can be had.
    """
    data = map_at(config_map or {}, "data")
    version = text_at(data, "minTLSVersion").strip()
    if version not in _VERSIONS:
        raise ConfigError(
            "minTLSVersion",
            f"ConfigMap {CONFIG_MAP}: data.minTLSVersion is {quote(version)}; "
            "known are VersionTLS10 to VersionTLS13 and TLSv1.0 to TLSv1.3",
        )
    asked = [name.strip() for name in text_at(data, "cipherSuites").split(",")]
    asked = [name for name in asked if name]
    suites: list[str] = []
    warnings: list[str] = []
    for name in asked:
        if name in GO_CIPHER_SUITES:
            suites += [] if name in suites else [name]
        elif name in _INSECURE:
            warnings.append(f"cipher suite {name} is insecure and left out")
        else:
            warnings.append(f"cipher suite {quote(name)} is unknown and left out")
    if asked and not suites:
        raise ConfigError(
            "cipherSuites",
            f"ConfigMap {CONFIG_MAP}: data.cipherSuites has none that can be used: "
            + "; ".join(warnings),
        )
    return TlsProfile(_VERSIONS[version], tuple(suites), tuple(warnings))
